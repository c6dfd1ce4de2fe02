"""What a method is told about where it runs: the plan, this host, the layer. Travels beside q, k and v."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apb.compress.compressor import Projections
from apb.parallel.host import Host
from apb.plan import ContextPlan

__all__ = ["Context", "Trace"]


@dataclass
class Trace:
    """What happened, if somebody wants to know: time spent by phase, and what each layer kept.

    Attributes:
        timed: fill `phase_ms`. On CUDA each phase then ends with a synchronisation, which costs overlap.
        keep_indices: fill `kept`.
        phase_ms: milliseconds by phase.
        kept: per (layer, block), the kept document positions `[batch, kv_heads, kept]`.
    """

    timed: bool = False
    keep_indices: bool = False
    phase_ms: dict[str, float] = field(default_factory=dict)
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add the time spent in the body to `phase_ms[name]`, if `timed`."""
        if not self.timed:
            yield
            return
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.phase_ms[name] = self.phase_ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)


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
    """

    plan: ContextPlan
    host: Host
    layer: int = 0
    scale: float | None = None
    projections: Projections | None = None
    trace: Trace = field(default_factory=Trace)
