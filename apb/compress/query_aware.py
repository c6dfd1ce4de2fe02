"""Keep what points the way the question looks: training free (Spava, arXiv 2601.21444)."""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from apb.compress.backend import CompressBackend, choose_backend
from apb.compress.compressor import Candidates, Compressor, Need

__all__ = ["QueryAware", "mean_logits"]


@dataclass(frozen=True, kw_only=True)
class QueryAware(Compressor):
    """score(t) = k_t · mean over the question's tokens and the group's heads of q, after RoPE.

    The question's vectors come from inside the anchor (`query_in="anchor"`: the anchor sees only itself, so they are
    the same on all hosts and nothing depends on later tokens) or from the question running along with the prefill
    (`query_in="prefill"`: Spava's way; what is kept then depends on the whole document through the question).
    """

    @property
    def needs(self) -> frozenset[Need]:
        """The question's query vectors."""
        return frozenset({"query"})

    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return the mean logit of the question on each candidate, without scale: only the order matters."""
        assert candidates.query is not None  # `compress` has checked `needs`
        return mean_logits(candidates.query, candidates.k)


def mean_logits(
    query: Float[Tensor, "batch q_heads query dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    backend: CompressBackend = "auto",
) -> Float[Tensor, "batch kv_heads tokens"]:
    """Return k_t · q, q the mean of a KV head's query vectors, in float32.

    Args:
        query: the question's vectors, a multiple of k's heads.
        k: keys of any stride.
        backend: "torch" runs anywhere; "triton" reads the keys once; "auto" takes it on CUDA. They sum in another
            order, so scores may differ by float32's rounding.

    Raises:
        ValueError: shapes that do not belong together, or a backend that cannot run here.
    """
    fits = query.ndim == k.ndim == 4 and (query.shape[0], query.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or query.shape[1] % max(1, k.shape[1]):
        raise ValueError(
            f"query, k: expected [batch, q_heads, query, dim] and [batch, kv_heads, tokens, dim] of the same batch and "
            f"dim, q_heads a multiple of kv_heads, got {list(query.shape)} and {list(k.shape)}"
        )
    if choose_backend(backend, query, k) == "triton":
        from apb.kernels.score import score_keys

        return score_keys(k, query)
    groups = rearrange(query, "b (h g) l d -> b h g l d", h=k.shape[1])
    question = groups.mean((2, 3), dtype=torch.float32)  # einops' reduce would need a float32 copy first
    return einsum(k.to(torch.float32), question, "b h n d, b h d -> b h n")
