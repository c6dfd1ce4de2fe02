"""Ring Attention (arXiv 2310.01889): keys and values go round the hosts, and everybody attends to what passes by.

Exact. Contiguous, the last host works about twice as much as the mean; zigzag, where host r holds chunks r and
2H − 1 − r, all work alike, n(n + 1)/2H pairs each, and no step but the first needs a mask.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from apb.attend import Backend
from apb.context import Context
from apb.costs import HostCost, ModelShape, host_cost
from apb.merge import merge_into
from apb.methods.method import Method, check_choice
from apb.plan import ContextPlan, Layout, plan_context

__all__ = ["Ring"]


@dataclass(frozen=True, kw_only=True)
class Ring(Method):
    """Exact attention in H steps; the send of step t + 1 is under way while step t computes.

    Attributes:
        layout: "contiguous" blocks, or balanced "zigzag" ones.
    """

    exact: ClassVar[bool] = True
    differentiable: ClassVar[tuple[Backend, ...]] = ()  # what is exchanged has no gradient
    layout: Layout = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("layout", self.layout, get_args(Layout))

    @property
    def sends_under_attention(self) -> bool:
        """A step's send is under way while the step before it computes."""
        return True

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Cut one block a host, or two in zigzag; arguments and errors as `Method.plan`."""
        return plan_context(tokens=tokens, hosts=hosts, query=query, query_in="after", layout=self.layout)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend causally to the whole document, of which this host has some rows."""
        mine = self.share(q, k, v, context)
        steps = _ring(torch.cat((k, v), dim=-1), context)
        # This host's own keys first: its blocks are in the document's order, so one causal mask does for all of them.
        _, own = next(steps)
        out, lse = self.masked(q, *own.chunk(2, dim=-1), context)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        # Of the others, each of this host's blocks sees all blocks before it and nothing of the later ones.
        for source, message in steps:
            theirs = context.plan.host(source)
            seen = [sum(b.tokens for b in theirs.blocks if b.index < block.index) for block in mine.blocks]
            for rows, columns in _rectangles([block.tokens for block in mine.blocks], seen):
                k, v = message[:, :, :columns].chunk(2, dim=-1)
                part = self.full(q[:, :, rows], k, v, context)
                with context.trace.phase("merge"):
                    merge_into(out[:, :, rows], lse[:, :, rows], *part)
                del part  # before the next one is made
        return out.to(q.dtype)

    def cost(self, plan: ContextPlan, rank: int, shape: ModelShape) -> HostCost:
        """Count this host's rows against all before them, and H − 1 sends of the keys and values of H − 1 hosts."""
        seen = sum(b.tokens * b.start + b.tokens * (b.tokens + 1) // 2 for b in plan.host(rank).blocks)
        sent = sum(plan.host((rank - step) % plan.hosts).block_rows for step in range(plan.hosts - 1))
        return host_cost(
            plan, rank, shape, pairs=shape.heads * seen, sent_bytes=sent * shape.kv_bytes, messages=plan.hosts - 1
        )


def _ring(x: Tensor, context: Context) -> Generator[tuple[int, Tensor]]:
    """Yield (rank, that host's `x`), this host's own first; each goes on to the next host before it is yielded."""
    host, plan, n = context.host, context.plan, context.plan.hosts
    for step in range(n):
        source = (host.rank - step) % n
        coming = None
        if step < n - 1:
            shape = (*x.shape[:2], plan.host((source - 1) % n).block_rows, x.shape[3])
            coming = host.exchange(x, to=(host.rank + 1) % n, source=(host.rank - 1) % n, shape=shape, what="ring")
        yield source, x
        if coming is not None:
            with context.trace.phase("pass"):
                x = coming.wait()


def _rectangles(tokens: list[int], seen: list[int]) -> list[tuple[slice, int]]:
    """Join neighbouring runs of `tokens` rows that see as many keys: (rows, keys) of each, empty ones left out.

    >>> _rectangles([4, 4], [4, 4]), _rectangles([4, 4], [0, 8])
    ([(slice(0, 8, None), 4)], [(slice(4, 8, None), 8)])
    """
    found: list[tuple[slice, int]] = []
    start = 0
    for count, keys in zip(tokens, seen, strict=True):
        if count and keys:
            joins = bool(found) and found[-1][0].stop == start and found[-1][1] == keys
            first = found.pop()[0].start if joins else start
            found.append((slice(first, start + count), keys))
        start += count
    return found
