"""Let the newest queries vote by softmax (SnapKV, arXiv 2404.14469)."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from apb.compress.compressor import Candidates, Compressor, Need

__all__ = ["SnapKV"]


@dataclass(frozen=True, kw_only=True)
class SnapKV(Compressor):
    """score(t) = Σ over voters i and the group's heads of softmax_t(scale · q_i · k_t), each voter over what it sees.

    Attributes:
        voters: "block": the last `window` candidates vote, each on those up to itself (SnapKV's observation window);
            "query": the question's own vectors vote on all candidates.
        window: how many tokens vote when `voters="block"`, ≥ 1.
    """

    voters: Literal["block", "query"] = "block"
    window: int = 32

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: expected at least 1 voting token, got {self.window}")
        if self.voters not in ("block", "query"):
            raise ValueError(f"voters: expected 'block' or 'query', got {self.voters!r}")

    @property
    def needs(self) -> frozenset[Need]:
        """The question's query vectors, if it is the question that votes."""
        return frozenset({"query"}) if self.voters == "query" else frozenset()

    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the summed votes."""
        k = candidates.k.to(torch.float32)
        voters = candidates.query if self.voters == "query" else candidates.q[:, :, -self.window :]
        assert voters is not None  # `compress` has checked `needs`
        q = rearrange(voters.to(torch.float32), "b (h g) l d -> b h g l d", h=k.shape[1])
        logits = einsum(q, k, "b h g l d, b h n d -> b h g l n") * candidates.softmax_scale
        if self.voters == "block":
            tokens, count = k.shape[2], q.shape[3]
            seen = torch.ones(count, tokens, dtype=torch.bool, device=k.device).tril(tokens - count)
            logits = logits.masked_fill(~seen, float("-inf"))
        return reduce(logits.softmax(dim=-1), "b h g l n -> b h n", "sum")
