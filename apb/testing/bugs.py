"""Planted bugs: mistakes that such code really gets, as data, each with the tests that must notice it.

Those of APB, and of what all methods share, are here; those of the other methods in `apb.testing.method_bugs`,
those of training, answering and evaluating in `apb.testing.eval_bugs`, those of kernels and benchmarks beside it.
`tests/test_planted_bugs.py` puts one bug at a time into a copy of this package and demands that its tests fail. Each
left all quality scores on easy tasks where they were, which is why the laws look at the numbers.
"""

from dataclasses import dataclass

__all__ = ["BUGS", "Bug"]


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One mistake.

    Attributes:
        name: what is wrong, in words.
        file: where, below `apb/`.
        old: text that stands there exactly once.
        new: what takes its place.
        tests: pytest arguments, relative to the repository, first a file or a pattern of files; at least one selected
            test must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


BUGS = (
    # Who holds what, and where.
    Bug(
        name="a block's positions start behind the anchor",
        file="plan.py",
        old="else block.start\n",
        new="else block.start + host.anchor_rows\n",
        tests="tests/test_plan.py -k positions_are_true",
    ),
    Bug(
        name="the anchor's positions do not count the query inside it",
        file="plan.py",
        old="parts = [torch.arange(start, stop) for start, stop in host.anchor_spans]",
        new="parts = [torch.arange(start, stop).clamp(max=self.anchor) for start, stop in host.anchor_spans]",
        tests="tests/test_plan.py -k positions_are_true",
    ),
    Bug(
        name="the query stands before the beginning of the document",
        file="plan.py",
        old="torch.cat((document[..., :s], embedded,",
        new="torch.cat((embedded, document[..., :s],",
        tests="tests/test_plan.py -k host_rows",
    ),
    Bug(
        name="zigzag that does not turn back",
        file="blocks.py",
        old="else 2 * hosts - 1 - index",
        new="else index - hosts",
        tests="tests/test_plan.py -k layout",
    ),
    Bug(
        name="the first block passes tokens on that later blocks see as anchor",
        file="blocks.py",
        old="left_out = min(skipped, last - first) if index == 0 else 0",
        new="left_out = 0",
        tests="tests/test_plan.py -k receives",
    ),
    Bug(
        name="the first block scores its anchor tokens in place of its last ones",
        file="methods/apb.py",
        old="slice(span.start + block.skipped, span.stop)",
        new="slice(span.start, span.stop - block.skipped)",
        tests="tests/test_apb_laws.py -k trace",
    ),
    # What is kept.
    Bug(
        name="unsorted selection",
        file="compress/select.py",
        old="return order[..., :keep].sort(dim=-1).values",
        new="return order[..., :keep]",
        tests="tests/test_compress.py -k ties",
    ),
    Bug(
        name="ties broken as the sort likes",
        file="compress/select.py",
        old="torch.sort(scores, dim=-1, descending=True, stable=True).indices",
        new="torch.topk(scores, scores.shape[-1], dim=-1).indices",
        tests="tests/test_compress.py -k ties",
    ),
    Bug(
        name="query head h belongs to KV head h % kv_heads",
        file="compress/query_aware.py",
        old="b (h g) l d -> b h g l d",
        new="b (g h) l d -> b h g l d",
        tests="tests/test_compress.py -k 'kv_heads_are and query-aware'",
    ),
    Bug(
        name="a voter that does not see itself",
        file="compress/snapkv.py",
        old=".tril(tokens - count)",
        new=".tril(tokens - count - 1)",
        tests="tests/test_compress.py -k 'formula and snapkv'",
    ),
    Bug(
        name="pooling across the edge of a block",
        file="compress/pool.py",
        old="F.max_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)",
        new="F.max_pool1d(F.pad(scores, (self.kernel // 2,) * 2), self.kernel, stride=1)",
        tests="tests/test_compress.py -k pooling",
    ),
    Bug(
        name="scoring with the first rows of the anchor instead of the question",
        file="parallel/passing.py",
        old="anchor_slice(first, last)]",
        new="anchor_slice(0, plan.query)]",
        tests="tests/test_apb_laws.py -k trace",
    ),
    Bug(
        name="a retaining head that reads the projections after RoPE",
        file="session.py",
        old="Projections(**found) if found",
        new="Projections(q=q, k=k, v=v) if found",
        tests="tests/test_hf.py -k 'before_rope and llama'",
    ),
    # What is passed.
    Bug(
        name="passing blocks in the wrong order of ranks",
        file="parallel/passing.py",
        old="self.plan.blocks[: block.index]:",
        new="self.plan.blocks[: block.index][::-1]:",
        tests="tests/test_passing.py -k 'documents_order'",
    ),
    Bug(
        name="the padding of a short share leaks into the passing block",
        file="parallel/passing.py",
        old="[:, :, first : first + earlier.kept_tokens]",
        new="[:, :, first:]",
        tests="tests/test_passing.py -k 'documents_order'",
    ),
    Bug(
        name="every layer reads the first layer's passing block",
        file="methods/apb.py",
        old="for message in passing.received(block)]",
        new="for message in vars(host).setdefault(f'_{block.index}', passing.received(block))]",
        tests="tests/test_hf.py -k 'session_equals and llama and anchor-contiguous'",
    ),
    # A split anchor.
    Bug(
        name="a split anchor put together in the order of ranks",
        file="parallel/passing.py",
        old="for span in sorted(pieces)",
        new="for span in pieces",
        tests="tests/test_passing.py -k 'documents_order'",
    ),
    Bug(
        name="what a block kept, read from the head of a message that begins with the anchor",
        file="parallel/passing.py",
        old="first = sender.anchor_rows if self.plan.split_anchor and slot == 0 else 0",
        new="first = 0",
        tests="tests/test_passing.py -k 'documents_order'",
    ),
    Bug(
        name="a share of the anchor whose rows see what follows it",
        file="methods/apb.py",
        old='"passing_tokens": far - near',
        new='"passing_tokens": 0',
        tests="tests/test_apb_laws.py -k splitting",
    ),
    Bug(
        name="a question inside a split anchor put together in the order of ranks",
        file="parallel/passing.py",
        old="for start in sorted(found)",
        new="for start in found",
        tests="tests/test_passing.py -k question",
    ),
    # What a row sees.
    Bug(
        name="mask off by one",
        file="reference.py",
        old="column[None, :] <= limit[:, None]",
        new="column[None, :] < limit[:, None]",
        tests="tests/test_apb_laws.py -k naive",
    ),
    Bug(
        name="a second block that does not see the anchor",
        file="methods/apb.py",
        old="seen = ka.shape[2] if block.sees_anchor else 0",
        new="seen = ka.shape[2] if block.sees_anchor and not outs else 0",
        tests="tests/test_apb_laws.py -k naive",
    ),
    Bug(
        name="a scale that the attention does not hear of",
        file="methods/method.py",
        old="passing_tokens=passing_tokens,\n                scale=context.scale,",
        new="passing_tokens=passing_tokens,",
        tests="tests/test_apb_laws.py -k scale",
    ),
    Bug(
        name="a square tail that is not causal",
        file="attend/sdpa.py",
        old="v[:, :, seen_by_all:], scale, causal=True)",
        new="v[:, :, seen_by_all:], scale, causal=False)",
        tests="tests/test_masked_attention.py -k 'equals and sdpa'",
    ),
    # The query, and what comes after it.
    Bug(
        name="the query causal on every host",
        file="parallel/decode.py",
        old="causal=host.rank == owner",
        new="causal=True",
        tests="tests/test_apb_laws.py -k running_query",
    ),
    Bug(
        name="the query's own keys counted on every host",
        file="methods/apb.py",
        old="if rank == plan.owner:\n            cached",
        new="if share.query_rows:\n            cached",
        tests="tests/test_apb_laws.py -k naive",
    ),
    Bug(
        name="a merge that averages",
        file="merge.py",
        old="torch.softmax(lses, dim=0)",
        new="torch.full_like(lses, 1 / len(lses))",
        tests="tests/test_merge.py -k 'partition and torch'",
    ),
    Bug(
        name="log-sum-exps to base 2",
        file="attend/sdpa.py",
        old="return out, lse[:, :, : q.shape[2]].float()",
        new="return out, lse[:, :, : q.shape[2]].float() * 1.4426950408889634",
        tests="tests/test_decode_attention.py -k 'equals and sdpa'",
    ),
    Bug(
        name="a cache that keeps the anchor",
        file="blocks.py",
        old="return (blocks, *(self.anchor_slice(*span) for span in self.kept_anchor))",
        new="return (slice(0, blocks.stop),)",
        tests="tests/test_hf.py -k exactly_the_hosts_blocks",
    ),
    Bug(
        name="the last host forgets the query's keys",
        file="session.py",
        old="[*share.held_spans, query] if owns else share.held_spans",
        new="share.held_spans",
        tests="tests/test_hf.py -k 'session_equals and llama and prefill-contiguous'",
    ),
    Bug(
        name="bytes to oneself counted as sent",
        file="costs.py",
        old="sent_bytes = sum((plan.hosts - 1) * tokens",
        new="sent_bytes = sum(plan.hosts * tokens",
        tests="tests/test_costs.py -k hosts_send",
    ),
)
