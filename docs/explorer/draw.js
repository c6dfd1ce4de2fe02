"use strict";
/* Pictures and tables of a plan, as HTML: who holds what, who sees what, and what it costs. Nothing here knows of
   inputs; `view` is {settings, plan, costs, chosen}, of which `chosen` is a host that is looked at, or null. */

const Draw = (() => {
  const EXAMPLES = 64; // passing tokens drawn, at most, in the whole picture
  const exact = (method) => method.startsWith("ring") || ["flash", "ulysses", "minference"].includes(method);
  const grouped = new Intl.NumberFormat("en");
  const count = (n) => grouped.format(n).replaceAll(",", "\u202f");
  const fixed = (x, digits) => {
    const [whole, rest] = x.toFixed(digits).split(".");
    return count(BigInt(whole)) + (rest ? `.${rest}` : "");
  };
  const tera = (flops) => fixed(Number(flops) / 1e12, Number(flops) < 1e11 ? 4 : 2);
  const mebi = (bytes) => fixed(Number(bytes) / 2 ** 20, bytes % 1048576n === 0n ? 0 : 2);
  const total = (parts) => parts.reduce((sum, part) => sum + part[1], 0);
  const most = (values) => values.reduce((a, b) => (b > a ? b : a));

  /* The host with the most FLOPs, the first of several. */
  const busiest = (costs) => costs.findIndex((cost) => cost.flops === most(costs.map((c) => c.flops)));

  const even = (costs) => costs.every((cost) => cost.flops === costs[0].flops);

  /* What one host holds of keys while a layer runs: [part, tokens, whether they came from other hosts]. */
  function holds({ settings, plan }, host) {
    const full = host.blocks.filter((block) => block.tokens > 0);
    const seen = full.some((block) => block.sees_anchor) ? plan.anchor_rows : 0;
    const elsewhere = plan.host_plans.filter((other) => other !== host).map((other) => other.block_rows);
    const passing = settings.method.startsWith("ring") ? Math.max(0, ...elsewhere) :
      Math.max(0, ...full.map((block) => block.passing_tokens));
    const where = (block) => `tokens ${count(block.start)} to ${count(block.stop - 1)}`;
    return [
      ["anchor", host.anchor_rows, false],
      ["anchor", Math.max(0, seen - host.anchor_rows), true],
      ["passing", passing, true],
      ...full.map((block) => ["block", block.tokens, false, where(block)]),
      ["query", host.query_rows, false],
    ].filter((part) => part[1] > 0);
  }

  /* What the parts are called in a method. */
  function labels({ method }) {
    const anchor = method === "ape" ? "prefix" : "anchor";
    return { anchor, passing: exact(method) ? "others' keys" : "passing", block: "block", query: "question" };
  }

  /* The same in words. */
  function heldWords(view, parts) {
    const named = labels(view.settings);
    const words = parts.map(([name, tokens, received, where]) =>
      `${named[name]} ${count(tokens)}${received ? " received" : ""}${where ? `, ${where}` : ""}`);
    return words.join("; ") || "nothing";
  }

  /* What one host holds, runs and scores, in words. */
  function hostWords(view) {
    const rank = view.chosen;
    if (rank === null) return view.plan.hosts > 1 ? "Choose a host above to look at its share alone." : "";
    const { rows, flops } = view.costs[rank];
    const held = heldWords(view, holds(view, view.plan.host_plans[rank]));
    return `Host ${rank} holds ${held}. It runs ${count(rows)} rows: ${tera(flops)} TFLOP.`;
  }

  /* A bar a host, to scale. */
  function bars(view) {
    const all = view.plan.host_plans.map((host) => holds(view, host));
    const longest = Math.max(...all.map(total));
    const named = labels(view.settings);
    const lines = all.map((parts, rank) => {
      const spans = parts.map(([name, tokens, received]) =>
        `<span class="${name}${received ? " received" : ""}" style="width:${(100 * tokens) / longest}%">` +
        `${tokens > longest / 25 ? `<b>${letter(named[name])}</b>` : ""}</span>`);
      const faded = view.chosen !== null && view.chosen !== rank;
      return `<li${faded ? ' class="faded"' : ""}><span aria-hidden="true">${rank}</span>` +
        `<div role="img" aria-label="Host ${rank}: ${heldWords(view, parts)}" title="${heldWords(view, parts)}">` +
        `${spans.join("")}</div></li>`;
    });
    const many = all.length > 16 ? " many" : "";
    return `<ul class="bars${many}" aria-label="Keys that each host holds">${lines.join("")}</ul>`;
  }

  const letter = (label) => label[0].toUpperCase();

  /* What the colours, letters and the hatching stand for, as far as they occur. */
  function key(view) {
    const held = view.plan.host_plans.flatMap((host) => holds(view, host));
    const used = new Set([...held, ...maskParts(view)].map(([name]) => name));
    const lines = Object.entries(labels(view.settings)).filter(([name]) => used.has(name));
    const shown = lines.map(([name, label]) =>
      `<li><span class="${name}"></span><b>${letter(label)}</b> ${label}</li>`);
    if (held.some((part) => part[2])) shown.push('<li><span class="received"></span>hatched: received</li>');
    return shown.join("");
  }

  /* The rectangles, triangles and stripes of the mask: [part, points], in document tokens. */
  function maskParts({ settings, plan }) {
    const box = (x0, x1, y0, y1) => [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
    const corner = (x0, x1) => [[x0, x0], [x1, x1], [x0, x1]];
    const { tokens, blocks, anchor } = plan;
    const full = blocks.filter((block) => block.tokens > 0);
    const own = full.map((block) => ["block", corner(block.start, block.stop)]);
    if (exact(settings.method)) {
      const twice = plan.host_plans.filter((host) => host.blocks.length > 1 && host.blocks[1].tokens > 0);
      const mine = twice.map(({ blocks: [a, b] }) => ["block", box(a.start, a.stop, b.start, b.stop)]);
      return plan.hosts > 1 ? [["passing", corner(0, tokens)], ...mine, ...own] : own;
    }
    const parts = plan.shared_prefix ? [["anchor", corner(0, anchor)]] : [];
    const first = full.find((block) => block.sees_anchor);
    if (first && anchor) parts.push(["anchor", box(0, anchor, first.start, tokens)]);
    const each = Math.max(1, Math.floor(EXAMPLES / blocks.length));
    for (const block of full) {
      const stripes = Math.min(each, block.kept_tokens);
      const room = (block.tokens - block.skipped) / stripes;
      for (let i = 0; i < stripes; i++) {
        const x = block.start + block.skipped + i * room;
        parts.push(["passing", box(x, x + block.kept_tokens / stripes, block.stop, tokens)]);
      }
    }
    return [...parts, ...own];
  }

  /* What the mask shows, in words. */
  function maskWords(view) {
    const { settings, plan } = view;
    const many = plan.blocks.length > 1;
    const blocks = `${plan.blocks.length} block${many ? "s" : ""} of ${count(plan.block_tokens)} tokens`;
    if (settings.method === "minference")
      return "Each head attends to a few columns and diagonals of this triangle; which ones depends on the text.";
    if (plan.hosts === 1 && exact(settings.method)) return "Every token attends to itself and to all before it.";
    if (settings.method === "ulysses")
      return `Every token attends to all before it. The document is held in ${blocks}; in attention each host scores ` +
        "the whole triangle, for its share of the heads.";
    if (exact(settings.method))
      return `Every token attends to all before it, in ${blocks}: to its own host's keys, and to the others' as they ` +
        "come round the ring.";
    const anchor = plan.anchor ? ` the first ${count(plan.anchor)} tokens of the document ` +
      `(${labels(settings).anchor}),` : "";
    const passing = plan.passing && many ? ` up to ${count(plan.passing)} tokens that each earlier ` +
      "block passed on," : "";
    const question = settings.compressor === "query-aware" ? " and the question" : "";
    const note = passing ? ` Which tokens are passed on depends on the text${question}: the stripes are examples, ` +
      "evenly spread, and their width is to scale." : "";
    const and = anchor || passing ? " and" : "";
    return `${blocks}. A token attends to${anchor}${passing}${and} its own block up to itself.${note}`;
  }

  /* The document × document mask. */
  function mask(view) {
    const { plan, settings, chosen } = view;
    const at = (x) => +((100 * x) / plan.tokens).toFixed(3);
    const shapes = maskParts(view).map(([name, points]) =>
      `<polygon class="${name}" points="${points.map((point) => point.map(at).join(",")).join(" ")}"/>`);
    const step = Math.ceil(plan.blocks.length / 16);
    const lines = plan.blocks.slice(1).map(({ start }) => `<path d="M0,${at(start)}H100M${at(start)},0V100"/>`);
    const names = plan.blocks.filter((block) => block.tokens && block.index % step === 0).map((block) =>
      `<text x="-2" y="${at((block.start + block.stop) / 2)}">${block.rank}</text>`);
    const alone = chosen !== null && settings.method !== "ulysses";
    const rest = plan.blocks.filter(({ rank }) => alone && rank !== chosen);
    const veils = rest.map((block) =>
      `<rect class="veil" x="0" width="100" y="${at(block.start)}" height="${at(block.tokens)}"/>`);
    return `<svg viewBox="-8 -1 109 102" role="img" aria-labelledby="x-mask-words">` +
      `<rect class="ground" width="100" height="100"/>${shapes.join("")}${veils.join("")}` +
      `<g class="grid" aria-hidden="true">${plan.blocks.length > 32 ? "" : lines.join("")}</g>` +
      `<g aria-hidden="true">${names.join("")}</g></svg>`;
  }

  /* A line a host: rows, pairs, FLOPs, bytes. */
  function table({ costs, chosen }) {
    const heads = ["Host", "Rows", "Pairs", "Attention TFLOP", "Linear TFLOP", "MiB sent", "MiB of cache"];
    const top = busiest(costs);
    const lines = costs.map((cost, rank) => {
      const cells = [[count(cost.rows), cost.rows], [count(cost.pairs), cost.pairs],
        [tera(cost.attention_flops), cost.attention_flops], [tera(cost.linear_flops), cost.linear_flops],
        [mebi(cost.sent_bytes), cost.sent_bytes], [mebi(cost.cache_bytes), cost.cache_bytes]];
      const marks = [rank === top && !even(costs) && "busiest", rank === chosen && "chosen"].filter(Boolean);
      const mark = marks[0] === "busiest" ? " <em>busiest</em>" : "";
      return `<tr class="${marks.join(" ")}"><th scope="row">${rank}${mark}</th>` +
        `${cells.map(([shown, value]) => `<td data-exact="${value}">${shown}</td>`).join("")}</tr>`;
    });
    const head = heads.map((text) => `<th scope="col">${text}</th>`);
    const says = "One layer of the prefill, by host. Pairs are summed over the query heads; a multiply–add is 2 FLOPs";
    return `<table class="costs"><caption>${says}.</caption><thead><tr>${head.join("")}</tr></thead>` +
      `<tbody>${lines.join("")}</tbody></table>`;
  }

  /* A bar a method, each with an address: FLOPs of its busiest host. `found` is [{title, hash, flops, here, least}]. */
  function others(found) {
    const longest = Number(most(found.map(({ flops }) => flops)));
    const lines = found.map(({ title, hash, flops, here, least }) =>
      `<li><a href="#${hash}"${here ? ' aria-current="true"' : ""}>${title}</a><div aria-hidden="true">` +
      `<span class="${here ? "block" : "other"}" style="width:${(100 * Number(flops)) / longest}%"></span></div>` +
      `<span>${flops ? `${least ? "≤ " : ""}${tera(flops)}` : "not possible"}</span></li>`);
    return `<ul class="bars others" aria-label="TFLOP on the busiest host, by method">${lines.join("")}</ul>`;
  }

  /* What it comes to, in words. */
  function summary({ settings, plan, costs, exactFlops }) {
    const top = busiest(costs);
    const { flops, sent_bytes, messages, cache_bytes } = costs[top];
    const fewer = Number((exactFlops * 1000n) / flops) / 1000;
    const who = plan.hosts === 1 ? "The host" : even(costs) ? "Every host" : `Host ${top}, the busiest,`;
    const least = settings.method === "minference" ? "at most " : "";
    const times = fewer === 1 ? "as many as" : fewer > 1 ? `${fixed(fewer, 1)} times fewer than` :
      `${fixed(1 / fewer, 1)} times as many as`;
    return `${who} computes ${least}${tera(flops)} TFLOP a layer: ${times} exact attention on one host ` +
      `(${tera(exactFlops)}). These are FLOPs, not time. It sends ${mebi(sent_bytes)} MiB in ${messages} ` +
      `message${messages === 1 ? "" : "s"}, and keeps ${mebi(cache_bytes)} MiB of keys and values.`;
  }

  return { bars, most, others, hostWords, key, mask, maskWords, table, summary };
})();
