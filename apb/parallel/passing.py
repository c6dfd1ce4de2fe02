"""The passing-block communicator: one asynchronous all-gather of kept keys and values per layer and block."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from apb.parallel.gradient import all_gather
from apb.parallel.host import Handle, Host
from apb.plan import Block, ContextPlan

__all__ = ["PassingBlocks", "gather_document"]


class PassingBlocks:
    """Send what this host's blocks kept, and assemble what its blocks receive (APB section 3.5).

    The passing block of document block i is what blocks 0 … i − 1 kept, in the document's order. K and V travel as one
    message of `(H − 1) · kept · Hkv · 2d` values per host; shares shorter than the longest are padded. If K or V want a
    gradient, on every host, so does what is received: in the backward pass each host gets back what all blocks that
    read its K and V make of them, and every host must run it (`apb.parallel.gradient`).

        passing = PassingBlocks(plan, host)
        passing.start(0, kept_k, kept_v)      # returns at once
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
        k: Float[Tensor, "batch kv_heads kept dim"],
        v: Float[Tensor, "batch kv_heads kept dim"],
    ) -> None:
        """Start gathering what block number `slot` of every host kept.

        Args:
            slot: 0, then 1 in the zigzag layout; every host starts them in this order.
            k, v: this host's kept keys and values, `kept_tokens` of them, after RoPE.

        Raises:
            ValueError: slots out of order, or not the number of tokens that the plan says this block passes.
        """
        if slot != len(self._gathers) or slot >= self.plan.blocks_per_host:
            raise ValueError(
                f"slot: expected {len(self._gathers)} (of {self.plan.blocks_per_host}, each once, in order), got {slot}"
            )
        planned = self.plan.host(self.host.rank).blocks[slot].kept_tokens
        if k.ndim != 4 or k.shape != v.shape or k.shape[2] != planned:
            raise ValueError(
                f"k, v: shapes {tuple(k.shape)} and {tuple(v.shape)}, expected {planned} tokens along dim 2, what the "
                f"plan passes on from rank {self.host.rank}'s block number {slot}"
            )
        message = torch.cat((k, v), dim=-1)
        self._nothing = message[:, :, :0]
        padding = self.plan.message_tokens(slot) - planned
        if padding:
            message = F.pad(message, (0, 0, 0, padding))
        if message.shape[2]:
            after = self._gathers[-1] if self._gathers else None
            self._gathers.append(all_gather(message, self.host, what="passing", after=after))
        else:
            self._gathers.append(Handle(lambda: [self._nothing] * self.host.world_size))

    def wait(
        self, block: Block
    ) -> tuple[Float[Tensor, "batch kv_heads passing dim"], Float[Tensor, "batch kv_heads passing dim"]]:
        """Return the passing block of `block`, one of the plan's: K and V kept by every earlier block.

        Raises:
            ValueError: not every gather has been started.
            HostFailed: another host failed.
        """
        if len(self._gathers) < self.plan.blocks_per_host:
            raise ValueError(
                f"wait: {len(self._gathers)} of {self.plan.blocks_per_host} gathers are started; start them all first"
            )
        parts = [self._nothing]
        if self._nothing.requires_grad:  # every block's backward pass reaches the gathers, also one that reads nothing
            slot = self.plan.host(self.host.rank).blocks.index(block)
            parts = [message[:, :, :0] for message in self._gathers[slot].wait()[:1]]
        for earlier in self.plan.blocks[: block.index]:
            slot = self.plan.host(earlier.rank).blocks.index(earlier)
            message = self._gathers[slot].wait()[earlier.rank]
            parts.append(message[:, :, : earlier.kept_tokens])
        k, v = torch.cat(parts, dim=2).chunk(2, dim=-1)
        return k, v

    def finish(self) -> None:
        """Wait for every gather started, also for those that none of this host's blocks reads."""
        for gather in self._gathers:
            gather.wait()


def gather_document(
    x: Float[Tensor, "batch heads rows dim"], plan: ContextPlan, host: Host
) -> Float[Tensor, "batch heads tokens dim"]:
    """Return every host's block rows of `x`, joined in the document's order. For oracles: it moves everything."""
    share = plan.host(host.rank)
    longest = max(other.block_rows for other in plan.host_plans)
    mine = x[:, :, share.anchor_rows : share.anchor_rows + share.block_rows]
    parts = host.all_gather(F.pad(mine, (0, 0, 0, longest - share.block_rows)), what="document").wait()
    return plan.join(
        [part[:, :, : other.block_rows] for part, other in zip(parts, plan.host_plans, strict=True)], dim=2
    )
