"""DeepSpeed-Ulysses (arXiv 2309.14509): swap sequence shards for heads, attend exactly, swap back.

Before attention every host has all heads of its rows; in it, all rows of its heads. Two all-to-all messages a layer.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apb.attend import Backend
from apb.context import Context
from apb.costs import HostCost, ModelShape, host_cost
from apb.methods.method import Method
from apb.plan import ContextPlan, plan_context

__all__ = ["HeadShare", "Ulysses", "split_heads"]


@dataclass(frozen=True, kw_only=True)
class HeadShare:
    """The heads that one host attends with.

    Attributes:
        q: its query heads.
        kv: the KV heads that those read; two hosts may read the same one.
        reads: for each of its query heads, which of `kv` it reads.
    """

    q: slice
    kv: slice
    reads: tuple[int, ...]

    @property
    def q_heads(self) -> int:
        """How many query heads."""
        return self.q.stop - self.q.start

    @property
    def kv_heads(self) -> int:
        """How many KV heads."""
        return self.kv.stop - self.kv.start

    @property
    def even(self) -> bool:
        """Whether each KV head is read by as many query heads, side by side, as attention kernels take them."""
        group = self.q_heads // max(1, self.kv_heads)
        return self.reads == tuple(head // max(1, group) for head in range(self.q_heads))


def split_heads(q_heads: int, kv_heads: int, hosts: int) -> list[HeadShare]:
    """Deal the query heads out in order, as evenly as they go, with the KV heads that they read.

    Any counts will do: fewer KV heads than hosts (a KV head then goes to several hosts), heads that the hosts do not
    divide (the first hosts get one more), fewer heads than hosts (the last hosts get none).
    """
    group, shares = q_heads // kv_heads, []
    for rank in range(hosts):
        first, last = (r * (q_heads // hosts) + min(r, q_heads % hosts) for r in (rank, rank + 1))
        read = [head // group for head in range(first, last)]
        kv = slice(read[0], read[-1] + 1) if read else slice(0, 0)
        shares.append(HeadShare(q=slice(first, last), kv=kv, reads=tuple(head - kv.start for head in read)))
    return shares


@dataclass(frozen=True, kw_only=True)
class Ulysses(Method):
    """Exact attention on contiguous blocks; each host attends with its share of the heads over the whole document."""

    exact: ClassVar[bool] = True
    differentiable: ClassVar[tuple[Backend, ...]] = ()  # what is exchanged has no gradient

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Cut one block a host; arguments and errors as `Method.plan`."""
        return plan_context(tokens=tokens, hosts=hosts, query=query, query_in="after")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend causally to the whole document, of which this host has some rows."""
        plan, host, trace = context.plan, context.host, context.trace
        self.share(q, k, v, context)
        heads = split_heads(q.shape[1], k.shape[1], plan.hosts)
        mine, (batch, _, _, dim) = heads[host.rank], q.shape
        rows = [share.block_rows for share in plan.host_plans]

        with trace.phase("pass"):
            parts = [torch.cat((q[:, s.q], k[:, s.kv], v[:, s.kv]), dim=1) for s in heads]
            shapes = [(batch, mine.q_heads + 2 * mine.kv_heads, count, dim) for count in rows]
            whole = torch.cat(host.all_to_all(parts, shapes=shapes, what="ulysses").wait(), dim=2)
        q, k, v = whole.split((mine.q_heads, mine.kv_heads, mine.kv_heads), dim=1)
        if not mine.even:
            k, v = k[:, list(mine.reads)], v[:, list(mine.reads)]  # a copy of each head that is read out of step
        out = self.masked(q, k, v, context)[0] if mine.q_heads else q

        with trace.phase("pass"):
            back = list(out.split(rows, dim=2))
            shapes = [(batch, s.q_heads, rows[host.rank], dim) for s in heads]
            return torch.cat(host.all_to_all(back, shapes=shapes, what="ulysses").wait(), dim=1)

    def cost(self, plan: ContextPlan, rank: int, shape: ModelShape) -> HostCost:
        """Count all pairs for this host's heads, and its rows' heads out and its heads' rows back."""
        heads, rows = split_heads(shape.heads, shape.kv_heads, plan.hosts), plan.host(rank).block_rows
        mine = heads[rank]
        out = sum(rows * (s.q_heads + 2 * s.kv_heads) for r, s in enumerate(heads) if r != rank)
        back = (plan.tokens - rows) * mine.q_heads
        return host_cost(
            plan,
            rank,
            shape,
            pairs=mine.q_heads * plan.tokens * (plan.tokens + 1) // 2,
            sent_bytes=(out + back) * shape.head_dim * shape.bytes_per_value,
            messages=2,
        )
