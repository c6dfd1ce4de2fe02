"""Measure how much of APB's sending hides under its computing: one layer's attention, on all GPUs of this machine.

Three times per layout and length, each the slowest host's: the layer as it is, the same without sending anything, and
its messages alone. Then layers under PyTorch's profiler: which kernels the gathers really run beside.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.bench import Row, append
from apb.bench.hosts import Heads, Times, draw, find_hosts, print_head, report, time_layer
from apb.bench.prefill.methods import QUERY_TOKENS, RandomHead
from apb.bench.timeline import timeline
from apb.bench.trace import Span, read_spans, write_spans
from apb.compress import Projections
from apb.compress.nan import NanWatch
from apb.context import Context
from apb.costs import LLAMA_3_1_8B
from apb.methods import APB
from apb.parallel import Host, run_processes
from apb.parallel.lone import LoneHost

__all__ = ["LAYOUTS", "plot", "run"]

HEADS = Heads(LLAMA_3_1_8B.heads, LLAMA_3_1_8B.kv_heads, LLAMA_3_1_8B.head_dim)
TOKENS = (32768, 131072)
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "zigzag": {"layout": "zigzag"},
    "balanced": {"layout": "zigzag", "split_anchor": True},
}
"""Settings by name. In zigzag each host gathers twice a layer; balanced, every host runs a share of the anchor, too."""


def run(
    quick: bool = False,
    out: Path | None = None,
    *,
    heads: Heads = HEADS,
    tokens: tuple[int, ...] = TOKENS,
    hosts: int | None = None,
) -> list[Row]:
    """Measure, print a table, extend the ledger; the trace of the last case goes into a file beside the ledger.

    Args:
        quick: leave out the longest document.
        out: CSV file to append to, made if it is not there; None writes nothing.
        heads: sizes of the layer's attention.
        tokens: lengths of the documents, rising.
        hosts: as in `find_hosts`.

    Raises:
        RuntimeError: fewer than two CUDA devices.
    """
    count, transport, env = find_hosts("overlap", hosts)
    print_head(env, count, transport, heads)
    cases = [(layout, length) for length in tokens[: 1 if quick else None] for layout in LAYOUTS]
    times, flops, spans = run_processes(count, _measure, cases, heads, backend=transport)[-1]
    rows = []
    for (layout, length), found, flop in zip(cases, times, flops, strict=True):
        rows += report(env, "overlap", layout, length, count, found, flop)
    layout, length = cases[-1]
    if out is not None:
        append(out, rows)
        write_spans(trace_beside(out), env, f"{layout} {length} on {count}", spans)
    return rows


def plot(out: Path, path: Path) -> Path:
    """Draw the newest trace beside a ledger.

    Args:
        out: the ledger that `run` has extended.
        path: where to; ends in .svg, .png or .pdf.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no trace there, another ending, or no such folder.
    """
    line, spans = read_spans(trace_beside(out))
    versions = f"{line.device}, torch {line.torch}, triton {line.triton}, {line.commit}, {line.date}"
    return timeline(spans, path, title=f"APB, one layer's attention on the last host, {line.case} hosts\n{versions}")


def trace_beside(ledger: Path) -> Path:
    """Return the file of traces that belongs to a ledger."""
    return ledger.with_name("overlap_trace.csv")


class _Noting(LoneHost):
    """Sends nothing, and notes what it was to gather."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.rank, host.world_size, host.device)
        self.gathered: list[tuple[Tensor, str]] = []

    def _start_all_gather(self, x: Tensor, what: str) -> Callable[[], list[Tensor]]:
        self.gathered.append((x, what))
        return super()._start_all_gather(x, what)


class _Layer:
    """One layer's attention on random rows of one host; calling it with a host runs it.

    As in the paper, the anchor is a quarter of a host's share of the document, an eighth is passed on, and a retaining
    head (with random weights) chooses it.
    """

    def __init__(self, host: Host, layout: str, tokens: int, heads: Heads) -> None:
        self.shape = replace(LLAMA_3_1_8B, heads=heads.q_heads, kv_heads=heads.kv_heads, head_dim=heads.dim, layers=1)
        apb = APB(anchor=tokens // host.world_size // 4, compressor=RandomHead(), **LAYOUTS[layout])
        self.plan = apb.plan(tokens=tokens, hosts=host.world_size, query=QUERY_TOKENS)
        self.q, self.k, self.v = draw(heads, self.plan.host(host.rank).rows, host)
        self.method = apb.prepare(self.shape, host.device, self.q.dtype)

    @torch.inference_mode()
    def __call__(self, host: Host) -> Tensor:
        # The watch is never asked: without one, or asked here, the host would wait for the device before it sends.
        context = Context(self.plan, host, projections=Projections(q=self.q, k=self.k, v=self.v), watch=NanWatch())
        return self.method.attend(self.q, self.k, self.v, context)

    @property
    def flop(self) -> int:
        """All hosts' operations."""
        return sum(self.method.cost(self.plan, rank, self.shape).attention_flops for rank in range(self.plan.hosts))


def _measure(host: Host, cases: list[tuple[str, int]], heads: Heads) -> tuple[list[Times], list[int], list[Span]]:
    """Return each case's times and all hosts' operations, and what the last host's GPU did in the last case.

    In zigzag both blocks of that host choose what to pass; the second block of rank 0 has nobody to pass to.
    """
    times, flops, spans = [], [], []
    for layout, tokens in cases:
        layer = _Layer(host, layout, tokens, heads)
        found, spans = _measure_one(host, layer)
        times.append(found)
        flops.append(layer.flop)
    return times, flops, spans


def _measure_one(host: Host, layer: _Layer) -> tuple[Times, list[Span]]:
    noting = _Noting(host)
    layer(noting)

    def send() -> None:
        for x, what in noting.gathered:
            host.all_gather(x, what=what).wait()

    silent = LoneHost(host.rank, host.world_size, host.device)
    return time_layer(partial(layer, host), partial(layer, silent), send, host)
