"""What a plan is made of: the blocks of the document, and each host's share of them. Integers only."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

__all__ = ["Block", "HostPlan", "cut_blocks"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of document tokens `[start, stop)` that one host holds, and what it passes and receives."""

    index: int
    """Place in the document's order of blocks."""
    rank: int
    """Host that holds it."""
    start: int
    stop: int
    skipped: int
    """First tokens of the block that are never passed: every later block sees them as anchor."""
    kept_tokens: int
    """Tokens it passes on: min(l_p, tokens − skipped); 0 for the last block, which nobody reads."""
    passing_tokens: int
    """Tokens it receives: what all earlier blocks kept."""
    sees_anchor: bool
    """Whether its rows attend to the anchor: not the first block, unless the anchor's tokens belong to no block."""

    @property
    def tokens(self) -> int:
        """Length of the block."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """One host's share. Its rows are, in this order, [anchor, blocks …, query that runs along]."""

    rank: int
    anchor_rows: int
    blocks: tuple[Block, ...]
    query_rows: int
    keeps_anchor: bool
    """Whether the anchor's keys stay here after the prefill: they belong to no block, and this host is the owner."""

    @property
    def block_rows(self) -> int:
        """Document tokens in this host's blocks."""
        return sum(block.tokens for block in self.blocks)

    @property
    def held_rows(self) -> int:
        """Document tokens whose keys and values stay here after the prefill."""
        return self.block_rows + (self.anchor_rows if self.keeps_anchor else 0)

    @cached_property
    def held_tokens(self) -> tuple[tuple[int, int], ...]:
        """The document's ranges `[start, stop)` that stay here, in the cache's order: blocks, then a kept anchor."""
        kept = ((0, self.anchor_rows),) if self.keeps_anchor else ()
        return (*((block.start, block.stop) for block in self.blocks), *kept)

    @cached_property
    def block_spans(self) -> tuple[slice, ...]:
        """Where each block's rows stand among this host's rows."""
        edges = accumulate((block.tokens for block in self.blocks), initial=self.anchor_rows)
        return tuple(slice(start, stop) for start, stop in pairwise(edges))

    @property
    def held_spans(self) -> tuple[slice, ...]:
        """Where `held_tokens` stand among this host's rows."""
        blocks = slice(self.anchor_rows, self.anchor_rows + self.block_rows)
        return (blocks, slice(0, self.anchor_rows)) if self.keeps_anchor else (blocks,)

    @property
    def rows(self) -> int:
        """Rows that run through the model on this host."""
        return self.anchor_rows + self.block_rows + self.query_rows


def cut_blocks(
    *, start: int, stop: int, hosts: int, zigzag: bool, skipped: int, passing: int, anchor_on_all: bool
) -> tuple[Block, ...]:
    """Cut document tokens `[start, stop)` into blocks of equal length, in order; the last may be shorter, or empty.

    Args:
        start, stop: the range to cut.
        hosts: host r gets block r and, in zigzag, block 2 · hosts − 1 − r too.
        zigzag: cut two blocks a host.
        skipped: first tokens of the first block that are not passed on.
        passing: most tokens a block passes on; the last block passes none.
        anchor_on_all: whether the first block sees the anchor too.
    """
    count = hosts * (2 if zigzag else 1)
    longest = -(-(stop - start) // count)
    blocks, passed = [], 0
    for index in range(count):
        first, last = (min(start + i * longest, stop) for i in (index, index + 1))
        left_out = min(skipped, last - first) if index == 0 else 0
        kept = 0 if index == count - 1 else min(passing, last - first - left_out)
        blocks.append(
            Block(
                index=index,
                rank=index if index < hosts else 2 * hosts - 1 - index,
                start=first,
                stop=last,
                skipped=left_out,
                kept_tokens=kept,
                passing_tokens=passed,
                sees_anchor=index > 0 or anchor_on_all,
            )
        )
        passed += kept
    return tuple(blocks)
