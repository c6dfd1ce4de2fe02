"""A host whose group is not there: one host's share, run alone, with that host's memory only.

A collective yields noise in place of what others would bring, and this host's own part as it is. Never zeros: how much
power a device draws, and so its clock, depends on the data. Nothing is sent, and what would be is counted.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from apb.parallel.host import Counters, Host

__all__ = ["LoneHost"]

_INTEGERS = 100  # noise of whole numbers is below it: what is looked up by them exists


class LoneHost(Host):
    """One member of a group of `world_size`, whose other members nobody has started. What it computes is worthless.

    Memory for what comes is taken when a collective starts and given back when it has been waited for. The noise is
    drawn once for each shape and precision, and stays: from the second time on it takes no time.

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
        self._noise: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    @property
    def noise_bytes(self) -> int:
        """Bytes that the noise takes, and a real host would not."""
        return sum(noise.nbytes for noise in self._noise.values())

    def _start_all_gather(self, x: Tensor, what: str) -> Callable[[], list[Tensor]]:
        return self._receive({self.rank: x}, dict.fromkeys(range(self.world_size), x.shape), x.dtype)

    def _start_all_to_all(
        self, parts: dict[int, Tensor], shapes: dict[int, torch.Size], what: str
    ) -> Callable[[], list[Tensor]]:
        return self._receive(parts, shapes, next(iter(parts.values())).dtype)

    def all_gather_object(self, value: Any, *, what: str) -> list[Any]:
        """Return `value` as if every host had brought it."""
        text = json.dumps(value)
        return [json.loads(text) for _ in range(self.world_size)]

    def announce(self, error: BaseException) -> None:
        """Tell nobody: there is nobody."""

    def _receive(
        self, parts: Mapping[int, Tensor], shapes: Mapping[int, torch.Size], dtype: torch.dtype
    ) -> Callable[[], list[Tensor]]:
        """Take the memory for tensors of these `shapes`, and return what yields their stand-ins, in rank order."""
        stand_ins = [
            parts[rank] if rank == self.rank else self._draw(shape, dtype) for rank, shape in sorted(shapes.items())
        ]
        room = [torch.empty(shape, dtype=dtype, device=self.device) for shape in shapes.values()]

        def finish(room: list[Tensor] = room) -> list[Tensor]:
            return stand_ins

        return finish

    def _draw(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return noise of this shape: the same tensor each time."""
        if (shape, dtype) not in self._noise:
            generator = torch.Generator(self.device).manual_seed(0)
            options: dict[str, Any] = {"dtype": dtype, "device": self.device, "generator": generator}
            whole = not dtype.is_floating_point
            self._noise[shape, dtype] = (
                torch.randint(_INTEGERS, shape, **options) if whole else torch.randn(shape, **options)
            )
        return self._noise[shape, dtype]
