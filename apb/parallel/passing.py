"""The passing-block communicator: one asynchronous all-gather of kept keys and values per layer and block."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apb.parallel.gradient import all_gather
from apb.parallel.host import Handle, Host
from apb.plan import Block, ContextPlan

__all__ = ["PassingBlocks", "gather_document", "gather_query", "query_spans"]


class PassingBlocks:
    """Send what this host's blocks kept, and assemble what its blocks receive (APB section 3.5).

    The passing block of document block i is what blocks 0 … i − 1 kept, in the document's order. K and V travel as one
    message of `(H − 1) · kept · Hkv · 2d` values per host; shares shorter than the longest are padded. If the plan
    splits the anchor, the hosts' shares of its K and V travel at the head of the first message. If K or V want a
    gradient, on every host, so does what is received: in the backward pass each host gets back what all blocks that
    read its K and V make of them, and every host must run it (`apb.parallel.gradient`).

        passing = PassingBlocks(plan, host)
        passing.start(0, kept.message)        # returns at once
        …                                     # work that does not need the passing block
        k, v = passing.wait(block)            # [batch, kv_heads, block.passing_tokens, dim] each
        passing.finish()                      # when all blocks have theirs
    """

    def __init__(self, plan: ContextPlan, host: Host) -> None:
        plan.check_group(host.world_size)
        self.plan = plan
        self.host = host
        self._gathers: list[Handle[list[Tensor]]] = []
        self._nothing: Tensor

    def start(
        self,
        slot: int,
        kept: Float[Tensor, "batch kv_heads kept both_dims"],
        *,
        anchor: Float[Tensor, "batch kv_heads share both_dims"] | None = None,
    ) -> None:
        """Start gathering what block number `slot` of every host kept.

        Args:
            slot: 0, then 1 in the zigzag layout; every host starts them in this order.
            kept: K and V side by side (`Kept.message`, or torch.cat((k, v), dim=-1)) of this host's kept tokens, after
                RoPE, `kept_tokens` of them.
            anchor: K and V of this host's share of a split anchor, side by side; read with slot 0.

        Raises:
            ValueError: slots out of order, or not the number of tokens that the plan says this block passes.
        """
        if slot != len(self._gathers) or slot >= self.plan.blocks_per_host:
            raise ValueError(
                f"slot: expected {len(self._gathers)} (of {self.plan.blocks_per_host}, each once, in order), got {slot}"
            )
        share = self.plan.host(self.host.rank)
        self._check("kept", kept, share.blocks[slot].kept_tokens, f"passes on from its block number {slot}")
        message, self._nothing = kept, kept[:, :, :0]
        if self.plan.split_anchor and slot == 0:
            own = self._nothing if anchor is None else anchor
            self._check("anchor", own, share.anchor_rows, "runs of a split anchor")
            message = torch.cat((own, kept), dim=2)
        padding = self.plan.message_tokens(slot) - message.shape[2]
        if padding:
            message = F.pad(message, (0, 0, 0, padding))
        if message.shape[2]:
            after = self._gathers[-1] if self._gathers else None
            self._gathers.append(all_gather(message, self.host, what="passing", after=after))
        else:
            self._gathers.append(Handle(lambda: [self._nothing] * self.host.world_size))

    def _check(self, name: str, x: Tensor, planned: int, why: str) -> None:
        if x.ndim != 4 or x.shape[2] != planned:
            raise ValueError(
                f"{name}: shape {tuple(x.shape)}, expected [batch, kv_heads, {planned} tokens, K and V side by side], "
                f"what rank {self.host.rank} {why}"
            )

    def wait(
        self, block: Block
    ) -> tuple[Float[Tensor, "batch kv_heads passing dim"], Float[Tensor, "batch kv_heads passing dim"]]:
        """Return the passing block of `block`, one of the plan's: K and V kept by every earlier block.

        Raises:
            ValueError: not every gather has been started.
            HostFailed: another host failed.
        """
        k, v = torch.cat(self.received(block), dim=2).chunk(2, dim=-1)
        return k, v

    def received(self, block: Block) -> list[Float[Tensor, "batch kv_heads kept both_dims"]]:
        """Return what `wait` does as it came, block by block, K and V side by side; errors as `wait`.

        Only the gathers that these blocks went into are waited for, so that a host's first block can attend while its
        second gather is under way.
        """
        if len(self._gathers) < self.plan.blocks_per_host:
            raise ValueError(
                f"wait: {len(self._gathers)} of {self.plan.blocks_per_host} gathers are started; start them all first"
            )
        parts = [self._nothing]
        if self._nothing.requires_grad:  # every block's backward pass reaches the gathers, also one that reads nothing
            slot = block.index // self.plan.hosts
            parts = [message[:, :, :0] for message in self._gathers[slot].wait()[:1]]
        for earlier in self.plan.blocks[: block.index]:
            sender = self.plan.host(earlier.rank)
            slot = earlier.index // self.plan.hosts
            first = sender.anchor_rows if self.plan.split_anchor and slot == 0 else 0
            parts.append(self._gathers[slot].wait()[earlier.rank][:, :, first : first + earlier.kept_tokens])
        return parts

    def anchor(self) -> Float[Tensor, "batch kv_heads anchor both_dims"]:
        """Return all rows of a split anchor in their order, K and V side by side.

        Raises:
            HostFailed: another host failed.
        """
        messages = self._gathers[0].wait()
        pieces = {
            (start, stop): messages[share.rank][:, :, share.anchor_slice(start, stop)]
            for share in self.plan.host_plans
            for start, stop in share.anchor_spans
        }
        return torch.cat([self._nothing, *(pieces[span] for span in sorted(pieces))], dim=2)

    def finish(self) -> None:
        """Wait for every gather started, also for those that none of this host's blocks reads."""
        for gather in self._gathers:
            gather.wait()


def gather_query(
    q: Float[Tensor, "batch heads rows dim"], plan: ContextPlan, host: Host
) -> Float[Tensor, "batch heads query dim"]:
    """Return the question's vectors from inside the anchor: this host's own, or gathered if the anchor is split."""
    first, last = plan.query_offset, plan.query_offset + plan.query
    mine = q[:, :, plan.host(host.rank).anchor_slice(first, last)].detach()
    if not plan.split_anchor:
        return mine
    pieces = query_spans(plan)
    longest = max(sum(stop - start for start, stop in spans) for spans in pieces)
    parts = host.all_gather(F.pad(mine, (0, 0, 0, longest - mine.shape[2])), what="query").wait()
    found: dict[int, Tensor] = {}
    for part, spans in zip(parts, pieces, strict=True):
        lengths = [stop - start for start, stop in spans]
        cut = part[:, :, : sum(lengths)].split(lengths, dim=2) if lengths else ()
        found.update(zip((start for start, _ in spans), cut, strict=True))
    return torch.cat([found[start] for start in sorted(found)], dim=2)


def query_spans(plan: ContextPlan) -> list[list[tuple[int, int]]]:
    """Return, by rank, the anchor's rows `[start, stop)` that hold the question and run there."""
    first, last = plan.query_offset, plan.query_offset + plan.query
    clipped = [[(max(a, first), min(b, last)) for a, b in share.anchor_spans] for share in plan.host_plans]
    return [[(a, b) for a, b in spans if a < b] for spans in clipped]


def gather_document(
    x: Float[Tensor, "batch heads rows dim"], plan: ContextPlan, host: Host
) -> Float[Tensor, "batch heads tokens dim"]:
    """Return every host's document rows of `x`, joined in the document's order. For oracles: it moves everything."""
    share = plan.host(host.rank)
    longest = max(other.held_rows for other in plan.host_plans)
    mine = torch.cat([x[:, :, span] for span in share.held_spans], dim=2)
    parts = host.all_gather(F.pad(mine, (0, 0, 0, longest - share.held_rows)), what="document").wait()
    return plan.join([part[:, :, : other.held_rows] for part, other in zip(parts, plan.host_plans, strict=True)], dim=2)
