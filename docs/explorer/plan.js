"use strict";
/* Who holds what: apb/plan.py, apb/blocks.py and the `plan` of apb/methods/ once more, under the same names, for pages
   that have no Python. Nothing here knows of a page. */

const Plan = (() => {
  /* By name: what people call it, how it plans, which settings it takes besides tokens, hosts and query;
     `one_host`: it runs on one only. */
  const APB_TAKES = ["anchor", "passing", "compressor", "query_in", "layout", "split_anchor"];
  const METHODS = {
    flash: { title: "Exact attention", plan: planOnOneHost, takes: [], one_host: true },
    ring: { title: "Ring Attention", plan: (s) => planExact(s, "contiguous"), takes: [] },
    "ring-zigzag": { title: "Zigzag Ring Attention", plan: (s) => planExact(s, "zigzag"), takes: [] },
    ulysses: { title: "Ulysses", plan: (s) => planExact(s, "contiguous"), takes: [] },
    star: { title: "Star Attention", plan: planStar, takes: ["anchor"] },
    ape: { title: "APE", plan: planApe, takes: ["anchor", "query_offset"] },
    minference: { title: "MInference", plan: planOnOneHost, takes: [], one_host: true },
    apb: { title: "APB", plan: planApb, takes: [...APB_TAKES, "query_offset"] },
    spava: { title: "Spava", plan: planSpava, takes: APB_TAKES },
  };
  /* What a method of many settings takes if nothing else is said; null follows from the document and the hosts. */
  const DEFAULTS = { anchor: null, passing: null, compressor: "query-aware", query_in: "anchor", layout: "contiguous",
    split_anchor: false, query: 0, query_offset: 0 };
  const OWN_DEFAULTS = { spava: { query_in: "prefill", layout: "zigzag" } };
  const CHOICES = { layout: ["contiguous", "zigzag"], query_in: ["anchor", "prefill", "after"] };

  /* What cannot be planned: which setting, why, and a change to the settings that is a way out. */
  class Refused extends Error {
    constructor(setting, why, change) {
      super(why);
      Object.assign(this, { setting, change });
    }
  }

  const ceilDiv = (a, b) => Math.ceil(a / b);
  const length = (spans) => spans.reduce((sum, [start, stop]) => sum + stop - start, 0);

  /* Refuse what is not an integer of at least `least`. */
  function checkCount(name, value, least = 0) {
    if (!Number.isSafeInteger(value) || value < least)
      throw new Refused(name, `This must be a whole number, ${least} or more.`, { [name]: least });
  }

  /* Fill in what was not said. */
  const complete = (settings) => ({ ...DEFAULTS, ...OWN_DEFAULTS[settings.method], ...settings });

  /* Return the plan of settings {method, tokens, hosts, …}; throws Refused. */
  function makePlan(settings) {
    const s = complete(settings);
    const { plan, takes } = METHODS[s.method];
    for (const name of ["anchor", "passing"]) if (takes.includes(name) && s[name] !== null) checkCount(name, s[name]);
    return plan(s);
  }

  function planOnOneHost(s) {
    const other = s.method === "flash" ? "Ring Attention" : "APB";
    if (s.hosts !== 1)
      throw new Refused("hosts", `${METHODS[s.method].title} runs on one host, and there are ${s.hosts}. Take one, ` +
        `or ${other} to split the document.`, { hosts: 1 });
    return planExact(s, "contiguous");
  }

  function planExact(s, layout) {
    return planContext({ tokens: s.tokens, hosts: s.hosts, query: s.query, query_in: "after", layout });
  }

  function planStar(s) {
    const anchor = s.anchor ?? ceilDiv(s.tokens, Math.max(1, s.hosts));
    return planContext({ tokens: s.tokens, hosts: s.hosts, query: s.query, query_in: "after", anchor });
  }

  function planApe(s) {
    if (s.anchor > s.tokens)
      throw new Refused("anchor", `The prefix of ${s.anchor} tokens is longer than the document, which has ` +
        `${s.tokens}.`, { anchor: 0 });
    return planContext({ tokens: s.tokens, hosts: s.hosts, query: s.query, query_in: "after",
      anchor: s.anchor ?? s.query_offset, shared_prefix: true });
  }

  function planApb(s) {
    const blocks = Math.max(1, s.hosts) * (s.layout === "zigzag" ? 2 : 1);
    const block = ceilDiv(s.tokens, blocks);
    const passing = s.passing ?? Math.floor(block / 8);
    const quarter = Math.floor(ceilDiv(s.tokens, Math.max(1, s.hosts)) / 4);
    const anchor = s.anchor ?? (blocks > 1 ? Math.max(quarter, s.query_offset) : 0);
    if (s.anchor === null && anchor > block)
      throw new Refused("hosts", `A block of ${block} tokens is shorter than the prefix of ${s.query_offset} tokens, ` +
        `which the anchor must hold. Take fewer hosts, a longer document or a shorter prefix.`, { query_offset: 0 });
    const reads = readsQuery(s, anchor, passing, blocks);
    return planContext({ tokens: s.tokens, hosts: s.hosts, anchor, passing, query: s.query, query_in: s.query_in,
      query_offset: s.query_offset, layout: s.layout, split_anchor: s.split_anchor,
      anchor_on_first: reads && s.query_in === "anchor" });
  }

  function planSpava(s) {
    if (s.query_in === "anchor")
      throw new Refused("query_in", "Spava's anchor is text only: the question runs along with the prefill, or comes " +
        "after it.", { query_in: "prefill" });
    const part = (divisor) => ceilDiv(s.tokens, 128 * divisor) * 128;
    const anchor = s.anchor ?? Math.min(s.tokens, part(64));
    const passing = s.passing ?? part(128);
    readsQuery(s, anchor, passing, s.hosts * (s.layout === "zigzag" ? 2 : 1));
    return planContext({ tokens: s.tokens, hosts: s.hosts, anchor, passing, query: s.query, query_in: s.query_in,
      layout: s.layout, split_anchor: s.split_anchor, shared_prefix: true, split_anchor_cache: true });
  }

  /* Say whether the compressor will read the question; refuse if it would and the question is nowhere. */
  function readsQuery(s, anchor, passing, blocks) {
    if (s.compressor !== "query-aware" || blocks === 1 || passing === 0) return false;
    if (!s.query || s.query_in === "after" || (s.query_in === "anchor" && anchor === 0))
      throw new Refused("query", "This compressor reads the question, and no host would hold it in the prefill. " +
        "Give a question that stands in an anchor or runs along with the prefill, or take a compressor that " +
        "does without it.", { compressor: "snapkv" });
    return true;
  }

  /* Split a document over hosts (`plan_context`). */
  function planContext(given) {
    const p = { anchor: 0, passing: 0, query: 0, query_offset: 0, anchor_on_first: false, layout: "contiguous",
      shared_prefix: false, split_anchor: false, split_anchor_cache: false, ...given };
    for (const name of ["tokens", "hosts"]) checkCount(name, p[name], 1);
    for (const name of ["anchor", "passing", "query", "query_offset"]) checkCount(name, p[name]);
    for (const [name, choices] of Object.entries(CHOICES))
      if (!choices.includes(p[name]))
        throw new Refused(name, `This must be one of ${choices.join(", ")}.`, { [name]: choices[0] });
    const zigzag = p.layout === "zigzag";
    const count = p.hosts * (zigzag ? 2 : 1);
    p.block_tokens = ceilDiv(p.tokens - (p.shared_prefix ? p.anchor : 0), count);
    p.anchor_rows = p.anchor + (p.anchor && p.query_in === "anchor" ? p.query : 0);
    checkAnchor(p, count);
    p.blocks = cutBlocks(p, count);
    p.owner = p.blocks[count - 1].rank;
    p.host_plans = shareOut(p);
    return p;
  }

  /* Refuse an anchor, or a question in it, that has no room. */
  function checkAnchor(p, count) {
    if (p.shared_prefix && p.anchor > p.tokens)
      throw new Refused("anchor", `A shared prefix of ${p.anchor} tokens is longer than the document, which has ` +
        `${p.tokens}.`, { anchor: 0 });
    if (p.anchor > p.block_tokens && !p.shared_prefix)
      throw new Refused("anchor", `An anchor of ${p.anchor} tokens reaches into the second block, whose tokens would ` +
        `be seen twice; a block has ${p.block_tokens}. Take a shorter anchor or fewer hosts.`,
        { anchor: p.block_tokens });
    if (p.anchor_rows > p.anchor && p.query_offset > p.anchor)
      throw new Refused("query_offset", `The question follows a prefix of ${p.query_offset} tokens in the anchor, ` +
        `which has only ${p.anchor}. Take a longer anchor, or let the question run along.`, { query_in: "prefill" });
    if (count > 1 && p.anchor_rows > Math.max(p.anchor, p.block_tokens))
      throw new Refused("query", `A question of ${p.query} tokens beside an anchor of ${p.anchor} reaches past the ` +
        `start of the second block, at ${p.block_tokens}. Take a shorter anchor, fewer hosts, or let the question ` +
        `run along.`, { query_in: "prefill" });
  }

  /* Cut the document into blocks of equal length, in order; the last may be shorter, or empty. */
  function cutBlocks(p, count) {
    const begin = p.shared_prefix ? p.anchor : 0;
    const blocks = [];
    let passed = 0;
    for (let index = 0; index < count; index++) {
      const [start, stop] = [index, index + 1].map((i) => Math.min(begin + i * p.block_tokens, p.tokens));
      const skipped = index === 0 && !p.shared_prefix ? Math.min(p.anchor, stop - start) : 0;
      const kept_tokens = index === count - 1 ? 0 : Math.min(p.passing, stop - start - skipped);
      const rank = index < p.hosts ? index : 2 * p.hosts - 1 - index;
      blocks.push({ index, rank, start, stop, tokens: stop - start, skipped, kept_tokens, passing_tokens: passed,
        sees_anchor: index > 0 || p.shared_prefix });
      passed += kept_tokens;
    }
    return blocks;
  }

  /* Host `rank`'s share of a split anchor's rows: of 2 · hosts pieces, numbers rank and 2 · hosts − 1 − rank. */
  function cutAnchor(rows, hosts, rank) {
    const edge = (i) => Math.floor((rows * i) / (2 * hosts));
    const [near, far] = [rank, 2 * hosts - 1 - rank].map((i) => [edge(i), edge(i + 1)]);
    const spans = near[1] === far[0] ? [[near[0], far[1]]] : [near, far];
    return spans.filter(([start, stop]) => start < stop);
  }

  /* Every host's share, in rank order: the anchor runs where a block sees it or it is kept; split, on all hosts. */
  function shareOut(p) {
    const split_cache = p.split_anchor || p.split_anchor_cache;
    const ranks = [...Array(p.hosts).keys()];
    const mine = ranks.map((rank) => p.blocks.filter((block) => block.rank === rank));
    const needs = ranks.map((rank) =>
      mine[rank].some((block) => (block.sees_anchor ? block.tokens > 0 : p.anchor_on_first)) ||
      (p.shared_prefix && (split_cache || rank === p.owner)));
    const whole = p.anchor_rows ? [[0, p.anchor_rows]] : [];
    return ranks.map((rank) => {
      const share = cutAnchor(p.anchor_rows, p.hosts, rank);
      const runs = p.split_anchor ? (needs.includes(true) ? share : []) : needs[rank] ? whole : [];
      const kept = !p.shared_prefix ? [] : split_cache ? share : rank === p.owner ? whole : [];
      const block_rows = mine[rank].reduce((sum, block) => sum + block.tokens, 0);
      const query_rows = p.query_in === "prefill" ? p.query : 0;
      return { rank, blocks: mine[rank], anchor_spans: runs, anchor_rows: length(runs), query_rows, block_rows,
        held_rows: block_rows + length(kept), rows: length(runs) + block_rows + query_rows };
    });
  }

  /* The Python that makes the same plan. */
  function pythonCall(settings) {
    const s = complete(settings);
    const usual = complete({ method: s.method });
    const named = METHODS[s.method].takes.filter((name) => name !== "query_offset" && s[name] !== usual[name]);
    const text = named.map((name) => `${s.method === "ape" ? "prefix" : name}=${s[name]}`).join(",");
    const offset = s.query_offset ? `, query_offset=${s.query_offset}` : "";
    return `make_method("${s.method}${text && ":"}${text}").plan(tokens=${s.tokens}, hosts=${s.hosts}, ` +
      `query=${s.query}${offset})`;
  }

  return { METHODS, CHOICES, Refused, complete, makePlan, pythonCall };
})();
