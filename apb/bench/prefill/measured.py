"""Measured: all hosts at once, a GPU each, all layers with all their caches; the wall time of the slowest."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from apb.bench.prefill.case import Case, phase_columns
from apb.bench.prefill.layer import Decoder
from apb.bench.prefill.link import measure_link
from apb.bench.prefill.memory import weight_bytes
from apb.bench.prefill.record import PrefillRow
from apb.bench.prefill.share import Share
from apb.context import Trace
from apb.memory import PeakMemory
from apb.parallel import Host, HostError, LoneHost, run_processes

__all__ = ["run_one"]

_TIMEOUT_S = 900.0  # the others wait while one host runs a one-host method


def run_one(case: Case, *, repeats: int, on_progress: Callable[[str], None], host: Host | None = None) -> PrefillRow:
    """Measure a case; `load` is each host's time in a layer, waiting for messages left out.

    Args:
        case: what to run.
        repeats: prefills to time, ≥ 1; one more warms up.
        on_progress: told what goes on.
        host: this member of a group that is there already, as under torchrun; every member calls this. None starts
            processes for this case alone, which leave nothing behind.

    Returns:
        The row, the same on every host. Where it did not run, its notes say why.

    Raises:
        ValueError: the method cannot run with these numbers.
        HostError: a host died, or failed in the middle of a message.
    """
    row = case.row("measured", notes=f"{repeats} repeats")
    on_progress(f"{case.hosts} host{'s' * (case.hosts > 1)}, {repeats} repeats")
    if host is None:
        backend = "nccl" if case.device.type == "cuda" else "gloo"
        found = run_processes(case.hosts, _measure, case, repeats, backend=backend, timeout_s=_TIMEOUT_S)[0]
    else:
        found = _measure(host, case, repeats)
    if found["failure"]:
        return case.blank("measured", notes=found["failure"])
    return replace(
        row, notes=", ".join(filter(None, (row.notes, found["link"]))), **_put_together(case, found["hosts"])
    )


def _measure(host: Host, case: Case, repeats: int) -> dict[str, Any]:
    """Do one host's part; what comes back is the same on all of them.

    First comes a rehearsal, which sends nothing: what does not fit or does not work fails there, on all hosts alike.
    """
    if case.hosts not in (1, host.world_size):
        raise ValueError(
            f"hosts: the group has {host.world_size}, got {case.hosts}; start as many ranks, or leave hosts out"
        )
    case = replace(case, device=host.device)
    group = host if case.hosts == host.world_size else LoneHost(0, 1, host.device)
    takes_part = host.rank < case.hosts
    try:
        with host.together("rehearsal"):
            share, memory = _rehearse(case, host.rank) if takes_part else (None, None)
    except Exception as error:
        return {"failure": _reason(error)}
    try:
        report = None
        if share is not None and memory is not None:
            share.host = group
            report = {"repeats": _time(share, case, repeats), "peak_bytes": memory.bytes}
        found = host.all_gather_object(report, what="reports")
        wired = case.hosts > 1 and host.device.type == "cuda"
        link = f"link measured as {str(measure_link(host)).removeprefix('link ')}" if wired else ""
    except Exception as error:  # in the middle of a message: the group is lost
        host.announce(error)
        raise error if isinstance(error, HostError) else HostError(_reason(error)) from error
    return {"failure": "", "hosts": found[: case.hosts], "link": link}


def _rehearse(case: Case, rank: int) -> tuple[Share, PeakMemory]:
    """Take all the memory there is to take, and run a layer alone."""
    decoder = Decoder(case.shape, case.device, case.dtype)
    method = case.method.prepare(case.shape, case.device, case.dtype)
    memory, alone = PeakMemory(case.device), LoneHost(rank, case.hosts, case.device)
    share = Share(decoder, method, case.plan, alone, caches=case.shape.layers)
    share.prefill([Trace()])
    share.ask([Trace()])
    _synchronize(case.device)
    return share, memory


def _time(share: Share, case: Case, repeats: int) -> list[dict[str, Any]]:
    """Return, of each repeat, the milliseconds of the prefill and of the question's pass, and a layer's phases."""
    layers, found = case.shape.layers, []
    for repeat in range(1 + repeats):
        trace = Trace(timed=True, device=case.device)
        share.host.all_gather_object(None, what="start")
        _synchronize(case.device)
        began = time.perf_counter()
        share.prefill([trace] * layers)
        _synchronize(case.device)
        middle = time.perf_counter()
        share.ask([Trace()] * layers)
        _synchronize(case.device)
        ended = time.perf_counter()
        if repeat:  # the first warms up
            phases = {name: ms / layers for name, ms in trace.phase_ms.items()}
            found.append({"prefill": 1e3 * (middle - began), "query": 1e3 * (ended - middle), "phases": phases})
    return found


def _put_together(case: Case, hosts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row's columns: the repeat whose slowest host took the median time, and its phases on that host."""
    repeats = list(zip(*(host["repeats"] for host in hosts), strict=True))
    walls = [max(one["prefill"] + one["query"] for one in repeat) for repeat in repeats]
    middle = sorted(range(len(walls)), key=walls.__getitem__)[len(walls) // 2]
    chosen = repeats[middle]
    load = [one["phases"]["layer"] - one["phases"].get("pass", 0.0) for one in chosen]
    slowest = chosen[load.index(max(load))]
    prefill = max(one["prefill"] for one in chosen)
    peak = weight_bytes(case.method, case.shape) + max(host["peak_bytes"] for host in hosts)
    return {
        **phase_columns(slowest["phases"], prefill / case.shape.layers),
        "ttft_ms": walls[middle],
        "low_ms": min(walls),
        "high_ms": max(walls),
        "query_ms": walls[middle] - prefill,
        "peak_gbytes": peak / 1e9,
        "load": " ".join(f"{ms:.4g}" for ms in load),
    }


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
