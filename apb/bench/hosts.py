"""What benchmarks of one layer on several hosts share: which hosts, its times, how much of its sending hides, and rows.

Two times of 100 ms do not tell of 0.3 ms of sending. So a layer and the same without sending are compared in pairs, one
right after the other; and what hides is read from traces of one host's GPU, which are exact.
"""

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apb.bench import Environment, Row, environment
from apb.bench.clock import together_ms
from apb.bench.measure import Timing
from apb.bench.trace import Span, gather_ms, hidden, profile
from apb.device import pick_dtype
from apb.parallel import Host

__all__ = ["Heads", "Times", "Transport", "draw", "find_hosts", "print_head", "report", "slowest_ms", "time_layer"]

Transport = Literal["gloo", "nccl"]
"""Who carries the messages."""

_REPEATS = 15
_LEFT_OUT = 3  # the median lies between what is left of 15 values without the 3 least and the 3 greatest, with 96 %
_TRACES = 5
_NOT_TRACED = Timing(math.nan, math.nan, math.nan)
_PARTS = ("layer", "compute alone", "send alone", "longer", "gathers", "exposed")  # of `Times`, in the ledger


class Heads(NamedTuple):
    """The sizes of a layer's attention."""

    q_heads: int
    kv_heads: int
    dim: int


class Times(NamedTuple):
    """What a layer takes, in milliseconds.

    Attributes:
        layer: as it is, on the slowest host.
        compute: the same without sending anything.
        send: what it sends alone.
        longer: how much longer the layer is than the one without sending that was timed next to it; the interval holds
            the median with 96 %. Waiting for a host that comes later is part of it.
        gathers: for how long messages were under way on the last host, which came last and so hardly waited; from
            traces, NaN on a CPU.
        exposed: for how long of that nothing else ran.
    """

    layer: Timing
    compute: Timing
    send: Timing
    longer: Timing
    gathers: Timing = _NOT_TRACED
    exposed: Timing = _NOT_TRACED

    @property
    def hidden(self) -> float:
        """Share of the gathers' time in which something else ran, too; NaN without gathers."""
        return 1 - self.exposed.ms / self.gathers.ms if self.gathers.ms else math.nan

    @property
    def notes(self) -> str:
        """What of the sending shows, in words."""
        ms, low, high = self.longer
        apart = "" if low > 0 or high < 0 else ", not told apart from 0"
        traced = "" if math.isnan(self.hidden) else f"; {self.hidden:.0%} of {self.gathers.ms:.3f} ms of gathers hidden"
        return f"longer for its sending by {ms:.3f} ({low:.3f} – {high:.3f}) ms{apart}{traced}"


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


def time_layer(
    layer: Callable[[], object], silent: Callable[[], object], send: Callable[[], object], host: Host
) -> tuple[Times, list[Span]]:
    """Time a layer, the same without sending, and its messages alone; and look at what the last host's GPU does in it.

    Returns:
        The times, and the newest trace; of the other hosts, without what only a trace tells.
    """
    layers, alone, sends = slowest_ms([layer, silent, send], host)
    pairs = sorted(one - other for one, other in zip(layers, alone, strict=True))
    longer = Timing(statistics.median(pairs), pairs[_LEFT_OUT], pairs[-1 - _LEFT_OUT])
    times = Times(Timing.of(layers), Timing.of(alone), Timing.of(sends), longer)
    looks = range(_TRACES if host.device.type == "cuda" else 0)
    traces = [spans for _ in looks if (spans := profile(layer, host, rank=host.world_size - 1))]
    if not traces:
        return times, []
    gathers = [gather_ms(spans) for spans in traces]
    exposed = [ms * (1 - hidden(spans)) if ms else 0.0 for ms, spans in zip(gathers, traces, strict=True)]
    return times._replace(gathers=Timing.of(gathers), exposed=Timing.of(exposed)), traces[-1]


def slowest_ms(calls: Sequence[Callable[[], object]], host: Host, *, repeats: int = _REPEATS) -> list[list[float]]:
    """Time calls that all hosts make together, in turn, there and back: of each call, the slowest host's times."""
    times: list[list[float]] = [[] for _ in calls]
    turns = list(zip(calls, times, strict=True))
    for repeat in range(1 + repeats):
        for call, found in turns:
            ms = together_ms(call, host)
            if repeat:  # the first warms up
                found.append(ms)
        turns.reverse()
    everyone = host.all_gather_object(times, what="times")
    return [[max(repeat) for repeat in zip(*call, strict=True)] for call in zip(*everyone, strict=True)]


def print_head(env: Environment, hosts: int, transport: Transport, heads: Heads) -> None:
    """Print what is measured, and the columns' names."""
    dtype = "bf16" if transport == "nccl" else "fp32"
    sizes = f"{heads.q_heads}/{heads.kv_heads} heads of {heads.dim}"
    print(f"{hosts} × {env['device']}, torch {env['torch']}, {sizes}, {dtype}, one layer")
    names = ("layer ms", "80 % within", "compute", "80 % within", "send", "gathers", "exposed", "hidden", "TFLOP/s")
    widths = (8, 17, 8, 17, 8, 8, 8, 7, 8)
    columns = (f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    print(f"{'layout':>10} {'tokens':>7} " + " ".join(columns))


def report(
    env: Environment, benchmark: str, layout: str, tokens: int, hosts: int, times: Times, flop: float
) -> list[Row]:
    """Print a line, and return the rows of it, one for each of `Times` that there is.

    Args:
        env: of the run.
        benchmark: its name in the ledger.
        layout, tokens, hosts: the case.
        times: of the slowest host, and of the last one.
        flop: useful operations of all hosts together.
    """
    tflops = flop / times.layer.ms / 1e9
    whole = " ".join(f"{t.ms:8.3f} {f'{t.low_ms:.2f} – {t.high_ms:.2f}':>17}" for t in (times.layer, times.compute))
    parts = " ".join(f"{t.ms:8.3f}" for t in (times.send, times.gathers, times.exposed))
    print(f"{layout:>10} {tokens:>7} {whole} {parts} {times.hidden:7.0%} {tflops:8.0f}  {times.notes}", flush=True)
    said = {
        "layer": f"TFLOP/s of all hosts together; {times.notes}",
        "longer": "layer less compute alone, in pairs; between low_ms and high_ms lies the median, with 96 %",
        "gathers": f"on the last host, in {_TRACES} traces",
        "exposed": f"on the last host, in {_TRACES} traces",
    }
    case = f"{layout} {tokens} on {hosts}"
    return [
        Row(**env, benchmark=benchmark, case=case, backend=backend, **timing._asdict(),
            tflops=tflops if backend == "layer" else math.nan, notes=said.get(backend, ""))
        for backend, timing in zip(_PARTS, times, strict=True)
        if not math.isnan(timing.ms)
    ]  # fmt: skip
