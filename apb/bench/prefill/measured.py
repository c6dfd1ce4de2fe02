"""Measured: all hosts at once, a GPU each, all layers with all their caches; the wall time of the slowest."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from apb.bench import reason
from apb.bench.clock import await_device
from apb.bench.prefill.case import Case, phase_columns
from apb.bench.prefill.layer import Decoder
from apb.bench.prefill.link import measure_link
from apb.bench.prefill.memory import weight_bytes
from apb.bench.prefill.record import PrefillRow
from apb.bench.prefill.share import Share
from apb.context import Trace
from apb.memory import PeakMemory
from apb.parallel import Host, HostError, LoneHost

__all__ = ["TIMEOUT_S", "run_one"]

TIMEOUT_S = 120.0
"""Longest wait for the others' messages; they run the same case."""
_ENOUGH_S = 0.5


def run_one(case: Case, *, repeats: int, on_progress: Callable[[str], None], host: Host) -> PrefillRow:
    """Measure a case; `load` is each host's time in a layer, waiting for messages left out.

    Args:
        case: what to run.
        repeats: prefills to time at least, ≥ 1; others warm up.
        on_progress: told what goes on.
        host: this member of the group; every member calls this.

    Returns:
        The row, the same on every host. Where it did not run, its notes say why.

    Raises:
        ValueError: the method cannot run with these numbers.
        HostError: a host died, or failed in the middle of a message.
    """
    row = case.row("measured")
    on_progress(f"{case.hosts} host{'s' * (case.hosts > 1)}")
    found = _measure(host, case, repeats)
    if found["failure"]:
        return case.blank("measured", notes=found["failure"])
    columns, hosts = _put_together(case, found["hosts"]), found["hosts"]
    notes = [
        row.notes,
        f"{len(hosts[0]['repeats'])} repeats",
        hosts[0]["density"],
        case.wait_note(max(host["queued_ms"] for host in hosts), columns["layer_ms"]),
        found["link"],
    ]
    return replace(row, notes=", ".join(filter(None, notes)), **columns)


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
            share, memory, density = _rehearse(case, host.rank) if takes_part else (None, None, "")
    except Exception as error:
        host.all_gather_object(None, what="failure")  # raises if the group is lost: then nothing more can be measured
        return {"failure": reason(error)}
    try:
        report = None
        if share is not None and memory is not None:
            share.host = group
            PeakMemory(case.device)  # sets the mark back: the rehearsal's noise does not count
            times = _time(share, case, repeats)
            report = {"repeats": times, "queued_ms": share.queued_ms, "peak_bytes": memory.bytes, "density": density}
        found = host.all_gather_object(report, what="reports")
        share = None
        torch.cuda.empty_cache()
        wired = case.hosts > 1 and host.device.type == "cuda"
        link = _link_note(host) if wired else ""
    except Exception as error:  # in the middle of a message: the group is lost
        host.announce(error)
        raise error if isinstance(error, HostError) else HostError(reason(error)) from error
    return {"failure": "", "hosts": found[: case.hosts], "link": link}


@cache
def _link_note(host: Host) -> str:
    """Measure the link, once for a group; the row is there all the same if that fails."""
    try:
        return measure_link(host).note
    except Exception as error:
        return f"link not measured ({reason(error)})"


def _rehearse(case: Case, rank: int) -> tuple[Share, PeakMemory, str]:
    """Take all the memory there is to take, and run a layer alone; the text notes what it attended to."""
    decoder = Decoder(case.shape, case.device, case.dtype)
    method = case.method.prepare(case.shape, case.device, case.dtype)
    memory, alone = PeakMemory(case.device), LoneHost(rank, case.hosts, case.device)
    share = Share(decoder, method, case.plan, alone, caches=case.shape.layers)
    counted = Trace(counted=True)
    share.prefill([counted]).check()
    share.ask([Trace()])
    await_device(case.device)
    return share, memory, case.density_note(counted)


def _time(share: Share, case: Case, repeats: int) -> list[dict[str, Any]]:
    """Time prefills: on GPUs, as many as take half a second, or `repeats`, after as long a warm-up."""
    first = _time_once(share, case)
    warm = 0
    if case.device.type == "cuda":
        first = _time_once(share, case)  # the one before compiled
        slowest = max(share.host.all_gather_object(first["prefill"] + first["query"], what="times"))
        warm = math.ceil(1e3 * _ENOUGH_S / slowest)
        repeats = max(repeats, warm)
    return [_time_once(share, case) for _ in range(warm + repeats)][warm:]


def _time_once(share: Share, case: Case) -> dict[str, Any]:
    """Return the milliseconds of the prefill and of the question's pass, and a layer's phases."""
    layers, trace = case.shape.layers, Trace(timed=True, device=case.device)
    share.host.all_gather_object(None, what="start")
    await_device(case.device)
    began = time.perf_counter()
    watch = share.prefill([trace] * layers)
    await_device(case.device)
    middle = time.perf_counter()
    share.ask([Trace()] * layers)
    await_device(case.device)
    ended = time.perf_counter()
    watch.check()
    phases = {name: ms / layers for name, ms in trace.phase_ms.items()}
    return {"prefill": 1e3 * (middle - began), "query": 1e3 * (ended - middle), "phases": phases}


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
