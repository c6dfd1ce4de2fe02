"""What a plan costs each host: query–key pairs, FLOPs, bytes and messages, per layer.

Counted from the plan's blocks, so that they can be checked against the closed formulas and against a mask.
"""

from dataclasses import dataclass

from apb.plan import ContextPlan

__all__ = ["HostCost", "ModelShape", "attention_pairs", "host_cost"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder layer that costs depend on."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    layers: int
    bytes_per_value: int = 2

    @property
    def linear_flops_per_token(self) -> int:
        """FLOPs of one token in one layer outside attention: QKV and O projections and a gated FFN (2 per MAC)."""
        projections = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return 2 * (projections + 3 * self.hidden * self.ffn)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return self.kv_heads * 2 * self.head_dim * self.bytes_per_value


LLAMA_3_1_8B = ModelShape(hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, layers=32)


@dataclass(frozen=True, kw_only=True)
class HostCost:
    """One host's cost in one layer, for one batch entry.

    Pairs are summed over the query heads; FLOPs count a multiply–add as 2.
    """

    rows: int
    pairs: int
    attention_flops: int
    linear_flops: int
    sent_bytes: int
    messages: int
    cache_bytes: int

    @property
    def flops(self) -> int:
        """Attention and linear FLOPs together."""
        return self.attention_flops + self.linear_flops


def attention_pairs(plan: ContextPlan, rank: int) -> int:
    """Count the query–key pairs that host `rank` scores for each query head.

    Anchor a(a+1)/2, or this host's spans of it; each block b(a + p) + b(b+1)/2; a running query sees what the host
    keeps, and on the owner itself.
    """
    host = plan.host(rank)
    pairs = sum((stop * (stop + 1) - start * (start + 1)) // 2 for start, stop in host.anchor_spans)
    for block in host.blocks:
        seen = (plan.anchor_rows if block.sees_anchor else 0) + block.passing_tokens
        pairs += block.tokens * seen + block.tokens * (block.tokens + 1) // 2
    pairs += host.query_rows * host.held_rows
    if rank == plan.owner:
        pairs += host.query_rows * (host.query_rows + 1) // 2
    return pairs


def host_cost(
    plan: ContextPlan,
    rank: int,
    shape: ModelShape,
    *,
    pairs: int | None = None,
    sent_bytes: int | None = None,
    messages: int | None = None,
) -> HostCost:
    """Return what host `rank` computes and sends in one layer of the prefill.

    Attention 4 · pairs · d FLOPs; a gather sends (H − 1) · kept · Hkv · 2d values per host.

    Args:
        plan: how the document is split.
        rank: of the host.
        shape: of the model.
        pairs, sent_bytes, messages: what a method scores and sends, if not by the plan's masks and passing blocks.
    """
    host = plan.host(rank)
    if pairs is None:
        pairs = shape.heads * attention_pairs(plan, rank)
    if sent_bytes is None or messages is None:
        gathered = [plan.message_tokens(slot) for slot in range(plan.blocks_per_host)]
        sent_bytes = sum((plan.hosts - 1) * tokens * shape.kv_bytes for tokens in gathered)
        messages = sum(tokens > 0 for tokens in gathered)
        if host.query_rows and plan.hosts > 1:
            # The running query's partial attention: float32 output and LSE of every query head.
            sent_bytes += (plan.hosts - 1) * host.query_rows * shape.heads * (shape.head_dim + 1) * 4
            messages += 1
    return HostCost(
        rows=host.rows,
        pairs=pairs,
        attention_flops=4 * pairs * shape.head_dim,
        linear_flops=host.rows * shape.linear_flops_per_token,
        sent_bytes=sent_bytes,
        messages=messages,
        cache_bytes=host.held_rows * shape.kv_bytes,
    )
