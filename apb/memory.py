"""How much memory a piece of work takes at its peak, on a GPU or in this process."""

import contextlib
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """The most bytes in use at once since this object was made, beyond those in use then.

    On CUDA, PyTorch's own count of the device. On a CPU, the process's resident memory; where the system cannot reset
    the high-water mark (not Linux), it may be too low, and on Windows it is 0. Thread hosts on one device, or in one
    process, share a count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self._before = _resident_bytes()

    @property
    def bytes(self) -> int:
        """Peak so far, above the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident_bytes() - self._before)


def _resident_bytes() -> int:
    """Return the high-water mark of this process's resident memory."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
