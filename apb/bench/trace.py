"""What a GPU did while hosts ran one layer: kernels and copies by stream, and how much of the sending hides.

    spans = profile(call, host)         # every host calls it, one looks: kind, stream, start and duration of each
    gather_ms(spans), hidden(spans)     # how long gathers ran, and in which share of that something else ran, too
    write_spans(path, env, case, spans)
    line, spans = read_spans(path)      # the newest run's

`apb.bench.timeline` draws them.
"""

import gzip
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from apb.bench import Environment, append, read_rows
from apb.bench.clock import SPIN, await_device, queue_ahead
from apb.parallel import Host

__all__ = [
    "Interval", "Kind", "Span", "SpanRow", "common", "gather_ms", "hidden", "profile", "read_spans", "union",
    "write_spans",
]  # fmt: skip

Interval = tuple[float, float]

Kind = Literal["select", "attend", "gather", "copy", "other"]
"""Choosing what is passed; attention; collectives; moving data on the device; anything else."""

_WORDS: dict[Kind, tuple[str, ...]] = {  # the first kind of which a word stands in the name
    "gather": ("nccl",),
    "attend": ("flash", "fmha", "attention", "decode", "merge"),
    "copy": ("memcpy", "memset", "catarray", "copy"),
    "select": ("score", "select", "gather", "retaining_head", "topk", "sort", "pool"),
}
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True)
class Span:
    """One kernel or copy.

    Attributes:
        stream: number of the CUDA stream it ran on.
        kind: what it was for.
        name: of the kernel, at most 80 characters.
        start_us: when it began, in microseconds from the first one's beginning.
        us: how long it took.
    """

    stream: int
    kind: Kind
    name: str
    start_us: float
    us: float

    @property
    def stop_us(self) -> float:
        """When it ended."""
        return self.start_us + self.us


@dataclass(frozen=True, kw_only=True)
class SpanRow:
    """A span as a line of a CSV file, in nanoseconds; the first columns are those of `apb.bench.Row`."""

    date: str
    device: str
    torch: str
    triton: str
    commit: str
    case: str
    stream: int
    kind: str
    name: str
    start_ns: int
    ns: int

    @property
    def run(self) -> tuple[str, ...]:
        """What the lines of one run share."""
        return self.date, self.device, self.torch, self.triton, self.commit, self.case


def profile(call: Callable[[], object], host: Host, *, rank: int = 0) -> list[Span]:
    """Return what the device of host `rank` did in `call`, which all hosts make together; nothing on the others.

    They make it twice, since the profiler warms up in the first one. In the second one this host queues all of its
    work before its device begins: so it comes last, and its gathers show what sending takes, and hardly any waiting for
    others or for Python.
    """
    activity = torch.profiler.ProfilerActivity
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        looking = torch.profiler.profile(
            activities=[activity.CPU, *([activity.CUDA] if host.device.type == "cuda" else [])],
            schedule=torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            acc_events=True,  # or it warns that it keeps one step's events, which is all that there is
        )
        with looking if host.rank == rank else nullcontext() as profiler:
            call()
            await_device(host.device)
            host.all_gather_object(None, what="start")
            if profiler is not None:
                profiler.step()
                queue_ahead(host.device)
            call()
            await_device(host.device)
        if profiler is None:
            return []
        with gzip.open(path, "rt") as file:
            return spans_of(json.load(file))


def spans_of(trace: dict[str, Any]) -> list[Span]:
    """Reduce a Chrome trace of PyTorch's profiler to what ran on the device in its last step, by start."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = [float(event["ts"]) for event in events if str(event["name"]).startswith("ProfilerStep#")]
    began = max(steps, default=-math.inf)
    events = [event for event in events if event.get("cat") in _ON_DEVICE and float(event["ts"]) >= began]
    events = [event for event in events if SPIN not in event["name"]]
    first = min((float(event["ts"]) for event in events), default=0.0)
    found = [
        Span(
            stream=int(event["args"]["stream"]),
            kind=kind_of(event["name"]),
            name=event["name"][:80],
            start_us=float(event["ts"]) - first,
            us=float(event["dur"]),
        )
        for event in events
    ]
    return sorted(found, key=lambda span: span.start_us)


def kind_of(name: str) -> Kind:
    """Return the kind of a kernel.

    >>> kind_of("ncclDevKernel_AllGather_RING_LL"), kind_of("gather_kernel"), kind_of("Memcpy DtoD")
    ('gather', 'select', 'copy')
    """
    low = name.lower()
    return next((kind for kind, words in _WORDS.items() if any(word in low for word in words)), "other")


def gather_ms(spans: Iterable[Span]) -> float:
    """Return for how long one gather or several ran, in milliseconds."""
    return _length(_gathers(spans)) / 1e3


def hidden(spans: Iterable[Span]) -> float:
    """Return the share of the gathers' time in which something that is no gather ran, too; NaN without gathers."""
    spans = list(spans)
    gathers = _gathers(spans)
    others = union((span.start_us, span.stop_us) for span in spans if span.kind != "gather")
    whole = _length(gathers)
    return _length(common(gathers, others)) / whole if whole else math.nan


def _gathers(spans: Iterable[Span]) -> list[Interval]:
    return union((span.start_us, span.stop_us) for span in spans if span.kind == "gather")


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the times that lie in any interval, as intervals that do not touch, in order.

    >>> union([(4, 6), (0, 2), (5, 9), (3, 3)])
    [(0, 2), (4, 9)]
    """
    joined: list[Interval] = []
    for start, stop in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if joined and start <= joined[-1][1]:
            start, stop = joined[-1][0], max(stop, joined[-1][1])
            joined.pop()
        joined.append((start, stop))
    return joined


def common(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Return the times that lie in an interval of each of two unions.

    >>> common([(0, 5), (7, 9)], [(3, 8)])
    [(3, 5), (7, 8)]
    """
    pairs = [(max(a, c), min(b, d)) for a, b in some for c, d in others]
    return [(start, stop) for start, stop in pairs if start < stop]


def _length(intervals: Iterable[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def write_spans(path: Path, env: Environment, case: str, spans: Iterable[Span]) -> None:
    """Append the spans of a run to a CSV file, made if it is not there."""
    append(path, [
        SpanRow(**env, case=case, stream=span.stream, kind=span.kind, name=span.name,
                start_ns=round(1e3 * span.start_us), ns=round(1e3 * span.us))
        for span in spans
    ])  # fmt: skip


def read_spans(path: Path) -> tuple[SpanRow, list[Span]]:
    """Return a line of the newest run in a file, for what its lines share, and its spans.

    Raises:
        ValueError: no file of `write_spans`, or nothing in it.
    """
    rows = read_rows(path, SpanRow) if path.exists() else []
    if not rows:
        raise ValueError(f"{path}: expected the spans of a run, got none; only a GPU's run has some")
    newest = [row for row in rows if row.run == rows[-1].run]
    return rows[-1], [
        Span(stream=row.stream, kind=kind_of(row.name), name=row.name, start_us=row.start_ns / 1e3, us=row.ns / 1e3)
        for row in newest
    ]
