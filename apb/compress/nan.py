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
        nans = [nan for _, nan in notes]
        if len({nan.shape for nan in nans}) == 1:  # two launches, not one for each note
            found = torch.stack(nans).reshape(len(nans), nans[0].numel()).any(1).tolist()
        else:
            found = torch.stack([nan.any() for nan in nans]).tolist()
        for (where, _), nan in zip(notes, found, strict=True):
            if nan:
                raise ValueError(f"scores: {where}; look for NaN or infinite activations before this layer")
