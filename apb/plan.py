"""The context splitter: who holds which tokens, at which positions, and what travels.

A `ContextPlan` is frozen data made of integers. It knows the document's length, not its tokens, and everything else in
this package follows from it: each host's rows, their RoPE positions, what travels, how many query–key pairs are scored.
Its only verbs on tensors are `split`, `join` and `host_rows`.

| here | in the paper |
| --- | --- |
| `tokens`, `hosts` | n, H |
| `block_tokens` | l_b |
| `anchor`, `passing`, `query` | l_a, l_p, l_q |
| `query_offset` | s, the prefix (BOS, system prompt) that stays before the query in the anchor |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from apb.blocks import Block, HostPlan, cut_blocks, share_out

__all__ = ["Block", "ContextPlan", "HostPlan", "Layout", "QueryIn", "plan_context"]

Layout = Literal["contiguous", "zigzag"]
QueryIn = Literal["anchor", "prefill", "after"]


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """How `tokens` document tokens are split over `hosts` hosts. Make one with `plan_context`."""

    tokens: int
    hosts: int
    anchor: int
    passing: int
    query: int
    query_offset: int
    query_in: QueryIn
    anchor_on_first: bool
    layout: Layout
    shared_prefix: bool
    reuse_positions: bool
    split_anchor: bool
    split_anchor_cache: bool

    @property
    def blocks_per_host(self) -> int:
        """How many blocks each host holds: 1, or 2 in zigzag."""
        return 2 if self.layout == "zigzag" else 1

    @property
    def block_tokens(self) -> int:
        """l_b = ceil(n / number of blocks), a shared prefix apart; the last blocks may be shorter, or empty."""
        cut = self.tokens - self.anchor * self.shared_prefix
        return -(-cut // (self.hosts * self.blocks_per_host))

    @property
    def anchor_rows(self) -> int:
        """Rows of the anchor: l_a document tokens and the query embedded among them; without an anchor, none."""
        return self.anchor + (self.query if self.anchor and self.query_in == "anchor" else 0)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in the document's order."""
        return cut_blocks(
            start=self.anchor if self.shared_prefix else 0,
            stop=self.tokens,
            hosts=self.hosts,
            zigzag=self.layout == "zigzag",
            skipped=0 if self.shared_prefix else self.anchor,
            passing=self.passing,
            anchor_on_all=self.shared_prefix,
        )

    @cached_property
    def host_plans(self) -> tuple[HostPlan, ...]:
        """Every host's share, in rank order."""
        return share_out(
            self.blocks,
            anchor_rows=self.anchor_rows,
            query_rows=self.query * (self.query_in == "prefill"),
            anchor_on_first=self.anchor_on_first,
            keep_anchor=self.shared_prefix,
            split_anchor=self.split_anchor,
            split_cache=self.split_anchor or self.split_anchor_cache,
        )

    @property
    def owner(self) -> int:
        """Rank that holds the end of the document, and so owns the query's and the new tokens' keys and values."""
        return self.blocks[-1].rank

    def host(self, rank: int) -> HostPlan:
        """Return the share of host `rank`.

        Raises:
            ValueError: no such rank.
        """
        if not 0 <= rank < self.hosts:
            raise ValueError(f"rank: expected 0 to {self.hosts - 1}, got {rank}")
        return self.host_plans[rank]

    def check_group(self, world_size: int) -> None:
        """Check that the plan is for a group of `world_size` hosts.

        Raises:
            ValueError: naming both numbers.
        """
        if self.hosts != world_size:
            raise ValueError(
                f"plan: made for {self.hosts} hosts, but the group has {world_size}; plan with hosts=host.world_size"
            )

    def message_tokens(self, slot: int) -> int:
        """Return how many tokens of K and V each host puts into gather number `slot` (of its block number `slot`).

        They are what that block keeps, and in the first gather the host's share of a split anchor; as an all-gather
        wants equal shares, all are padded to the longest.
        """
        shared = self.split_anchor and slot == 0
        return max(host.blocks[slot].kept_tokens + host.anchor_rows * shared for host in self.host_plans)

    def split(self, x: Tensor, *, dim: int = -1) -> list[Tensor]:
        """Cut the document's tokens (along `dim`) into what each host holds, in rank order.

        Raises:
            ValueError: `x` does not have `tokens` entries along `dim`.
        """
        if x.shape[dim] != self.tokens:
            raise ValueError(f"x: {x.shape[dim]} tokens along dim {dim}, the plan is for {self.tokens}")
        return [
            torch.cat([x.narrow(dim, start, stop - start) for start, stop in host.held_tokens], dim=dim)
            for host in self.host_plans
        ]

    def join(self, parts: Sequence[Tensor], *, dim: int = -1) -> Tensor:
        """Put the hosts' parts (in rank order) back into the document's order; the inverse of `split`.

        Raises:
            ValueError: not one part a host, or a part of another length than the plan gives that host.
        """
        expected, lengths = [host.held_rows for host in self.host_plans], [part.shape[dim] for part in parts]
        if lengths != expected:
            raise ValueError(f"parts: lengths {lengths} along dim {dim}, the plan's hosts hold {expected}")
        pieces: dict[tuple[int, int], Tensor] = {}
        for host, part in zip(self.host_plans, parts, strict=True):
            cut = torch.split(part, [stop - start for start, stop in host.held_tokens], dim=dim)
            pieces.update(zip(host.held_tokens, cut, strict=True))
        return torch.cat([pieces[held] for held in sorted(pieces)], dim=dim)

    def host_rows(
        self, rank: int, document: Int[Tensor, "*batch tokens"], query: Int[Tensor, "*batch query"]
    ) -> Int[Tensor, "*batch rows"]:
        """Return the token ids of host `rank`'s rows: the anchor, its blocks, the running query.

        The anchor is [doc[:s], query, doc[s:l_a]], or of a split one this host's spans.

        Raises:
            ValueError: `document` or `query` does not have the planned length.
        """
        for name, ids, planned in (("document", document, self.tokens), ("query", query, self.query)):
            if ids.shape[-1] != planned:
                raise ValueError(f"{name}: {ids.shape[-1]} tokens, the plan is for {planned}")
        host, parts = self.host(rank), []
        if host.anchor_rows:
            embedded = query if self.query_in == "anchor" else query[..., :0]
            s = min(self.query_offset, self.anchor)
            anchor = torch.cat((document[..., :s], embedded, document[..., s : self.anchor]), dim=-1)
            parts += [anchor[..., start:stop] for start, stop in host.anchor_spans]
        parts += [document[..., block.start : block.stop] for block in host.blocks]
        if host.query_rows:
            parts.append(query)
        return torch.cat(parts, dim=-1)

    def positions(self, rank: int) -> Int[Tensor, " rows"]:
        """Return the RoPE position of each of host `rank`'s rows.

        The anchor counts 0 … l_a + l_q − 1; blocks have their true positions, or, reused, all begin where the anchor
        ends; a running query begins at `next_position`.
        """
        host = self.host(rank)
        parts = [torch.arange(start, stop) for start, stop in host.anchor_spans]
        for block in host.blocks:
            first = self.anchor_rows if self.reuse_positions else block.start
            parts.append(torch.arange(first, first + block.tokens))
        parts.append(torch.arange(self.next_position, self.next_position + host.query_rows))
        return torch.cat(parts)

    @property
    def next_position(self) -> int:
        """The RoPE position of what follows the document: n, or behind the longest block if positions are reused."""
        return self.anchor_rows + self.block_tokens if self.reuse_positions else self.tokens

    def __str__(self) -> str:
        """Describe the plan, a line a block."""
        inside = self.query_in == "prefill" or (self.query_in == "anchor" and self.anchor)
        place = f"in the {self.query_in}" if inside else "after the prefill"
        query = f"query {self.query} {place}" if self.query else "no query"
        start = "split " * self.split_anchor + ("shared prefix" if self.shared_prefix else "anchor")
        layout = self.layout + ", positions reused" * self.reuse_positions
        lines = [
            f"{self.tokens} tokens over {self.hosts} host{'s' * (self.hosts > 1)}, {layout}: "
            f"block {self.block_tokens}, {start} {self.anchor}, passing {self.passing}, {query}",
            "rank  block  tokens               anchor rows  receives  passes on",
        ]
        for host in self.host_plans:
            for b in host.blocks:
                held = f"{host.rank:>4}  {b.index:>5}  {f'[{b.start}, {b.stop})':<19}  {host.anchor_rows:>11}"
                lines.append(f"{held}  {b.passing_tokens:>8}  {b.kept_tokens:>9}")
        return "\n".join(lines)


def plan_context(
    *,
    tokens: int,
    hosts: int,
    anchor: int = 0,
    passing: int = 0,
    query: int = 0,
    query_offset: int = 0,
    query_in: QueryIn = "anchor",
    anchor_on_first: bool = False,
    layout: Layout = "contiguous",
    shared_prefix: bool = False,
    reuse_positions: bool = False,
    split_anchor: bool = False,
    split_anchor_cache: bool = False,
) -> ContextPlan:
    """Split a document of `tokens` tokens over `hosts` hosts (APB section 3.2).

    Args:
        tokens: n, document tokens, ≥ 1. The query is not among them.
        hosts: H ≥ 1. With more hosts than tokens the last ones hold nothing.
        anchor: l_a, document tokens in the anchor, 0 ≤ l_a ≤ block_tokens (a shared prefix: ≤ n); 0 is no anchor, so
            no query in it either.
        passing: l_p ≥ 0, the most tokens each block passes on.
        query: l_q ≥ 0, query tokens. 0 gives a query-free plan, whose caches serve any question.
        query_offset: s, document tokens before the query in the anchor, 0 ≤ s ≤ l_a; without a query there, ignored.
        query_in: "anchor" embeds the query in the anchor (APB); "prefill" lets it run along behind every host's blocks,
            for compressors to read (Spava); "after" leaves it to the caches, which then serve any question.
        anchor_on_first: let the first block's host run the anchor's rows too, for compressors that read the vectors of
            the query inside it.
        layout: "contiguous" gives host r block r; "zigzag" cuts 2H blocks and gives it blocks r and 2H − 1 − r.
        shared_prefix: the anchor's tokens belong to no block: the blocks split what follows them, every block sees
            them, and the owner keeps their keys (APE). Without a query among them.
        reuse_positions: every block begins at the position where the anchor ends (APE).
        split_anchor: every host runs a share of the anchor's rows, not all of them, and the shares' keys and values
            travel with what the first blocks keep: the same mathematics, (l_a + l_q)/H rows a host.
        split_anchor_cache: all hosts keep shares of a shared prefix, not its owner all (Spava; so in `split_anchor`).

    Raises:
        ValueError: naming the argument, what came, what was expected and the way out.
    """
    for name, value, least in (
        ("tokens", tokens, 1),
        ("hosts", hosts, 1),
        ("anchor", anchor, 0),
        ("passing", passing, 0),
        ("query", query, 0),
        ("query_offset", query_offset, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer ≥ {least}, got {value!r}")
    for name, value, choices in (("layout", layout, get_args(Layout)), ("query_in", query_in, get_args(QueryIn))):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    if reuse_positions and not shared_prefix:
        raise ValueError("reuse_positions: blocks that begin where the anchor ends need shared_prefix=True, got False")
    plan = ContextPlan(
        tokens=tokens, hosts=hosts, anchor=anchor, passing=passing, query=query, query_offset=query_offset,
        query_in=query_in, anchor_on_first=anchor_on_first, layout=layout, shared_prefix=shared_prefix,
        reuse_positions=reuse_positions, split_anchor=split_anchor, split_anchor_cache=split_anchor_cache,
    )  # fmt: skip
    if shared_prefix and (anchor > tokens or plan.anchor_rows > anchor):
        raise ValueError(
            f"anchor: a shared prefix of {anchor} tokens with {plan.anchor_rows - anchor} of the query among them; "
            f"expected at most the document's {tokens} tokens, and query_in='after' or 'prefill'"
        )
    if anchor > plan.block_tokens and not shared_prefix:
        raise ValueError(
            f"anchor: {anchor} tokens reach into the second block, whose tokens would be seen twice; expected at "
            f"most block_tokens = {plan.block_tokens}. Use a shorter anchor or fewer hosts"
        )
    if plan.anchor_rows > anchor and query_offset > anchor:
        raise ValueError(
            f"query_offset: the query follows {query_offset} document tokens in the anchor, which has {anchor}; "
            f"expected at most {anchor}. Use a longer anchor, or query_in='prefill'"
        )
    if len(plan.blocks) > 1 and plan.anchor_rows > max(anchor, plan.block_tokens):
        raise ValueError(
            f"query: {query} tokens beside an anchor of {anchor} take positions 0 … {plan.anchor_rows - 1}, past the "
            f"start of the second block at {plan.block_tokens}; expected at most {plan.block_tokens - anchor} query "
            f"tokens. Use a shorter anchor, fewer hosts, or query_in='prefill'"
        )
    return plan
