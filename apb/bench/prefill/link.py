"""What a message costs: latency + received bytes / bandwidth, fitted to all-gathers between real devices."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apb.parallel.host import Host

__all__ = ["NVLINK", "Link", "fit_link", "measure_link"]

_SIZES = (2**20, 2**23, 3 * 2**23, 2**26)  # bytes a host; at 128K tokens, a passing block is 8 MiB
_REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class Link:
    """A model of the way between hosts.

    Attributes:
        latency_ms: what a message of no bytes takes.
        gbytes_per_s: 10⁹ bytes that a host receives in a second.

    Raises:
        ValueError: a latency below 0, or a bandwidth of 0 or less.
    """

    latency_ms: float
    gbytes_per_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency_ms < float("inf"):
            raise ValueError(f"latency_ms: expected milliseconds ≥ 0, got {self.latency_ms!r}")
        if not self.gbytes_per_s > 0:
            raise ValueError(f"gbytes_per_s: expected 10⁹ bytes a second > 0, got {self.gbytes_per_s!r}")

    def ms(self, messages: float, received_bytes: float) -> float:
        """Milliseconds that a host's messages take, one after the other."""
        return messages * self.latency_ms + received_bytes / self.gbytes_per_s / 1e6

    def __str__(self) -> str:
        return f"link {self.latency_ms:.3g} ms + {self.gbytes_per_s:.3g} GB/s"


def fit_link(points: Sequence[tuple[float, float]]) -> Link:
    """Fit a line to (received bytes, milliseconds), such that the squared relative errors are least.

    >>> fit_link([(1e6, 0.03), (1e7, 0.12), (1e8, 1.02)])
    Link(latency_ms=0.02, gbytes_per_s=100.0)
    """
    weights = [ms**-2 for _, ms in points]

    def mean(values: Sequence[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    sizes, times = [size for size, _ in points], [ms for _, ms in points]
    middle, level = mean(sizes), mean(times)
    away = [size - middle for size in sizes]
    slope = mean([d * ms for d, ms in zip(away, times, strict=True)]) / mean([d * d for d in away])
    slope = max(slope, 1e-12)
    return Link(latency_ms=round(max(0.0, level - slope * middle), 6), gbytes_per_s=round(1e-6 / slope, 3))


# All-gathers between two H200 with NVLink (18 links), NCCL of torch 2.11.0+cu130, NVLink multicast off.
NVLINK = fit_link([(1e6, 0.029), (8.4e6, 0.058), (25e6, 0.126), (67e6, 0.42)])


def measure_link(host: Host) -> Link:
    """Fit a link to all-gathers of several sizes among these hosts: of each, the slowest host's median.

    Raises:
        ValueError: a group of one host, which sends nothing.
        HostFailed: another host failed.
    """
    if host.world_size == 1:
        raise ValueError("world_size: expected at least 2 hosts to measure a link between, got 1")
    points = []
    for size in _SIZES:
        x = torch.randint(256, (size,), dtype=torch.uint8, device=host.device)
        times = []
        for repeat in range(1 + _REPEATS):
            host.all_gather_object(None, what="start")
            _synchronize(host.device)
            began = time.perf_counter()
            host.all_gather(x, what="link").wait()
            _synchronize(host.device)
            if repeat:  # the first warms up
                times.append(1e3 * (time.perf_counter() - began))
        slowest = max(host.all_gather_object(statistics.median(times), what="times"))
        points.append(((host.world_size - 1) * size, slowest))
    return fit_link(points)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
