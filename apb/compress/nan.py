"""Notice NaN scores without waiting for the device in every layer."""

import torch
from jaxtyping import Bool
from torch import Tensor

__all__ = ["NanWatch"]


class NanWatch:
    """Collects which layers' scores held NaN, on the device; `check` waits for it once and says where.

        watch = NanWatch()
        kept = compressor.compress(candidates, keep, watch=watch)       # in every layer; returns at once
        watch.check()                                                   # when the prefill is done

    Until then NaN counts as the highest score, so every selection is of the right size and in range.
    """

    def __init__(self) -> None:
        self._notes: list[tuple[str, Bool[Tensor, "*heads"]]] = []

    def note(self, where: str, nan: Bool[Tensor, "*heads"]) -> None:
        """Remember, for one block in one layer, which heads' scores held NaN."""
        self._notes.append((where, nan))

    def check(self) -> None:
        """Forget all notes, and raise if one says NaN.

        Raises:
            ValueError: naming the compressor, the layer and the block that came first.
        """
        notes, self._notes = self._notes, []
        if not notes:
            return
        for (where, _), nan in zip(notes, torch.stack([nan.any() for _, nan in notes]).tolist(), strict=True):
            if nan:
                raise ValueError(f"scores: {where}; look for NaN or infinite activations before this layer")
