"""Which keys each query row attends to: whole tiles and single columns, listed per head (MInference, arXiv 2407.02490).

Rows come in tiles of 64. A *slash* at offset s lets row i see column i − s; the 64 rows of tile m then touch the
columns at distances w = 64·m − column in [s − 63, s], whatever m is. So one list of key tiles, 64 wide, covers the
slashes of a head for all its row tiles; each takes as much of the list as lies right of column 0. *Vertical* columns,
seen by every later row, are gathered one by one where no tile covers them.

          0      64     128    192    256
      m=0 │◣                                     ◣ the first tile of every list, w = −63: the diagonal
      m=1 │      ◣                               ▓ a tile further on: columns 64·m − w − 63 … 64·m − w
      m=2 │▓▓▓▓▓▓│     ◣                         │ a vertical column; not gathered where a tile covers it
      m=3 │    │▓▓▓▓▓▓│     ◣
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

__all__ = ["TILE", "SparseIndex", "block_index", "join_heads", "slash_index", "top_indices"]

TILE = 64
"""Rows of a row tile and columns of a key tile."""
_LISTS = ("tiles", "tile_counts", "columns", "column_counts", "covered")


@dataclass(frozen=True, kw_only=True)
class SparseIndex:
    """What every row tile of every query head attends to; each row sees itself.

    Attributes:
        tokens: n, rows and columns.
        tiles: distances w of the key tiles, ascending and ≥ 64 apart, the first −63; tile w of row tile m holds the
            columns [64·m − w − 63, 64·m − w]. One list for all row tiles (`lists` = 1) or one for each.
        tile_counts: how many tiles of its list a row tile takes; only the last of them may begin left of column 0.
        columns: vertical columns, ascending, without repeats.
        column_counts: how many columns lie left of the row tile's first row.
        covered: at w − 1, whether a tile holds the column at distance w ≥ 1, so that it is not gathered as well.
    """

    tokens: int
    tiles: Int[Tensor, "batch q_heads lists listed"]
    tile_counts: Int[Tensor, "batch q_heads row_tiles"]
    columns: Int[Tensor, "batch q_heads vertical"]
    column_counts: Int[Tensor, "batch q_heads row_tiles"]
    covered: UInt8[Tensor, "batch q_heads distances"]

    def mask(self, start: int = 0, stop: int | None = None) -> Bool[Tensor, "batch q_heads rows columns"]:
        """Spell the index out for the rows [start, stop): True where a row sees a column; `start` is k · 64."""
        stop = self.tokens if stop is None else stop
        device = self.tiles.device
        own = torch.arange(start // TILE, -(-stop // TILE), device=device)  # row tiles
        first = TILE * own[:, None]
        tiles = self.tiles if self.tiles.shape[2] == 1 else self.tiles[:, :, own]
        taken = torch.arange(tiles.shape[3], device=device) < self.tile_counts[:, :, own, None]
        column = (first - tiles - (TILE - 1))[..., None] + torch.arange(TILE, device=device)
        seen = torch.zeros(*taken.shape[:3], self.tokens + 1, dtype=torch.bool, device=device)  # at the end: nowhere
        legal = taken[..., None] & (column >= 0) & (column < self.tokens)
        seen.scatter_(3, torch.where(legal, column, self.tokens).flatten(3), True)
        vertical = self.columns[:, :, None].long()
        seen.scatter_(3, torch.where(vertical < first, vertical, self.tokens), True)
        causal = torch.ones(stop - start, self.tokens, dtype=torch.bool, device=device).tril(start)
        return seen[..., :-1].repeat_interleave(TILE, dim=2)[:, :, : stop - start] & causal

    def pairs(self) -> Int[Tensor, "batch q_heads"]:
        """Count the (row, column) pairs of the mask without building it; nothing waits for the device."""
        first, last_rows = _first_rows(self.tokens, self.tiles.device), (self.tokens - 1) % TILE + 1
        rows = (self.tokens - first).clamp(max=TILE)
        counts = self.tile_counts.long()
        farthest = self.tiles.expand(-1, -1, len(first), -1).gather(3, counts[..., None] - 1)[..., 0]
        missing = (farthest + (TILE - 1) - first).clamp(min=0)  # columns of the farthest tile left of column 0
        pairs = (rows * (rows + 1) // 2 + rows * (TILE * (counts - 1) - missing)).sum(dim=2)
        if self.columns.shape[2] == 0 or len(first) == 1:
            return pairs
        # Column c has distance 63 − c % 64 + 1 in row tile c // 64 + 1, and 64 more in each further one.
        gathered = 1 - self.covered.long().unflatten(2, (-1, TILE))
        further, place = len(first) - 2 - self.columns.long() // TILE, TILE - 1 - self.columns.long() % TILE
        at = (further.clamp(min=0) * TILE + place).expand(*pairs.shape, -1)
        row_tiles, in_last = (x.flatten(2).gather(2, at) for x in (gathered.cumsum(dim=2), gathered))
        return pairs + ((TILE * row_tiles - (TILE - last_rows) * in_last) * (further >= 0)).sum(dim=2)

    def density(self) -> Float[Tensor, "batch q_heads"]:
        """Return the share of causal attention's n(n + 1)/2 pairs that is computed: 1 if everything is selected."""
        return self.pairs().double() / (self.tokens * (self.tokens + 1) // 2)

    def expand(self, batch: int, heads: int) -> "SparseIndex":
        """Use an index of one batch entry and one head for all of them; no copy."""
        return self._map(lambda x: x.expand(batch, heads, *x.shape[2:]))

    def entry(self, batch: int) -> "SparseIndex":
        """Return what the query heads of one batch entry attend to."""
        return self._map(lambda x: x[batch : batch + 1])

    def head(self, batch: int, head: int) -> "SparseIndex":
        """Return what one query head of one batch entry attends to."""
        return self._map(lambda x: x[batch : batch + 1, head : head + 1])

    def to(self, device: torch.device | str) -> "SparseIndex":
        """Return the same on another device."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SparseIndex":
        return replace(self, **{name: change(getattr(self, name)) for name in _LISTS})


def join_heads(parts: Sequence[tuple[Sequence[int], SparseIndex]]) -> SparseIndex:
    """Make one index of several, each for some of the query heads; shorter lists are padded, and counts say how far.

    Args:
        parts: (query heads, their index) for the same tokens, each head once. Slashes beside blocks get a list for
            each row tile, as blocks have.
    """
    lists = max(index.tiles.shape[2] for _, index in parts)
    order = torch.tensor([head for heads, _ in parts for head in heads]).argsort()
    joined = {}
    for name in _LISTS:
        found = [getattr(index, name) for _, index in parts]
        if name == "tiles":
            found = [x.expand(-1, -1, lists, -1) for x in found]
        longest = max(x.shape[-1] for x in found)
        padding = parts[0][1].tokens + TILE  # no distance and no column
        padded = [F.pad(x, (0, longest - x.shape[-1]), value=0 if name == "covered" else padding) for x in found]
        joined[name] = torch.cat(padded, dim=1)[:, order.to(found[0].device)]
    return replace(parts[0][1], **joined)


def slash_index(
    offsets: Int[Tensor, "batch q_heads slash"], columns: Int[Tensor, "batch q_heads vertical"], tokens: int
) -> SparseIndex:
    """Cover slashes with tiles, greedily from the nearest: each tile starts at the first distance not covered yet.

    next[w] = the first needed distance ≥ w, jump[w] = next[w + 64], and the tiles are next[−63] followed again and
    again by jump. Doubling turns that walk into log₂(tiles) gathers: from 2ᵏ tiles and jump^(2ᵏ) to twice as many.

    Args:
        offsets: row − column of the slashes, 0 .. tokens − 1, ascending, 0 among them.
        columns: vertical columns, ascending, without repeats; may be none.
        tokens: n ≥ 1.
    """
    device, last = offsets.device, tokens + TILE - 1
    place = torch.arange(tokens + TILE, device=device)  # distance w stands at place w + 63; at `last` the walk stays
    # A slash at s needs the places s .. s + 63; the next one needed is of the first slash that reaches as far.
    places = place.expand(*offsets.shape[:2], -1).contiguous()
    reaching = torch.searchsorted(offsets.long() + (TILE - 1), places)
    following = F.pad(offsets.long(), (0, 1), value=last).gather(2, reaching).maximum(place)
    jump = following[..., (place + TILE).clamp(max=last)]
    tiles, most = following[..., :1], min(offsets.shape[2], -(-last // TILE))
    while tiles.shape[2] < most:
        tiles = torch.cat((tiles, jump.gather(2, tiles)), dim=2)
        jump = jump.gather(2, jump)
    tiles = (tiles[..., :most] - (TILE - 1)).contiguous()

    first = _first_rows(tokens, device)
    firsts = first.expand(*offsets.shape[:2], -1).contiguous()
    distances = TILE * (len(first) - 1)  # the farthest that a row tile sees
    held = tiles[..., None] + torch.arange(TILE, device=device)
    held = torch.where((held >= 1) & (held <= distances), held - 1, distances).flatten(2)
    covered = torch.zeros(*offsets.shape[:2], distances + 1, dtype=torch.uint8, device=device).scatter_(2, held, 1)
    return SparseIndex(
        tokens=tokens,
        tiles=tiles[:, :, None].int(),
        tile_counts=torch.searchsorted(tiles, firsts, right=True, out_int32=True),
        columns=columns.int(),
        column_counts=torch.searchsorted(columns.long().contiguous(), firsts, out_int32=True),
        covered=covered[..., :-1],
    )


def block_index(blocks: Int[Tensor, "batch q_heads row_tiles blocks"], tokens: int) -> SparseIndex:
    """List blocks of 64 columns for each row tile: block j holds the columns [64·j, 64·j + 63].

    Args:
        blocks: without repeats; row tile m's own block m must be among them, and those after it are ignored.
        tokens: n ≥ 1.
    """
    own = torch.arange(blocks.shape[2], device=blocks.device)[:, None]
    back = own - blocks.long()
    tiles = torch.where(back >= 0, TILE * back - (TILE - 1), tokens + TILE).sort(dim=3).values
    nothing = blocks.new_zeros(*blocks.shape[:2], 0)
    return SparseIndex(
        tokens=tokens,
        tiles=tiles.int(),
        tile_counts=(back >= 0).sum(dim=3, dtype=torch.int32),
        columns=nothing.int(),
        column_counts=torch.zeros(blocks.shape[:3], dtype=torch.int32, device=blocks.device),
        covered=nothing.to(torch.uint8),
    )


def top_indices(scores: Float[Tensor, "*rows size"], keep: int) -> Int[Tensor, "*rows keep"]:
    """Return the places of the `keep` ≤ size highest float32 scores, ascending; equal scores go to the lowest place.

    `torch.topk` breaks ties as it likes, so score and place go into one integer: no two are equal.
    """
    size = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32)  # −0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
    keys = (ordered << 32) + torch.arange(size - 1, -1, -1, device=scores.device)
    chosen = keys.topk(keep, dim=-1, sorted=False).values
    return (size - 1 - (chosen & 0xFFFFFFFF)).sort(dim=-1).values


def _first_rows(tokens: int, device: torch.device) -> Tensor:
    """Return the first row of each row tile."""
    return torch.arange(0, tokens, TILE, device=device)
