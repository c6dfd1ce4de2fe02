"""The compressor protocol: score → pool → select → gather.

A compressor looks at one host's candidates in one layer and keeps `keep` of them per KV head. Subclass `Compressor`,
write `score`, and say in `needs` what it wants to see beside k, v and q.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from apb.compress.nan import NanWatch
from apb.compress.pool import MaxPool, Pool
from apb.compress.select import gather, pool_and_select
from apb.costs import ModelShape

__all__ = ["Candidates", "Compressor", "Document", "Kept", "Need", "Projections"]

Need = Literal["query", "projections", "document"]


@dataclass(frozen=True, kw_only=True)
class Projections:
    """The token's projections before RoPE (for Qwen3: after its q/k norms)."""

    q: Float[Tensor, "batch q_heads tokens dim"]
    k: Float[Tensor, "batch kv_heads tokens dim"]
    v: Float[Tensor, "batch kv_heads tokens dim"]


@dataclass(frozen=True, kw_only=True)
class Document:
    """Every host's queries and keys in the document's order; only the exact oracle asks for it."""

    q: Float[Tensor, "batch q_heads document dim"]
    k: Float[Tensor, "batch kv_heads document dim"]
    start: int
    """Where the candidates start in the document."""
    later: int
    """First row of the blocks that will read what is kept."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The tokens of one block that may be passed on, in one layer, after RoPE; and what the compressor asked for."""

    q: Float[Tensor, "batch q_heads tokens dim"]
    k: Float[Tensor, "batch kv_heads tokens dim"]
    v: Float[Tensor, "batch kv_heads tokens dim"]
    layer: int = 0
    block: int = 0
    """The block's place in the document."""
    scale: float | None = None
    """The attention's softmax scale; None is 1/√dim."""
    query: Float[Tensor, "batch q_heads query dim"] | None = None
    """The question's own query vectors, after RoPE."""
    projections: Projections | None = None
    document: Document | None = None

    @property
    def softmax_scale(self) -> float:
        """The factor on q · k."""
        return self.k.shape[-1] ** -0.5 if self.scale is None else self.scale


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a block passes on: K and V at their original positions, and where they stood among the candidates."""

    message: Float[Tensor, "batch kv_heads kept both_dims"]
    """K and V side by side, as they are sent."""
    key_dim: int
    indices: Int[Tensor, "batch kv_heads kept"]

    @property
    def k(self) -> Float[Tensor, "batch kv_heads kept dim"]:
        """The keys, a view of the message."""
        return self.message[..., : self.key_dim]

    @property
    def v(self) -> Float[Tensor, "batch kv_heads kept dim"]:
        """The values, a view of the message."""
        return self.message[..., self.key_dim :]


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """Choose which keys and values a block passes on (APB section 3.4).

    Attributes:
        pool: how scores are smoothed over neighbouring tokens before the selection.
    """

    pool: Pool = MaxPool(kernel=5)

    @property
    def needs(self) -> frozenset[Need]:
        """What `score` reads beside q, k and v."""
        return frozenset()

    def prepare(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> "Compressor":
        """Return the compressor ready for a model; one with weights checks that they fit, and moves them.

        Raises:
            ValueError: the weights were made for another model.
        """
        return self

    @abstractmethod
    def score(self, candidates: Candidates) -> Float[Tensor, "batch kv_heads tokens"]:
        """Return how much each candidate matters, per KV head; higher is kept first."""

    def compress(self, candidates: Candidates, keep: int, *, watch: NanWatch | None = None) -> Kept:
        """Keep the `keep` best candidates of each KV head, sorted by position; ties go to the lowest position.

        Args:
            candidates: one block's tokens in one layer.
            keep: how many to keep, 0 ≤ keep ≤ tokens.
            watch: notes NaN scores for its `check`; None checks here, which waits for the device.

        Raises:
            ValueError: `keep` out of range, something in `needs` is missing, or scores of the wrong shape or NaN.
        """
        _check_shapes(candidates)
        batch, kv_heads, tokens, _ = candidates.k.shape
        if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= tokens:
            raise ValueError(f"keep: expected 0 to {tokens}, the number of candidates, got {keep}")
        if 0 < keep < tokens:
            for need in sorted(self.needs):
                if getattr(candidates, need) is None:
                    raise ValueError(
                        f"candidates.{need}: {type(self).__name__} reads it, got None; let the method make the plan "
                        f"(APB(compressor=…).plan(…)) and give its context what it reads"
                    )
            scores = self.score(candidates)
            if scores.shape != (batch, kv_heads, tokens):
                raise ValueError(
                    f"scores: {type(self).__name__}.score returned shape {tuple(scores.shape)}, expected "
                    f"(batch, kv_heads, tokens) = {(batch, kv_heads, tokens)}"
                )
            indices, nan = pool_and_select(scores, keep, self.pool)
            noted = NanWatch() if watch is None else watch
            noted.note(f"{type(self).__name__} gave NaN in layer {candidates.layer}, block {candidates.block}", nan)
            if watch is None:
                noted.check()
        else:
            indices = repeat(torch.arange(keep, device=candidates.k.device), "n -> b h n", b=batch, h=kv_heads)
        message = gather(candidates.k, candidates.v, indices)
        return Kept(message=message, key_dim=candidates.k.shape[-1], indices=indices)


def _check_shapes(candidates: Candidates) -> None:
    k, v, q, query = candidates.k, candidates.v, candidates.q, candidates.query
    if k.ndim != 4 or v.shape[:3] != k.shape[:3] or v.ndim != 4:
        raise ValueError(
            f"k, v: expected [batch, kv_heads, tokens, dim] each, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, x, rows in (("q", q, k.shape[2]), ("query", query, None)):
        if x is None:
            continue
        fits = x.ndim == 4 and x.shape[0] == k.shape[0] and x.shape[3] == k.shape[3] and x.shape[1] % k.shape[1] == 0
        if not fits or x.shape[1] != q.shape[1] or (x.shape[2] != rows if rows is not None else x.shape[2] == 0):
            wanted = "at least 1" if rows is None else rows
            raise ValueError(
                f"{name}: expected [batch {k.shape[0]}, a multiple of {k.shape[1]} heads (the same for q and query), "
                f"{wanted} tokens, dim {k.shape[3]}], got {tuple(x.shape)}"
            )
