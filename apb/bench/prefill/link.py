"""What a message costs: latency + received bytes / bandwidth, fitted to all-gathers between real devices."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from apb.bench.clock import together_ms
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
        hosts: among how many it was measured; 0 if it was not.

    Raises:
        ValueError: a latency below 0, or a bandwidth of 0 or less.
    """

    latency_ms: float
    gbytes_per_s: float
    hosts: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.latency_ms < float("inf"):
            raise ValueError(f"latency_ms: expected milliseconds ≥ 0, got {self.latency_ms!r}")
        if not self.gbytes_per_s > 0:
            raise ValueError(f"gbytes_per_s: expected 10⁹ bytes a second > 0, got {self.gbytes_per_s!r}")

    def ms(self, messages: float, received_bytes: float) -> float:
        """Milliseconds that a host's messages take, one after the other."""
        return messages * self.latency_ms + received_bytes / self.gbytes_per_s / 1e6

    def __str__(self) -> str:
        return f"{self.latency_ms:.3g} ms + {self.gbytes_per_s:.3g} GB/s"

    @property
    def note(self) -> str:
        """What to say of it beside a time."""
        return f"link {self}{f', fitted between {self.hosts} hosts' * (self.hosts > 0)}"


def fit_link(points: Sequence[tuple[float, float]], hosts: int = 0) -> Link:
    """Fit a line to (received bytes, milliseconds), such that the squared relative errors are least.

    >>> fit_link([(1e6, 0.03), (1e7, 0.12), (1e8, 1.02)], hosts=2)
    Link(latency_ms=0.02, gbytes_per_s=100.0, hosts=2)
    """
    weights = [ms**-2 for _, ms in points]

    def mean(values: Sequence[float]) -> float:
        return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)

    sizes, times = [size for size, _ in points], [ms for _, ms in points]
    middle, level = mean(sizes), mean(times)
    away = [size - middle for size in sizes]
    slope = mean([d * ms for d, ms in zip(away, times, strict=True)]) / mean([d * d for d in away])
    slope = max(slope, 1e-12)
    latency_ms = round(max(0.0, level - slope * middle), 6)
    return Link(latency_ms=latency_ms, gbytes_per_s=round(1e-6 / slope, 3), hosts=hosts)


# All-gathers between two H200 with NVLink (18 links), NCCL of torch 2.11.0+cu130, NVLink multicast off.
NVLINK = fit_link([(1e6, 0.029), (8.4e6, 0.058), (25e6, 0.126), (67e6, 0.42)], hosts=2)


def measure_link(host: Host) -> Link:
    """Fit a link to all-gathers of several sizes among these hosts: of each, the slowest host's median.

    Raises:
        ValueError: a group of one host, which sends nothing.
        OutOfMemoryError, HostFailed: there is no room on a host; this is found before anything is sent.
        HostFailed: another host failed.
    """
    if host.world_size == 1:
        raise ValueError("world_size: expected at least 2 hosts to measure a link between, got 1")
    with host.together("link"):
        torch.empty((1 + host.world_size) * max(_SIZES), dtype=torch.uint8, device=host.device)
    points = []
    for size in _SIZES:
        x = torch.randint(256, (size,), dtype=torch.uint8, device=host.device)
        gather = partial(_gather, x, host)
        times = [together_ms(gather, host) for _ in range(1 + _REPEATS)][1:]  # the first warms up
        slowest = max(host.all_gather_object(statistics.median(times), what="times"))
        points.append(((host.world_size - 1) * size, slowest))
    return fit_link(points, hosts=host.world_size)


def _gather(x: Tensor, host: Host) -> None:
    host.all_gather(x, what="link").wait()
