"""Hypothesis strategies: legal plans of every shape, and peaked attention inputs drawn from a seed.

And the methods: any of them with its plan, run on raw tensors over hosts of any kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from apb.compress import KeyNorm
from apb.context import Context, Trace
from apb.methods import APB, APE, Flash, Method, Ring, Spava, Star, Ulysses
from apb.parallel import Host, run_threads
from apb.plan import ContextPlan, plan_context

__all__ = [
    "EXACT_METHODS",
    "HEADS",
    "METHOD_NAMES",
    "ODD_HEADS",
    "SEEDS",
    "Rows",
    "document_rows",
    "held_rows",
    "lse_rounding",
    "method_plans",
    "peaked",
    "plan_arguments",
    "plans",
    "prefill_document",
    "stream_rows",
]

SEEDS = st.integers(0, 2**31)
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2)])
"""(query heads, KV heads)."""
ODD_HEADS = st.sampled_from([(1, 1), (4, 2), (6, 1), (9, 3), (5, 5)])
"""(query heads, KV heads), also such as no host count divides."""
EXACT_METHODS = ("flash", "ring", "ring-zigzag", "ulysses")
METHOD_NAMES = (*EXACT_METHODS, "star", "ape", "apb", "spava")
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
        "split_anchor": draw(st.booleans()),
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
    q, k, v = (list(x.split(lengths, dim=2)) for x in drawn)
    if plan.shared_prefix:  # the anchor is the document's start, not a copy of it with the question inside
        for x in (q, k, v):
            x[0] = x[1][:, :, : plan.anchor]
    return Streams(anchor=(q[0], k[0], v[0]), document=(q[1], k[1], v[1]), query=(q[2], k[2], v[2]))


def host_rows(plan: ContextPlan, rank: int, streams: Streams, which: Literal[0, 1, 2]) -> Tensor:
    """Return q (0), k (1) or v (2) of the rows that host `rank` runs."""
    share = plan.host(rank)
    parts = [streams.anchor[which][:, :, start:stop] for start, stop in share.anchor_spans]
    parts += [streams.document[which][:, :, block.start : block.stop] for block in share.blocks]
    parts.append(streams.query[which][:, :, : share.query_rows])
    return torch.cat(parts, dim=2)


@st.composite
def method_plans(
    draw: st.DrawFn,
    names: tuple[str, ...] = METHOD_NAMES,
    *,
    max_tokens: int = 40,
    max_hosts: int = 6,
    max_query: int = 4,
) -> tuple[Method, ContextPlan]:
    """Draw a method without a question in its anchor, and its plan: one token, more hosts than tokens, odd ends."""
    name = draw(st.sampled_from(names))
    tokens, hosts = draw(st.integers(1, max_tokens)), 1 if name == "flash" else draw(st.integers(1, max_hosts))
    layout = draw(st.sampled_from(LAYOUTS)) if name in ("apb", "spava") else "contiguous"
    block = -(-tokens // (hosts * (2 if layout == "zigzag" else 1)))
    most = {"star": block, "apb": block, "ape": tokens, "spava": tokens}.get(name, 0)
    anchor = draw(st.integers(0, most))
    method: Method
    if name == "star":
        method = Star(anchor=draw(st.sampled_from([None, anchor])))
    elif name == "ape":
        factors = st.sampled_from([0.3, 0.9, 1.0, 1.7])
        method = APE(prefix=anchor, temperature=draw(factors), scale=draw(factors))
    elif name in ("apb", "spava"):
        passing, split, make = draw(st.integers(0, block + 2)), draw(st.booleans()), Spava if name == "spava" else APB
        method = make(
            anchor=anchor, passing=passing, compressor=KeyNorm(), query_in="after", layout=layout, split_anchor=split
        )
    else:
        make: dict[str, Method] = {"flash": Flash(), "ring": Ring(), "ring-zigzag": Ring(layout="zigzag")}
        method = make.get(name, Ulysses())
    return method, method.plan(tokens=tokens, hosts=hosts, query=draw(st.integers(0, max_query)))


def document_rows(plan: ContextPlan, rank: int, x: Tensor) -> Tensor:
    """Return the rows that host `rank` runs, out of the document's `[batch, heads, tokens, dim]`."""
    assert plan.anchor_rows == plan.anchor, "a question in the anchor is not in the document"
    share = plan.host(rank)
    spans = [*share.anchor_spans, *((block.start, block.stop) for block in share.blocks)]
    return torch.cat([x[:, :, start:stop] for start, stop in spans], dim=2)


def held_rows(plan: ContextPlan, rank: int, x: Tensor) -> Tensor:
    """Return what host `rank` keeps after the prefill, out of the document's `[batch, heads, tokens, dim]`."""
    return torch.cat([x[:, :, start:stop] for start, stop in plan.host(rank).held_tokens], dim=2)


def prefill_document(
    method: Method,
    plan: ContextPlan,
    rows: Rows,
    runner: Callable[..., list[Any]] = run_threads,
    *,
    scale: float | None = None,
) -> tuple[Tensor, list[Tensor], list[tuple[int, dict[str, int], dict[str, int]]]]:
    """Run one layer of `method` on the document's q, k and v.

    Returns:
        The document's outputs in its order; the anchor's, of each host that runs some of it; and by rank what was
        counted: pairs, and the bytes and messages by name.
    """

    def body(host: Host) -> tuple[Tensor, tuple[int, dict[str, int], dict[str, int]]]:
        trace = Trace(counted=True)
        q, k, v = (document_rows(plan, host.rank, x) for x in rows)
        out = method.attend(q, k, v, Context(plan, host, scale=scale, trace=trace))
        return out, (trace.pairs.get(0, 0), dict(host.counters.sent_bytes), dict(host.counters.messages))

    results = runner(plan.hosts, body)
    held, anchors = [], []
    for (out, _), share in zip(results, plan.host_plans, strict=True):
        held.append(torch.cat([out[:, :, span] for span in share.held_spans], dim=2))
        if share.anchor_rows:
            anchors.append(out[:, :, : share.anchor_rows])
    return plan.join(held, dim=2), anchors, [counted for _, counted in results]


def lse_rounding(lse: Tensor, v: Tensor, parts: int) -> dict[str, float]:
    """Return the tolerance that float32 LSEs cost a merge of `parts` parts in float64, as `assert_close` takes it.

    Rounding l to float32 changes its part's weight by a factor of 1 ± 2⁻²⁴ · |l|, and so the mean of values by at most
    twice that times max|v|. Partial results travel in float32, too, which is another 2⁻²⁴ · max|v| each.
    """
    size = float(lse[lse.isfinite()].abs().max()) if lse.isfinite().any() else 0.0
    return {"atol": 1e-12 + parts * (2 * size + 1) * 2.0**-24 * float(v.abs().max()), "rtol": 0}
