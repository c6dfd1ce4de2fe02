"""What a plan is made of: the blocks of the document, and each host's share of them. Integers only."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

__all__ = ["Block", "HostPlan", "cut_anchor", "cut_blocks", "share_out"]


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
    anchor_spans: tuple[tuple[int, int], ...]
    """The ranges `[start, stop)` of the anchor's rows that this host runs: all, none, or its share of a split one."""
    blocks: tuple[Block, ...]
    query_rows: int
    kept_anchor: tuple[tuple[int, int], ...] = ()
    """Those of them whose keys stay here after the prefill, if the anchor's tokens belong to no block."""

    @property
    def anchor_rows(self) -> int:
        """Rows of the anchor that run here."""
        return _length(self.anchor_spans)

    @property
    def block_rows(self) -> int:
        """Document tokens in this host's blocks."""
        return sum(block.tokens for block in self.blocks)

    @property
    def held_rows(self) -> int:
        """Document tokens whose keys and values stay here after the prefill."""
        return self.block_rows + _length(self.kept_anchor)

    @cached_property
    def held_tokens(self) -> tuple[tuple[int, int], ...]:
        """The document's ranges `[start, stop)` that stay here, in the cache's order: blocks, then a kept anchor."""
        return (*((block.start, block.stop) for block in self.blocks), *self.kept_anchor)

    @cached_property
    def block_spans(self) -> tuple[slice, ...]:
        """Where each block's rows stand among this host's rows."""
        edges = accumulate((block.tokens for block in self.blocks), initial=self.anchor_rows)
        return tuple(slice(start, stop) for start, stop in pairwise(edges))

    @property
    def held_spans(self) -> tuple[slice, ...]:
        """Where `held_tokens` stand among this host's rows."""
        blocks = slice(self.anchor_rows, self.anchor_rows + self.block_rows)
        return (blocks, *(self.anchor_slice(*span) for span in self.kept_anchor))

    def anchor_slice(self, start: int, stop: int) -> slice:
        """Where rows `[start, stop)` of the anchor stand among this host's rows; those that it does not run, nowhere.

        >>> HostPlan(rank=0, anchor_spans=((0, 2), (6, 8)), blocks=(), query_rows=0).anchor_slice(1, 7)
        slice(1, 3, None)
        """
        first, last = (sum(min(max(x - a, 0), b - a) for a, b in self.anchor_spans) for x in (start, stop))
        return slice(first, last)

    @property
    def rows(self) -> int:
        """Rows that run through the model on this host."""
        return self.anchor_rows + self.block_rows + self.query_rows


def _length(spans: tuple[tuple[int, int], ...]) -> int:
    return sum(stop - start for start, stop in spans)


def cut_anchor(rows: int, hosts: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return host `rank`'s share of the anchor's rows: of 2 · hosts pieces, numbers rank and 2 · hosts − 1 − rank.

    Row i attends to i + 1 keys, so that all shares are as much work; pieces differ by a row at most.

    >>> [cut_anchor(8, 2, rank) for rank in range(2)], cut_anchor(1, 2, 1)
    ([((0, 2), (6, 8)), ((2, 6),)], ())
    """
    edges = [rows * i // (2 * hosts) for i in range(2 * hosts + 1)]
    near, far = ((edges[i], edges[i + 1]) for i in (rank, 2 * hosts - 1 - rank))
    spans = ((near[0], far[1]),) if near[1] == far[0] else (near, far)
    return tuple((start, stop) for start, stop in spans if start < stop)


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


def share_out(
    blocks: tuple[Block, ...],
    *,
    anchor_rows: int,
    query_rows: int,
    anchor_on_first: bool,
    keep_anchor: bool,
    split_anchor: bool,
    split_cache: bool,
) -> tuple[HostPlan, ...]:
    """Return every host's share, in rank order.

    The anchor runs on hosts with a block that sees it or that keep it; split, on all hosts as soon as one needs it.

    Args:
        blocks: all of them, one or two a host.
        anchor_rows: of the whole anchor.
        query_rows: of the query that runs along on every host.
        anchor_on_first: whether the first block's host needs the anchor, too.
        keep_anchor: whether its keys stay after the prefill, on the last block's host unless `split_cache`.
        split_anchor, split_cache: whether the hosts share its rows, and the keys that stay.
    """
    hosts, owner = 1 + max(block.rank for block in blocks), blocks[-1].rank
    by_rank = [tuple(block for block in blocks if block.rank == rank) for rank in range(hosts)]
    needs = [
        any(block.tokens > 0 if block.sees_anchor else anchor_on_first for block in mine)
        or (keep_anchor and (split_cache or rank == owner))
        for rank, mine in enumerate(by_rank)
    ]
    whole = ((0, anchor_rows),) if anchor_rows else ()
    plans = []
    for rank, mine in enumerate(by_rank):
        share = cut_anchor(anchor_rows, hosts, rank)
        kept = share if split_cache else whole if rank == owner else ()
        runs = (share if any(needs) else ()) if split_anchor else (whole if needs[rank] else ())
        plans.append(
            HostPlan(
                rank=rank,
                anchor_spans=runs,
                blocks=mine,
                query_rows=query_rows,
                kept_anchor=kept if keep_anchor else (),
            )
        )
    return tuple(plans)
