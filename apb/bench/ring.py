"""Measure how much of Ring Attention's sending hides under its computing: one layer, on all GPUs of this machine.

Three times per layout and length, each the slowest host's: the layer as it is, the same without sending anything, and
the sends alone. If sends and computing overlap, the first is the larger of the other two, not their sum.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from apb.bench import Row, append, environment
from apb.context import Context
from apb.methods import Ring
from apb.parallel import Handle, Host, run_processes
from apb.plan import ContextPlan, Layout

__all__ = ["run"]

Q_HEADS, KV_HEADS, DIM = 32, 32, 128  # as many keys as queries (Llama-2-7B): the most there is to send
TOKENS = (16384, 32768, 131072)
_REPEATS = 9


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure, print a table, extend the ledger.

    Args:
        quick: leave out the longest document.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Raises:
        RuntimeError: fewer than two CUDA devices.
    """
    hosts = torch.cuda.device_count()
    if hosts < 2:
        raise RuntimeError(
            f"apb bench ring needs two or more CUDA devices to send between, and this machine has {hosts}"
        )
    env = environment()
    print(f"{hosts} × {env['device']}, torch {env['torch']}, {Q_HEADS}/{KV_HEADS} heads of {DIM}, bf16, one layer")
    head = ("layer ms", "compute", "send", "exposed", "hidden", "TFLOP/s")
    print(f"{'layout':>10} {'tokens':>7} " + " ".join(f"{name:>8}" for name in head))
    lengths = TOKENS[:2] if quick else TOKENS
    cases = [(layout, tokens) for tokens in lengths for layout in get_args(Layout)]
    rows = []
    for (layout, tokens), times in zip(cases, run_processes(hosts, _measure, cases, backend="nccl")[0], strict=True):
        layer, compute, send = times
        exposed = layer - compute
        tflops = 4 * DIM * Q_HEADS * tokens * (tokens + 1) / 2 / layer / 1e9
        figures = f"{layer:8.3f} {compute:8.3f} {send:8.3f} {exposed:8.3f} {1 - exposed / send:8.0%} {tflops:8.0f}"
        print(f"{layout:>10} {tokens:>7} {figures}", flush=True)
        for backend, ms in (("layer", layer), ("compute alone", compute), ("send alone", send)):
            rate, notes = (tflops, "TFLOP/s of all hosts together") if backend == "layer" else (math.nan, "")
            case = f"{layout} {tokens} on {hosts}"
            rows.append(Row(**env, benchmark="ring", case=case, backend=backend, ms=ms, tflops=rate, notes=notes))
    if out is not None:
        append(out, rows)
    return rows


class _Silent:
    """In the place of a host: sends nothing, and receives what it would have sent."""

    def __init__(self, host: Host) -> None:
        self.rank, self.world_size = host.rank, host.world_size

    def exchange(self, x: Tensor, **_: Any) -> Handle[Tensor]:
        return Handle(lambda: x)


def _measure(host: Host, cases: list[tuple[Layout, int]]) -> list[list[float]]:
    """Return (layer, compute, send) of every case, in milliseconds."""
    return [_measure_one(host, Ring(layout=layout), tokens) for layout, tokens in cases]


@torch.inference_mode()
def _measure_one(host: Host, method: Ring, tokens: int) -> list[float]:
    plan = method.plan(tokens=tokens, hosts=host.world_size)
    rows, generator = plan.host(host.rank).rows, torch.Generator(host.device).manual_seed(host.rank)
    q, k, v = (
        torch.randn(1, heads, rows, DIM, device=host.device, dtype=torch.bfloat16, generator=generator)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    )
    silent: Any = _Silent(host)
    calls: list[Callable[[], object]] = [
        lambda: method.attend(q, k, v, Context(plan, host)),
        lambda: method.attend(q, k, v, Context(plan, silent)),
        lambda: _send(torch.cat((k, v), dim=-1), plan, host),
    ]
    return _slowest_ms(calls, host)


def _send(x: Tensor, plan: ContextPlan, host: Host) -> None:
    n = plan.hosts
    for _ in range(n - 1):
        x = host.exchange(x, to=(host.rank + 1) % n, source=(host.rank - 1) % n, what="ring").wait()


def _slowest_ms(calls: list[Callable[[], object]], host: Host) -> list[float]:
    """Time calls that all hosts make together, in turn: of each, the slowest host's median over the repeats."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(1 + _REPEATS):
        for call, found in zip(calls, times, strict=True):
            torch.cuda.synchronize()
            host.all_gather_object(None, what="start")
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if repeat:  # the first warms up
                found.append(1e3 * (time.perf_counter() - began))
    medians = host.all_gather_object([statistics.median(found) for found in times], what="times")
    return [max(other) for other in zip(*medians, strict=True)]
