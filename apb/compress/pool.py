"""Smooth scores over neighbouring tokens, so that a kept token brings its neighbours along."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["MaxPool", "MeanPool", "Pool", "no_pool"]

Pool = Callable[[Float[Tensor, "batch heads tokens"]], Float[Tensor, "batch heads tokens"]]


def _check_kernel(kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd number of tokens ≥ 1, so that the window is centred, got {kernel}")


@dataclass(frozen=True, kw_only=True)
class MaxPool:
    """Give each token the highest score within `kernel` tokens around it (Locret's and APB's choice, kernel 5)."""

    kernel: int = 5

    def __post_init__(self) -> None:
        _check_kernel(self.kernel)

    def __call__(self, scores: Float[Tensor, "batch heads tokens"]) -> Float[Tensor, "batch heads tokens"]:
        """Pool over tokens; the edges of the block see fewer neighbours."""
        return F.max_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)


@dataclass(frozen=True, kw_only=True)
class MeanPool:
    """Give each token the mean score of the tokens within `kernel` around it that exist."""

    kernel: int = 5

    def __post_init__(self) -> None:
        _check_kernel(self.kernel)

    def __call__(self, scores: Float[Tensor, "batch heads tokens"]) -> Float[Tensor, "batch heads tokens"]:
        """Pool over tokens; the edges of the block see fewer neighbours."""
        return F.avg_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False)


def no_pool(scores: Float[Tensor, "batch heads tokens"]) -> Float[Tensor, "batch heads tokens"]:
    """Leave the scores as they are."""
    return scores
