"""Measure how much of Ring Attention's sending hides under its computing: one layer, on all GPUs of this machine.

Three times per layout and length, each the slowest host's: the layer as it is, the same without sending anything, and
the sends alone; then layers under PyTorch's profiler. If sends and computing overlap, the first time is the larger of
the other two, not their sum.
"""

from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from apb.bench import Row, append
from apb.bench.hosts import Heads, Times, draw, find_hosts, print_head, report, time_layer
from apb.context import Context
from apb.methods import Ring
from apb.parallel import Host, run_processes
from apb.parallel.lone import LoneHost
from apb.plan import ContextPlan, Layout

__all__ = ["run"]

HEADS = Heads(32, 32, 128)  # as many keys as queries (Llama-2-7B): the most there is to send
TOKENS = (16384, 32768, 131072)


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure, print a table, extend the ledger.

    Args:
        quick: leave out the longest document.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Raises:
        RuntimeError: fewer than two CUDA devices.
    """
    hosts, transport, env = find_hosts("ring")
    print_head(env, hosts, transport, HEADS)
    lengths = TOKENS[:2] if quick else TOKENS
    cases = [(layout, tokens) for tokens in lengths for layout in get_args(Layout)]
    rows = []
    for (layout, tokens), times in zip(
        cases, run_processes(hosts, _measure, cases, backend=transport)[-1], strict=True
    ):
        flop = 4 * HEADS.dim * HEADS.q_heads * tokens * (tokens + 1) / 2
        rows += report(env, "ring", layout, tokens, hosts, times, flop)
    if out is not None:
        append(out, rows)
    return rows


def _measure(host: Host, cases: list[tuple[Layout, int]]) -> list[Times]:
    return [_measure_one(host, Ring(layout=layout), tokens) for layout, tokens in cases]


@torch.inference_mode()
def _measure_one(host: Host, method: Ring, tokens: int) -> Times:
    plan = method.plan(tokens=tokens, hosts=host.world_size)
    q, k, v = draw(HEADS, plan.host(host.rank).rows, host)

    silent = LoneHost(host.rank, host.world_size, host.device)
    times, _ = time_layer(
        lambda: method.attend(q, k, v, Context(plan, host)),
        lambda: method.attend(q, k, v, Context(plan, silent)),
        lambda: _send(torch.cat((k, v), dim=-1), plan, host),
        host,
    )
    return times


def _send(x: Tensor, plan: ContextPlan, host: Host) -> None:
    n = plan.hosts
    for _ in range(n - 1):
        x = host.exchange(x, to=(host.rank + 1) % n, source=(host.rank - 1) % n, what="ring").wait()
