"""Pick the best tokens: deterministic, sorted by position, nested as the budget grows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["select"]


def select(scores: Float[Tensor, "*heads tokens"], keep: int) -> Int[Tensor, "*heads kept"]:
    """Return the positions of the `keep` highest scores, ascending; equal scores go to the lowest position.

    A stable sort is a total order, so the selection of a smaller budget is part of a larger one's (top-k promises
    neither).

    Args:
        scores: any leading dimensions; no NaN.
        keep: 0 ≤ keep ≤ tokens.

    Raises:
        ValueError: `keep` out of range.
    """
    if not 0 <= keep <= scores.shape[-1]:
        raise ValueError(f"keep: expected 0 to {scores.shape[-1]}, the number of scores, got {keep}")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values
