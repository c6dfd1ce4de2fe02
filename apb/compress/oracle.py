"""The exact oracle: the attention mass that later blocks really put on each token. For judging the others."""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from apb.compress.compressor import Candidates, Compressor, Need
from apb.compress.pool import Pool, no_pool

__all__ = ["Oracle"]


@dataclass(frozen=True, kw_only=True)
class Oracle(Compressor):
    """score(t) = Σ over every later block's row i and the group's heads of p_it, the exact causal attention of row i.

    It looks into the future and gathers the whole document's queries and keys on every host: an upper bound to
    compare with, not a method. Unpooled by default, so that it keeps the largest mass exactly.
    """

    pool: Pool = no_pool
    chunk: int = 256
    """Rows whose attention is held at once."""

    @property
    def needs(self) -> frozenset[Need]:
        """Every host's queries and keys."""
        return frozenset({"document"})

    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the mass; zero where no later block exists."""
        document = candidates.document
        assert document is not None  # `compress` has checked `needs`
        k = document.k.to(torch.float32)
        q = rearrange(document.q.to(torch.float32), "b (h g) n d -> b h g n d", h=k.shape[1])
        start, stop = document.start, document.start + candidates.k.shape[2]
        mass = k.new_zeros(*k.shape[:2], stop - start)
        column = torch.arange(k.shape[2], device=k.device)
        for first in range(document.later, k.shape[2], self.chunk):
            rows = column[first : first + self.chunk]
            logits = einsum(q[:, :, :, rows], k, "b h g l d, b h n d -> b h g l n") * candidates.softmax_scale
            weights = logits.masked_fill(column > rows[:, None], float("-inf")).softmax(dim=-1)
            mass += reduce(weights[..., start:stop], "b h g l n -> b h n", "sum")
        return mass
