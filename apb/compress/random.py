"""Keep tokens drawn at random: the other baseline."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apb.compress.compressor import Candidates, Compressor
from apb.compress.pool import Pool, no_pool

__all__ = ["Random"]


@dataclass(frozen=True, kw_only=True)
class Random(Compressor):
    """score(t) drawn uniformly from (seed, layer, block): the same on every run, device and kind of host.

    Attributes:
        seed: starts the draw, ≥ 0.
    """

    pool: Pool = no_pool
    seed: int = 0

    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the draw; made on the CPU, so that it does not depend on the device."""
        mixed = (self.seed * 1_000_003 + candidates.layer) * 1_000_003 + candidates.block
        generator = torch.Generator().manual_seed(mixed % 2**63)
        return torch.rand(candidates.k.shape[:3], generator=generator).to(candidates.k.device)
