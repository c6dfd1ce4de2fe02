"""What a method is told about where it runs: the plan, this host, the layer. Travels beside q, k and v."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apb.compress.compressor import Projections
from apb.compress.nan import NanWatch
from apb.parallel.host import Host
from apb.plan import ContextPlan

__all__ = ["PREFILL_PHASES", "Context", "Trace"]

PREFILL_PHASES = ("compress", "index", "pass", "attend", "merge")
"""What methods spend the prefill's time on, as `Trace.phase_ms` calls it."""


@dataclass
class Trace:
    """What happened, if somebody wants to know: time spent by phase, and what each layer kept.

    Attributes:
        timed: measure phases: with the wall clock, or with events on `device` if that is CUDA (nothing waits).
        keep_indices: fill `kept`.
        keep_layer: fill them for this layer only.
        counted: add up `pairs`.
        device: where the work runs.
        kept: per (layer, block), the kept document positions `[batch, kv_heads, kept]`.
        indices: per layer, the sparse index of a method that builds one (MInference); with `keep_indices`.
    """

    timed: bool = False
    keep_indices: bool = False
    keep_layer: int | None = None
    counted: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    indices: dict[int, Any] = field(default_factory=dict)
    _pairs: dict[int, list[int | Tensor]] = field(default_factory=dict, repr=False)
    _clocks: list[tuple[str, Callable[[], float]]] = field(default_factory=list, repr=False)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add the time spent in the body to `phase_ms[name]`, if `timed`."""
        if not self.timed:
            yield
            return
        stop = _start_clock(self.device)
        yield
        self._clocks.append((name, stop()))

    @property
    def phase_ms(self) -> dict[str, float]:
        """Milliseconds by phase; on CUDA this waits for the device."""
        found: dict[str, float] = {}
        for name, milliseconds in self._clocks:
            found[name] = found.get(name, 0.0) + milliseconds()
        return found

    def keeps(self, layer: int) -> bool:
        """Whether to note what `layer` chose."""
        return self.keep_indices and self.keep_layer in (None, layer)

    def count_pairs(self, layer: int, pairs: int | Tensor) -> None:
        """Add query–key pairs that were scored in `layer`, summed over the query heads, for one batch entry."""
        if self.counted:
            self._pairs.setdefault(layer, []).append(pairs)

    @property
    def pairs(self) -> dict[int, int]:
        """Pairs scored in each layer of the prefill, summed over the query heads; this may wait for the device."""
        return {layer: int(sum(int(pairs) for pairs in counts)) for layer, counts in self._pairs.items()}


def _start_clock(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start a clock; calling it stops it and returns what reads it."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))

        def stop() -> Callable[[], float]:
            end.record(torch.cuda.current_stream(device))
            return lambda: end.synchronize() or start.elapsed_time(end)

        return stop
    began = time.perf_counter()

    def stop_wall() -> Callable[[], float]:
        milliseconds = 1e3 * (time.perf_counter() - began)
        return lambda: milliseconds

    return stop_wall


@dataclass(frozen=True)
class Context:
    """Where one attention call happens.

    Attributes:
        plan: how the document is split; the same on every host.
        host: this member of the group.
        layer: number of the decoder layer, from 0.
        scale: softmax scale; None is 1/√dim.
        projections: this host's rows before RoPE, for compressors that read them.
        trace: where to note times and kept indices.
        watch: collects NaN scores for one check after all layers; None checks, and waits for the device, in each.
    """

    plan: ContextPlan
    host: Host
    layer: int = 0
    scale: float | None = None
    projections: Projections | None = None
    trace: Trace = field(default_factory=Trace)
    watch: NanWatch | None = None
