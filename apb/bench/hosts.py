"""What benchmarks of one layer on several hosts share: which hosts, the slowest one's time, and rows of it."""

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apb.bench import Environment, Row, environment
from apb.bench.clock import together_ms
from apb.device import pick_dtype
from apb.parallel import Host

__all__ = ["Heads", "Times", "Transport", "draw", "find_hosts", "print_head", "report", "slowest_ms"]

Transport = Literal["gloo", "nccl"]
"""Who carries the messages."""

_REPEATS = 9


class Heads(NamedTuple):
    """The sizes of a layer's attention."""

    q_heads: int
    kv_heads: int
    dim: int


class Times(NamedTuple):
    """A layer as it is, the same without sending anything, and what it sends alone, in milliseconds."""

    layer: float
    compute: float
    send: float

    @property
    def exposed(self) -> float:
        """How much longer the layer takes for its sending."""
        return self.layer - self.compute

    @property
    def hidden(self) -> float:
        """Share of the sending that does not show; above 1 or below 0 where clocks wander more than that."""
        return 1 - self.exposed / self.send


def find_hosts(benchmark: str, hosts: int | None = None) -> tuple[int, Transport, Environment]:
    """Return how many hosts to start here, who carries their messages, and what to note of the run.

    Args:
        benchmark: its name, for the error.
        hosts: None is one on each CUDA device; more than there are devices run on the CPU, whose times mean nothing.

    Raises:
        RuntimeError: none given, and fewer than two CUDA devices.
        ValueError: fewer than two given.
    """
    devices, env = torch.cuda.device_count(), environment()
    if hosts is None and devices < 2:
        raise RuntimeError(
            f"apb bench {benchmark} needs two or more CUDA devices to send between, and this machine has {devices}"
        )
    if hosts is None or 2 <= hosts <= devices:
        return hosts or devices, "nccl", env
    if hosts < 2:
        raise ValueError(f"hosts: expected at least 2, which send to each other, got {hosts}")
    env["device"] = platform.machine()
    return hosts, "gloo", env


def draw(heads: Heads, rows: int, host: Host) -> list[Tensor]:
    """Return random q, k and v of a host's rows, laid out as a model's are, rows before heads.

    bfloat16 on a GPU, float32 on the CPU.
    """
    generator, dtype = torch.Generator(host.device).manual_seed(host.rank), pick_dtype("auto", host.device)
    return [
        torch.randn(1, rows, count, heads.dim, device=host.device, dtype=dtype, generator=generator).transpose(1, 2)
        for count in (heads.q_heads, heads.kv_heads, heads.kv_heads)
    ]


def slowest_ms(calls: Sequence[Callable[[], object]], host: Host, *, repeats: int = _REPEATS) -> list[float]:
    """Time calls that all hosts make together, in turn: of each, the slowest host's median over the repeats."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(1 + repeats):
        for call, found in zip(calls, times, strict=True):
            ms = together_ms(call, host)
            if repeat:  # the first warms up
                found.append(ms)
    medians = host.all_gather_object([statistics.median(found) for found in times], what="times")
    return [max(other) for other in zip(*medians, strict=True)]


def print_head(env: Environment, hosts: int, transport: Transport, heads: Heads) -> None:
    """Print what is measured, and the columns' names."""
    dtype = "bf16" if transport == "nccl" else "fp32"
    sizes = f"{heads.q_heads}/{heads.kv_heads} heads of {heads.dim}"
    print(f"{hosts} × {env['device']}, torch {env['torch']}, {sizes}, {dtype}, one layer")
    names = ("layer ms", "compute", "send", "exposed", "hidden", "TFLOP/s")
    print(f"{'layout':>10} {'tokens':>7} " + " ".join(f"{name:>8}" for name in names))


def report(
    env: Environment, benchmark: str, layout: str, tokens: int, hosts: int, times: Times, flop: float
) -> list[Row]:
    """Print a line, and return the rows of it.

    Args:
        env: of the run.
        benchmark: its name in the ledger.
        layout, tokens, hosts: the case.
        times: of the slowest host.
        flop: useful operations of all hosts together.
    """
    tflops = flop / times.layer / 1e9
    figures = " ".join(f"{ms:8.3f}" for ms in (*times, times.exposed))
    print(f"{layout:>10} {tokens:>7} {figures} {times.hidden:8.0%} {tflops:8.0f}", flush=True)
    rows = []
    for backend, ms in zip(("layer", "compute alone", "send alone"), times, strict=True):
        rate, notes = (tflops, "TFLOP/s of all hosts together") if backend == "layer" else (math.nan, "")
        case = f"{layout} {tokens} on {hosts}"
        rows.append(Row(**env, benchmark=benchmark, case=case, backend=backend, ms=ms, tflops=rate, notes=notes))
    return rows
