"""APB: anchor + passing blocks (arXiv 2502.12085). Plan, compress, pass, attend."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from apb.attend.check import DIFFERENTIABLE, Backend
from apb.compress.compressor import Candidates, Compressor, Document, Need, Projections
from apb.compress.query_aware import QueryAware
from apb.context import Context
from apb.costs import HostCost, ModelShape
from apb.methods.method import Method, check_choice, check_count
from apb.parallel.decode import start_attend_over_hosts
from apb.parallel.host import Handle
from apb.parallel.passing import PassingBlocks, gather_document, gather_query, query_spans
from apb.plan import ContextPlan, Layout, QueryIn, plan_context

__all__ = ["APB"]


@dataclass(frozen=True, kw_only=True)
class APB(Method):
    """Each host attends to the anchor, to what earlier hosts found worth passing, and to its own block.

    Attributes:
        anchor: l_a, document tokens in the anchor, ≥ 0; None is a quarter of a host's share, as in the paper at 128K,
            but not less than the prefix that the question must not precede.
        passing: l_p, tokens each block passes on, ≥ 0; None is an eighth of a block, as in the paper at 128K.
        compressor: chooses those tokens.
        query_in: whether the query sits in the "anchor" (the paper), runs along with the "prefill" (Spava), or comes
            "after" it (the caches then serve any question).
        layout: "contiguous" (the paper) or "zigzag" blocks.
        split_anchor: every host runs a share of the anchor's rows, where the paper runs all of them on every host; the
            mathematics is the same.
        backend: who computes the attention.
    """

    differentiable: ClassVar[tuple[Backend, ...]] = DIFFERENTIABLE

    anchor: int | None = None
    passing: int | None = None
    compressor: Compressor = field(default_factory=QueryAware)
    query_in: QueryIn = "anchor"
    layout: Layout = "contiguous"
    split_anchor: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("anchor", self.anchor)
        check_count("passing", self.passing)
        check_choice("layout", self.layout, get_args(Layout))
        if not isinstance(self.split_anchor, bool):
            raise ValueError(f"split_anchor: expected True or False, got {self.split_anchor!r}")
        check_choice("query_in", self.query_in, get_args(QueryIn))
        if not isinstance(self.compressor, Compressor):
            raise ValueError(f"compressor: expected a Compressor such as QueryAware(), got {self.compressor!r}")

    @property
    def needs(self) -> frozenset[Need]:
        """What the compressor reads beside q, k and v."""
        return self.compressor.needs

    @property
    def sends_under_attention(self) -> bool:
        """In zigzag: gather 2 runs under the first block's attention, gather 1 under the second block's compressor."""
        return self.layout == "zigzag"

    def prepare(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> "APB":
        """Prepare the compressor."""
        return replace(self, compressor=self.compressor.prepare(shape, device, dtype))

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Split `tokens` document tokens over `hosts` hosts; arguments and errors as `plan_context`.

        Raises:
            ValueError: also when the compressor reads the question and the plan would hold it nowhere.
        """
        blocks = max(1, hosts) * (2 if self.layout == "zigzag" else 1)
        block = -(-tokens // blocks)
        anchor, passing = self.anchor, block // 8 if self.passing is None else self.passing
        if anchor is None:
            anchor = max(-(-tokens // max(1, hosts)) // 4, query_offset) if blocks > 1 else 0
            if anchor > block:
                raise ValueError(
                    f"hosts: a block of {block} tokens is shorter than the {query_offset} tokens of the prefix, which "
                    f"the anchor must hold; use fewer hosts or a longer document, or give an anchor and "
                    f"query_in='prefill' or 'after'"
                )
        return plan_context(
            tokens=tokens,
            hosts=hosts,
            anchor=anchor,
            passing=passing,
            query=query,
            query_offset=query_offset,
            query_in=self.query_in,
            anchor_on_first=self.reads_query(anchor, passing, query, blocks) and self.query_in == "anchor",
            layout=self.layout,
            split_anchor=self.split_anchor,
        )

    def reads_query(self, anchor: int, passing: int, query: int, blocks: int) -> bool:
        """Say whether the compressor will read the question.

        Raises:
            ValueError: it would, and the plan would hold the question nowhere.
        """
        if "query" not in self.needs or blocks == 1 or passing == 0:
            return False
        if not query or self.query_in == "after" or (self.query_in == "anchor" and anchor == 0):
            raise ValueError(
                f"query: {type(self.compressor).__name__} reads the question, but there are {query} query tokens, "
                f"query_in={self.query_in!r} and an anchor of {anchor}; give both, or let the question run along "
                f"(query_in='prefill'), or use a compressor that does without it (SnapKV(), KeyNorm(), RetainingHead)"
            )
        return True

    def cost(self, plan: ContextPlan, rank: int, shape: ModelShape) -> HostCost:
        """Count the plan's rows and messages, and the question's vectors where a split anchor leaves them apart."""
        cost = super().cost(plan, rank, shape)
        embedded = plan.anchor_rows > plan.anchor and plan.split_anchor
        if not ("query" in self.needs and embedded and _chooses(plan)):
            return cost
        longest = max(sum(stop - start for start, stop in spans) for spans in query_spans(plan))
        sent = (plan.hosts - 1) * longest * shape.heads * shape.head_dim * shape.bytes_per_value
        return replace(cost, sent_bytes=cost.sent_bytes + sent, messages=cost.messages + 1)

    def check_plan(self, plan: ContextPlan) -> None:
        """Take any plan without a shared prefix: who passes what to whom follows from it."""
        if plan.shared_prefix:
            raise ValueError("plan: APB takes no shared prefix; make the plan with this method's plan(…)")

    def attend(
        self,
        q: Float[Tensor, "batch q_heads rows dim"],
        k: Float[Tensor, "batch kv_heads rows dim"],
        v: Float[Tensor, "batch kv_heads rows dim"],
        context: Context,
    ) -> Float[Tensor, "batch q_heads rows dim"]:
        """Run one layer's attention on this host's rows [anchor, blocks …, running query].

        Args:
            q, k, v: after RoPE at the plan's positions; as many rows as the plan gives this host.
            context: the plan, the host and the layer.

        Raises:
            ValueError: the rows are not the plan's, or what the compressor reads is missing.
            HostFailed: another host failed.
        """
        plan, host, trace = context.plan, context.host, context.trace
        share = self.share(q, k, v, context)
        self._check_needs(context)
        passing = PassingBlocks(plan, host)
        with trace.phase("compress"):
            candidates = self._candidates(q, k, v, context)
            anchor = None
            if plan.split_anchor:
                anchor = torch.cat([x[:, :, : share.anchor_rows] for x in (k, v)], dim=-1)
            for slot, block in enumerate(share.blocks):
                kept = self.compressor.compress(candidates[slot], block.kept_tokens, watch=context.watch)
                passing.start(slot, kept.message, anchor=anchor)
                if trace.keeps(context.layer):
                    trace.kept[context.layer, block.index] = kept.indices + block.start + block.skipped
        running = self._start_query(q, k, v, context) if share.query_rows else None

        outs, (ka, va) = self._attend_anchor(q, k, v, passing, context)
        for block, span in zip(share.blocks, share.block_spans, strict=True):
            seen = ka.shape[2] if block.sees_anchor else 0
            with trace.phase("pass"):
                received = [message.chunk(2, dim=-1) for message in passing.received(block)]
                keys, values = (
                    torch.cat((anchor[:, :, :seen], *parts, mine[:, :, span]), dim=2)
                    for anchor, parts, mine in zip((ka, va), zip(*received, strict=True), (k, v), strict=True)
                )
            # The anchor's rows ride with the first block that sees them, unless they have attended already.
            rows = q[:, :, 0 if seen and not outs else span.start : span.stop]
            passed = keys.shape[2] - seen - block.tokens
            outs.append(self.masked(rows, keys, values, context, anchor_tokens=seen, passing_tokens=passed)[0])
        with trace.phase("pass"):
            passing.finish()
            if running is not None:
                outs.append(running.wait())
            return outs[0] if len(outs) == 1 else _join(outs)

    def _attend_anchor(
        self, q: Tensor, k: Tensor, v: Tensor, passing: PassingBlocks, context: Context
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Let anchor rows attend that ride with no block; return their output, and the whole anchor's K and V."""
        share = context.plan.host(context.host.rank)
        if not context.plan.split_anchor:
            anchor = slice(0, share.anchor_rows)
            ka, va = k[:, :, anchor], v[:, :, anchor]
            alone = share.anchor_rows and not share.blocks[0].sees_anchor  # they run for the sake of others
            return [self.masked(q[:, :, anchor], ka, va, context)[0]] if alone else [], (ka, va)
        with context.trace.phase("pass"):
            ka, va = passing.anchor().chunk(2, dim=-1)
        if not share.anchor_spans:
            return [], (ka, va)
        # Two spans are APB's mask: the first is causal, the second sees it, what lies between (passing), and itself.
        (_, near), (far, stop) = share.anchor_spans[0], share.anchor_spans[-1]
        spans = {"anchor_tokens": near, "passing_tokens": far - near} if far >= near else {}
        rows = q[:, :, : share.anchor_rows]
        return [self.masked(rows, ka[:, :, :stop], va[:, :, :stop], context, **spans)[0]], (ka, va)

    def _check_needs(self, context: Context) -> None:
        """Check that every host has what the compressor reads; the outcome is the same on all of them."""
        plan, name = context.plan, type(self.compressor).__name__
        if not _chooses(plan):
            return
        inside = plan.query_in == "anchor" and plan.anchor and plan.anchor_on_first
        if "query" in self.needs and not (plan.query and (inside or plan.query_in == "prefill")):
            raise ValueError(
                f"plan: {name} reads the question's vectors on every host, but this plan has query={plan.query}, "
                f"anchor={plan.anchor} and anchor_on_first={plan.anchor_on_first}; let the method make the plan "
                f"(APB(compressor=…).plan(…)), or plan with anchor_on_first=True or query_in='prefill'"
            )
        if "projections" in self.needs and context.projections is None:
            raise ValueError(
                f"context.projections: {name} reads q, k and v before RoPE, got None; give "
                f"Context(projections=Projections(…)), as Session does for Hugging Face models"
            )

    def _candidates(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> list[Candidates]:
        """Say what each of this host's blocks offers to the compressor."""
        plan, host, share = context.plan, context.host, context.plan.host(context.host.rank)
        query = None
        if "query" in self.needs and share.query_rows:
            query = q[:, :, -share.query_rows :]
        elif "query" in self.needs and plan.anchor_rows > plan.anchor and _chooses(plan):
            query = gather_query(q, plan, host)
        everything = {}
        if "document" in self.needs:
            everything = {"q": gather_document(q, plan, host), "k": gather_document(k, plan, host)}
        found = []
        for block, span in zip(share.blocks, share.block_spans, strict=True):
            # The last block passes nothing on; the first leaves out what later blocks see as anchor.
            rows = slice(span.start + block.skipped, span.stop) if block.kept_tokens else slice(0, 0)
            p = context.projections
            found.append(
                Candidates(
                    q=q[:, :, rows],
                    k=k[:, :, rows],
                    v=v[:, :, rows],
                    layer=context.layer,
                    block=block.index,
                    scale=context.scale,
                    query=query,
                    projections=p and Projections(q=p.q[:, :, rows], k=p.k[:, :, rows], v=p.v[:, :, rows]),
                    document=Document(**everything, start=block.start + block.skipped, later=block.stop)
                    if everything
                    else None,
                )
            )
        return found

    def _start_query(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Handle[Tensor]:
        """Let the running query attend to all hosts' blocks; its own keys belong to the document's last host."""
        plan, rank = context.plan, context.host.rank
        share = plan.host(rank)
        cached, own = sorted(share.held_spans, key=lambda span: span.start), 0
        if rank == plan.owner:
            cached.append(slice(share.rows - share.query_rows, share.rows))
            own = share.query_rows * (share.query_rows + 1) // 2
        context.trace.count_pairs(context.layer, q.shape[1] * (share.query_rows * share.held_rows + own))
        return start_attend_over_hosts(
            q[:, :, -share.query_rows :],
            _runs(k, cached),
            _runs(v, cached),
            context.host,
            owner=plan.owner,
            scale=context.scale,
            backend=self.dense_backend,
        )


def _join(outs: list[Tensor]) -> Tensor:
    """Join outputs row after row, a row's heads side by side in memory, as kernels leave them and models take them."""
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)


def _runs(x: Tensor, spans: list[slice]) -> Tensor:
    """Return these runs of rows, one after the other; as a view if they are neighbours."""
    if all(a.stop == b.start for a, b in pairwise(spans)):
        return x[:, :, spans[0].start : spans[-1].stop]
    return torch.cat([x[:, :, span] for span in spans], dim=2)


def _chooses(plan: ContextPlan) -> bool:
    """Whether any block passes on some of its tokens and not others, so that a compressor has to score them."""
    return any(0 < block.kept_tokens < block.tokens - block.skipped for block in plan.blocks)
