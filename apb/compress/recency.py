"""Keep the newest tokens: what a sliding window would."""

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from apb.compress.compressor import Candidates, Compressor
from apb.compress.pool import Pool, no_pool

__all__ = ["Recency"]


@dataclass(frozen=True, kw_only=True)
class Recency(Compressor):
    """score(t) = t. A baseline that a real compressor has to beat; unpooled, so that exactly the last are kept."""

    pool: Pool = no_pool

    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return each candidate's place."""
        batch, heads, tokens, _ = candidates.k.shape
        place = torch.arange(tokens, dtype=torch.float32, device=candidates.k.device)
        return repeat(place, "n -> b h n", b=batch, h=heads)
