"""Hypothesis strategies: legal plans of every shape, and peaked attention inputs drawn from a seed."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from apb.plan import ContextPlan, plan_context

__all__ = ["HEADS", "SEEDS", "Rows", "peaked", "plan_arguments", "plans", "stream_rows"]

SEEDS = st.integers(0, 2**31)
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2)])
"""(query heads, KV heads)."""
LAYOUTS = ("contiguous", "zigzag")
QUERY_INS = ("anchor", "prefill")

Rows = tuple[Tensor, Tensor, Tensor]
"""q, k and v of the same rows, `[batch, heads, rows, dim]`."""


@st.composite
def plan_arguments(
    draw: st.DrawFn,
    *,
    max_tokens: int = 60,
    max_hosts: int = 5,
    min_hosts: int = 1,
    layouts: tuple[str, ...] = LAYOUTS,
    query_ins: tuple[str, ...] = QUERY_INS,
    min_query: int = 0,
    max_query: int = 5,
) -> dict[str, Any]:
    """Draw legal arguments of `plan_context`: uneven blocks, more hosts than tokens, nothing passed, no anchor."""
    hosts = draw(st.integers(min_hosts, max_hosts))
    layout, query_in = draw(st.sampled_from(layouts)), draw(st.sampled_from(query_ins))
    blocks = hosts * (2 if layout == "zigzag" else 1)
    block = draw(st.integers(1, max(1, max_tokens // blocks)))
    tokens = block * blocks - draw(st.integers(0, blocks - 1))  # so block = ceil(tokens / blocks)
    query = draw(st.integers(min_query, max_query))
    room = block - query if query_in == "anchor" else block
    anchor = draw(st.integers(0, max(0, room)))
    ignored = 0 if anchor and query and query_in == "anchor" else 3  # the offset of a query that is not in the anchor
    return {
        "tokens": tokens,
        "hosts": hosts,
        "anchor": anchor,
        "passing": draw(st.integers(0, block + 2)),
        "query": query,
        "query_offset": draw(st.integers(0, anchor + ignored)),
        "query_in": query_in,
        "anchor_on_first": draw(st.booleans()),
        "layout": layout,
    }


def plans(**limits: Any) -> st.SearchStrategy[ContextPlan]:
    """Draw a plan; arguments as `plan_arguments`."""
    return plan_arguments(**limits).map(lambda arguments: plan_context(**arguments))


@dataclass(frozen=True, kw_only=True)
class Streams:
    """One layer's rows before they are split: the anchor (the same on all hosts), the document, the running query."""

    anchor: Rows
    document: Rows
    query: Rows


def peaked(
    seed: int,
    tokens: int,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Draw q, k, v with scores in the tens: even attention would hide mistakes of mask, order and merge."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, tokens, dim, generator=generator, dtype=dtype) for h in (heads[0], *heads[1:] * 2))
    return 6 * q, k, v


def stream_rows(plan: ContextPlan, seed: int, **sizes: Any) -> Streams:
    """Draw one layer's rows for every stream of `plan`; `sizes` as `peaked`."""
    drawn = peaked(seed, plan.anchor_rows + plan.tokens + plan.query, **sizes)
    lengths = [plan.anchor_rows, plan.tokens, plan.query]
    q, k, v = (x.split(lengths, dim=2) for x in drawn)
    return Streams(anchor=(q[0], k[0], v[0]), document=(q[1], k[1], v[1]), query=(q[2], k[2], v[2]))


def host_rows(plan: ContextPlan, rank: int, streams: Streams, which: Literal[0, 1, 2]) -> Tensor:
    """Return q (0), k (1) or v (2) of the rows that host `rank` runs."""
    share = plan.host(rank)
    parts = [streams.anchor[which][:, :, : share.anchor_rows]]
    parts += [streams.document[which][:, :, block.start : block.stop] for block in share.blocks]
    parts.append(streams.query[which][:, :, : share.query_rows])
    return torch.cat(parts, dim=2)
