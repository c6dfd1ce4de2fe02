"""The three patterns of MInference (arXiv 2407.02490, section 3.2): each looks at q and k and lists what to read."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from apb.attend.sparse_index import TILE, SparseIndex, block_index, slash_index, top_indices

__all__ = ["AShape", "BlockSparse", "Pattern", "VerticalSlash", "block_scores", "vertical_slash_scores"]

PROBE_ROWS = 64
FORCED_COLUMNS = 30
FORCED_OFFSETS = 100


@dataclass(frozen=True, kw_only=True)
class Pattern(ABC):
    """A rule for what a head attends to; its fields are budgets, integers ≥ 1, clipped to the document."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name}: {type(self).__name__} takes an integer ≥ 1, got {value!r}")

    @abstractmethod
    def index(
        self,
        q: Float[Tensor, "batch q_heads tokens dim"],
        k: Float[Tensor, "batch kv_heads tokens dim"],
        scale: float | None = None,
    ) -> SparseIndex:
        """Choose what each query head attends to.

        Args:
            q: queries, at least one row; query head h reads KV head h // (q_heads / kv_heads).
            k: keys of the same tokens.
            scale: multiplies the scores; 1/√dim if None.
        """


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(Pattern):
    """The columns and the diagonals to which the last 64 rows give most weight; the rule for most heads.

    Attributes:
        vertical: columns, the first 30 always among them.
        slash: diagonals row − column, 0..99 always among them.
    """

    vertical: int = 1000
    slash: int = 6096

    def index(self, q: Tensor, k: Tensor, scale: float | None = None) -> SparseIndex:
        """Probe with the last rows; keep the heaviest columns and diagonals (`vertical_slash_scores`)."""
        tokens = k.shape[2]
        vertical, slash = vertical_slash_scores(q, k, scale)
        vertical[..., :FORCED_COLUMNS] = torch.inf
        slash[..., :FORCED_OFFSETS] = torch.inf
        columns = top_indices(vertical, min(self.vertical, tokens))
        return slash_index(top_indices(slash, min(self.slash, tokens)), columns, tokens)


@dataclass(frozen=True, kw_only=True)
class AShape(Pattern):
    """The beginning and the near past, whatever the tokens say.

    Attributes:
        sink: the first columns.
        local: diagonals 0 .. local − 1.
    """

    sink: int = 128
    local: int = 3968

    def index(self, q: Tensor, k: Tensor, scale: float | None = None) -> SparseIndex:
        """List the same columns and diagonals for every head."""
        tokens = k.shape[2]
        columns, offsets = (torch.arange(min(x, tokens), device=q.device)[None, None] for x in (self.sink, self.local))
        return slash_index(offsets, columns, tokens).expand(q.shape[0], q.shape[1])


@dataclass(frozen=True, kw_only=True)
class BlockSparse(Pattern):
    """For each 64 rows the blocks of 64 columns whose mean key they like best on average.

    Attributes:
        blocks: blocks of each row tile, its own always among them.
    """

    blocks: int = 100

    def index(self, q: Tensor, k: Tensor, scale: float | None = None) -> SparseIndex:
        """Keep the blocks with the highest `block_scores`."""
        scores = block_scores(q, k, scale)
        scores.diagonal(dim1=2, dim2=3).fill_(torch.inf)
        return block_index(top_indices(scores, min(self.blocks, scores.shape[3])), k.shape[2])


def vertical_slash_scores(
    q: Float[Tensor, "batch q_heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    scale: float | None = None,
) -> tuple[Float[Tensor, "batch q_heads tokens"], Float[Tensor, "batch q_heads tokens"]]:
    """Sum the attention of the last 64 rows by column, and by diagonal (offset = row − column).

    With P = softmax(scale · q kᵀ, causal) of the rows i: vertical[c] = Σᵢ P[i, c], slash[s] = Σᵢ P[i, i − s], float32.
    All passes over P [batch · q_heads, 64, tokens] work in place on one float32 buffer.
    """
    (batch, q_heads, tokens, dim), kv_heads = q.shape, k.shape[1]
    group, rows = q_heads // kv_heads, min(PROBE_ROWS, tokens)
    scale = dim**-0.5 if scale is None else scale
    # Zeros stand left of P, −∞ left of the scores: skewed by a column a row, diagonals become columns without a copy.
    padded = torch.empty(batch * kv_heads, group * rows, rows + tokens, dtype=torch.float32, device=q.device)
    padded[..., :rows] = -torch.inf
    scores = padded[..., rows:]
    probe = q[:, :, tokens - rows :].reshape(batch * kv_heads, group * rows, dim)
    keys = k.reshape(batch * kv_heads, tokens, dim).transpose(1, 2)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):  # float32 sums without float32 copies
        torch.baddbmm(scores, probe, keys, out_dtype=torch.float32, beta=0, alpha=scale, out=scores)
    else:
        torch.bmm(probe.float() * scale, keys.float(), out=scores)
    later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    scores.unflatten(1, (group, rows))[..., tokens - rows :].masked_fill_(later, -torch.inf)
    padded = torch.softmax(padded, dim=2, out=padded).view(batch * q_heads, rows, rows + tokens)
    skewed = padded.as_strided((batch * q_heads, rows, tokens), (rows * (rows + tokens), rows + tokens + 1, 1), 1)
    vertical, slash = padded[..., rows:].sum(dim=1), skewed.sum(dim=1).flip(1)
    return vertical.view(batch, q_heads, tokens), slash.view(batch, q_heads, tokens)


def block_scores(
    q: Float[Tensor, "batch q_heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    scale: float | None = None,
) -> Float[Tensor, "batch q_heads row_tiles blocks"]:
    """Score every 64 rows against every 64 columns by scale · mean(q) · mean(k); −inf after the diagonal."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group, row_tiles = q.shape[1] // k.shape[1], -(-k.shape[2] // TILE)
    means = (_means(q) * scale).unflatten(1, (-1, group)).flatten(2, 3)
    scores = (means @ _means(k).transpose(2, 3)).view(*q.shape[:2], row_tiles, row_tiles)
    later = torch.ones(row_tiles, row_tiles, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill_(later, -torch.inf)


def _means(x: Tensor) -> Tensor:
    """Average every 64 tokens, and the rest, in float32."""
    whole = x.shape[2] // TILE * TILE
    means = x[:, :, :whole].unflatten(2, (whole // TILE, TILE)).mean(dim=3, dtype=torch.float32)
    return means if whole == x.shape[2] else torch.cat((means, x[:, :, whole:].float().mean(2, keepdim=True)), dim=2)
