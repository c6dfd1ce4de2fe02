"""Time what a device does, not how fast Python gives it work: by events, behind a kernel that keeps it busy so long.

queue_ahead(device)              # Python now has a start of some milliseconds
ms = together_ms(call, host)     # a call that all hosts make at once
"""

import time
from collections.abc import Callable

import torch

from apb.parallel import Host

__all__ = ["AHEAD_MS", "SPIN", "await_device", "queue_ahead", "together_ms"]

AHEAD_MS = 10.0
"""Python's start: enough to queue some hundred kernels."""
SPIN = "spin_kernel"
"""Stands in the name of the kernel that waits, which a trace shows."""

_CYCLES_PER_MS = 2_000_000  # at the highest clocks; a slower board waits longer


def await_device(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def queue_ahead(device: torch.device, ms: float = AHEAD_MS) -> None:
    """Let a GPU wait for at least so long before what is queued next; a CPU has no queue."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda._sleep(int(ms * _CYCLES_PER_MS))


def together_ms(call: Callable[[], object], host: Host) -> float:
    """Time a call that all hosts make at once: on GPUs from event to event, on CPUs by the clock on the wall.

    Raises:
        HostFailed: another host failed.
    """
    await_device(host.device)
    host.all_gather_object(None, what="start")
    if host.device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    queue_ahead(host.device)
    # GPUs wait at clocks of their own: a message that all wait for lets them begin at once.
    host.all_gather(torch.zeros(1, device=host.device), what="start").wait()
    stream, (start, end) = torch.cuda.current_stream(host.device), [torch.cuda.Event(enable_timing=True) for _ in "se"]
    start.record(stream)
    call()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)
