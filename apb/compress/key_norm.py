"""Keep the keys of smallest norm: they tend to draw the most attention (Devoto et al., arXiv 2406.11430)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apb.compress.compressor import Candidates, Compressor

__all__ = ["KeyNorm"]


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Compressor):
    """score(t) = −‖k_t‖. Needs neither queries nor training."""

    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the negative norms."""
        return -candidates.k.to(torch.float32).norm(dim=-1)
