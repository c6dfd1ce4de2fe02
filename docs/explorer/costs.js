"use strict";
/* What one layer of the prefill costs each host: apb/costs.py and the `cost` of apb/methods/ once more, under the same
   names. Counts of tokens are numbers; pairs, FLOPs and bytes are BigInt, for exact attention to a million tokens takes
   more FLOPs than 2^53, up to where numbers are exact. */

const Costs = (() => {
  const SHAPES = {
    "llama-3.1-8b": { hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, ffn: 14336, layers: 32 },
    "qwen-2.5-14b": { hidden: 5120, heads: 40, kv_heads: 8, head_dim: 128, ffn: 13824, layers: 48 },
    "yi-34b": { hidden: 7168, heads: 56, kv_heads: 8, head_dim: 128, ffn: 20480, layers: 60 },
    tiny: { hidden: 128, heads: 8, kv_heads: 2, head_dim: 16, ffn: 256, layers: 2 },
  };
  const VALUE_BYTES = 2;

  /* n(n + 1)/2: the pairs of n rows that see one another causally. */
  const triangle = (n) => (BigInt(n) * BigInt(n + 1)) / 2n;

  /* Deal the query heads out in order, as evenly as they go, with the KV heads that they read. */
  function splitHeads(shape, hosts) {
    const group = shape.heads / shape.kv_heads;
    const edge = (rank) => rank * Math.floor(shape.heads / hosts) + Math.min(rank, shape.heads % hosts);
    return [...Array(hosts).keys()].map((rank) => {
      const [first, last] = [edge(rank), edge(rank + 1)];
      const read = last > first ? Math.floor((last - 1) / group) + 1 - Math.floor(first / group) : 0;
      return { q: last - first, kv: read };
    });
  }

  /* Query–key pairs that a host scores for each query head, by the masks of anchor, blocks and running query. */
  function maskPairs(plan, host) {
    let pairs = host.anchor_spans.reduce((sum, [start, stop]) => sum + triangle(stop) - triangle(start), 0n);
    for (const block of host.blocks) {
      const seen = (block.sees_anchor ? plan.anchor_rows : 0) + block.passing_tokens;
      pairs += BigInt(block.tokens) * BigInt(seen) + triangle(block.tokens);
    }
    pairs += BigInt(host.query_rows) * BigInt(host.held_rows);
    return host.rank === plan.owner ? pairs + triangle(host.query_rows) : pairs;
  }

  /* Bytes and messages of the gathers of what blocks keep, and of the running query's partial results. */
  function gathers(plan, host, shape, kv_bytes) {
    const others = BigInt(plan.hosts - 1);
    const slots = plan.layout === "zigzag" ? [0, 1] : [0];
    const longest = slots.map((slot) => Math.max(...plan.host_plans.map(
      (h) => h.blocks[slot].kept_tokens + (plan.split_anchor && slot === 0 ? h.anchor_rows : 0))));
    let sent = longest.reduce((sum, tokens) => sum + others * BigInt(tokens) * kv_bytes, 0n);
    let messages = longest.filter((tokens) => tokens > 0).length;
    if (host.query_rows && plan.hosts > 1) {
      sent += others * BigInt(host.query_rows) * BigInt(shape.heads * (shape.head_dim + 1) * 4);
      messages += 1;
    }
    return [sent, messages];
  }

  /* Bytes of the question's vectors, which a split anchor leaves apart; null where no compressor reads them there. */
  function questionBytes(s, plan, shape) {
    const chooses = plan.blocks.some((b) => 0 < b.kept_tokens && b.kept_tokens < b.tokens - b.skipped);
    const embedded = plan.anchor_rows > plan.anchor && plan.split_anchor;
    if (s.compressor !== "query-aware" || !embedded || !chooses) return null;
    const [first, last] = [plan.query_offset, plan.query_offset + plan.query];
    const inside = ([start, stop]) => Math.max(0, Math.min(stop, last) - Math.max(start, first));
    const longest = Math.max(...plan.host_plans.map((h) => h.anchor_spans.reduce((sum, x) => sum + inside(x), 0)));
    return BigInt(plan.hosts - 1) * BigInt(longest) * BigInt(shape.heads * shape.head_dim * VALUE_BYTES);
  }

  /* Pairs over all heads, bytes sent and messages of one host, by the method's own rule. */
  function traffic(s, plan, host, shape, kv_bytes) {
    const heads = BigInt(shape.heads);
    if (s.method.startsWith("ring")) {
      const seen = host.blocks.reduce((sum, b) => sum + BigInt(b.tokens) * BigInt(b.start) + triangle(b.tokens), 0n);
      const next = (host.rank + 1) % plan.hosts; // everybody's keys and values go on, but those that came from there
      const rows = plan.host_plans.reduce((sum, h) => sum + (h.rank === next ? 0 : h.block_rows), 0);
      return [heads * seen, plan.hosts > 1 ? BigInt(rows) * kv_bytes : 0n, plan.hosts - 1];
    }
    if (s.method === "ulysses") {
      const shares = splitHeads(shape, plan.hosts);
      const mine = shares[host.rank];
      const out = shares.reduce((sum, x, rank) => sum + (rank === host.rank ? 0 : x.q + 2 * x.kv), 0) * host.block_rows;
      const values = BigInt(out) + BigInt(plan.tokens - host.block_rows) * BigInt(mine.q);
      return [BigInt(mine.q) * triangle(plan.tokens), values * BigInt(shape.head_dim * VALUE_BYTES), 2];
    }
    const [sent, messages] = gathers(plan, host, shape, kv_bytes);
    const question = Plan.METHODS[s.method].takes.includes("compressor") ? questionBytes(s, plan, shape) : null;
    return [heads * maskPairs(plan, host), sent + (question ?? 0n), messages + (question === null ? 0 : 1)];
  }

  /* What one layer costs each host, in rank order (`Method.cost`). */
  function hostCosts(settings, plan, shape) {
    const s = Plan.complete(settings);
    const kv_bytes = BigInt(shape.kv_heads * 2 * shape.head_dim * VALUE_BYTES);
    const projections = shape.hidden * (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    const per_row = BigInt(2 * (projections + 3 * shape.hidden * shape.ffn));
    return plan.host_plans.map((host) => {
      const [pairs, sent_bytes, messages] = traffic(s, plan, host, shape, kv_bytes);
      const attention_flops = 4n * pairs * BigInt(shape.head_dim);
      const linear_flops = BigInt(host.rows) * per_row;
      return { rows: host.rows, pairs, attention_flops, linear_flops, flops: attention_flops + linear_flops, sent_bytes,
        messages, cache_bytes: BigInt(host.held_rows) * kv_bytes };
    });
  }

  return { SHAPES, hostCosts };
})();
