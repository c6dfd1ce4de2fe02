"""A host whose group is not there: one host's share, run alone, with that host's memory only.

A collective yields stand-ins of the right shape out of this host's own tensor. They are never zeros: how much power a
device draws, and so its clock, depends on the data. Nothing is sent, and what would be is counted.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apb.parallel.host import Counters, Host

__all__ = ["LoneHost"]


class LoneHost(Host):
    """One member of a group of `world_size`, whose other members nobody has started. What it computes is worthless.

    Memory for what comes is taken when a collective starts and given back when it has been waited for; the stand-ins
    are this host's own tensor, where that has the right shape, so that making them takes no time.

    Args:
        rank: number of this host, 0 ≤ rank < world_size.
        world_size: number of hosts in the group.
        device: where this host's tensors live.

    Raises:
        ValueError: no such rank.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device | str = "cpu") -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to {world_size - 1} in a group of {world_size}, got {rank}")
        self.rank, self.world_size = rank, world_size
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.counters = Counters()

    def _start_all_gather(self, x: Tensor, what: str) -> Callable[[], list[Tensor]]:
        return _receive(x, [x.shape] * self.world_size)

    def _start_all_to_all(
        self, parts: dict[int, Tensor], shapes: dict[int, torch.Size], what: str
    ) -> Callable[[], list[Tensor]]:
        largest = max(parts.values(), key=Tensor.numel)
        return _receive(largest, [shapes[rank] for rank in sorted(shapes)])

    def all_gather_object(self, value: Any, *, what: str) -> list[Any]:
        """Return `value` as if every host had brought it."""
        text = json.dumps(value)
        return [json.loads(text) for _ in range(self.world_size)]

    def announce(self, error: BaseException) -> None:
        """Tell nobody: there is nobody."""


def _receive(x: Tensor, shapes: list[torch.Size]) -> Callable[[], list[Tensor]]:
    """Take the memory for tensors of these `shapes`, and return what yields their stand-ins."""
    room = [x.new_empty(shape) for shape in shapes]

    def finish(room: list[Tensor] = room) -> list[Tensor]:
        return [_stand_in(x, shape) for shape in shapes]

    return finish


def _stand_in(x: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of this shape made of the values of `x`, over and over; of ones if it has none."""
    if x.shape == shape:
        return x
    if x.numel() == 0:
        return x.new_ones(shape)
    wanted = math.prod(shape)
    return x.reshape(-1).repeat(-(-wanted // x.numel()))[:wanted].view(shape)
