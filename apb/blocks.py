"""What a plan is made of: the blocks of the document, and each host's share of them. Integers only."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

__all__ = ["Block", "HostPlan"]


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

    @property
    def tokens(self) -> int:
        """Length of the block."""
        return self.stop - self.start

    @property
    def sees_anchor(self) -> bool:
        """Whether its rows attend to the anchor: all but the first block, which holds those tokens itself."""
        return self.index > 0


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """One host's share. Its rows are, in this order, [anchor, blocks …, query that runs along]."""

    rank: int
    anchor_rows: int
    blocks: tuple[Block, ...]
    query_rows: int

    @property
    def block_rows(self) -> int:
        """Document tokens that this host holds."""
        return sum(block.tokens for block in self.blocks)

    @cached_property
    def block_spans(self) -> tuple[slice, ...]:
        """Where each block's rows stand among this host's rows."""
        edges = accumulate((block.tokens for block in self.blocks), initial=self.anchor_rows)
        return tuple(slice(start, stop) for start, stop in pairwise(edges))

    @property
    def rows(self) -> int:
        """Rows that run through the model on this host."""
        return self.anchor_rows + self.block_rows + self.query_rows
