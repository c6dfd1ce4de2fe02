"""The formula of a host's peak memory: weights, caches, the residual stream, and the larger of what comes and goes."""

from apb.bench.prefill.layer import ffn_rows
from apb.bench.prefill.methods import RandomHead
from apb.bench.prefill.shapes import DecoderShape
from apb.methods import APB, Method, Ring, Ulysses
from apb.methods.ulysses import split_heads
from apb.plan import ContextPlan

__all__ = ["cache_bytes", "host_peak_bytes", "weight_bytes"]

_FLOAT32 = 4


def weight_bytes(method: Method, shape: DecoderShape) -> int:
    """Bytes of the model's weights, and of the method's own."""
    heads = isinstance(method, APB) and isinstance(method.compressor, RandomHead)
    return shape.weight_bytes + (RandomHead.weight_bytes(shape) if heads else 0)


def cache_bytes(plan: ContextPlan, rank: int, shape: DecoderShape) -> int:
    """Bytes of one layer's keys and values that stay on a host; on the owner, the question's too."""
    return (plan.host(rank).held_rows + (plan.query if rank == plan.owner else 0)) * shape.kv_bytes


def host_peak_bytes(method: Method, plan: ContextPlan, rank: int, shape: DecoderShape) -> int:
    """Return a host's peak in the prefill.

    weights + layers · held KV + rows · (hidden + angles) + max(QKV, attention, a chunk of the FFN)

    Left out is what a kernel takes for itself, such as MInference's estimate of where to look.

    Args:
        method: as the line-up made it.
        plan: made by it.
        rank: of the host.
        shape: of the model.
    """
    rows, b = plan.host(rank).rows, shape.bytes_per_value
    q, kv = rows * shape.heads * shape.head_dim * b, rows * shape.kv_bytes
    raw = q + kv // 2 if "projections" in method.needs else 0
    stream, angles = rows * shape.hidden * b, rows * shape.head_dim * _FLOAT32
    project = max(stream + q + kv, 2 * q + kv + raw // 2)
    attend = q + kv + raw + _attention_bytes(method, plan, rank, shape)
    chunk = ffn_rows(rows) * b * max(shape.hidden + 2 * shape.ffn, 3 * shape.ffn)
    held = weight_bytes(method, shape) + shape.layers * cache_bytes(plan, rank, shape)
    return held + stream + angles + max(project, attend, chunk)


def _attention_bytes(method: Method, plan: ContextPlan, rank: int, shape: DecoderShape) -> int:
    """Bytes of an attention's output and of what it makes on the way, beside q, k and v."""
    share, b = plan.host(rank), shape.bytes_per_value
    row = shape.heads * shape.head_dim
    out, kv = share.rows * row * b, share.rows * shape.kv_bytes
    lse = share.rows * shape.heads * _FLOAT32
    if isinstance(method, Ring) and plan.hosts > 1:
        # Own keys, those at hand, those under way; the sum so far in float32, and a part.
        return 3 * kv + share.rows * row * _FLOAT32 + 2 * lse + out
    if isinstance(method, Ulysses):
        heads = split_heads(shape.heads, shape.kv_heads, plan.hosts)
        mine = heads[rank]
        sent = sum(s.q_heads + 2 * s.kv_heads for s in heads) * share.rows * shape.head_dim * b
        came = (mine.q_heads + 2 * mine.kv_heads) * plan.tokens * shape.head_dim * b
        back = mine.q_heads * plan.tokens * shape.head_dim * b
        return max(sent + 2 * came, sent + came + 3 * back + out)
    if not (plan.passing or plan.split_anchor):
        return out + lse
    # Keys of each block's [anchor, passing, block], what all hosts sent, and outputs joined if there are several.
    columns = sum(plan.anchor_rows * block.sees_anchor + block.passing_tokens + block.tokens for block in share.blocks)
    columns += plan.anchor_rows * plan.split_anchor
    gathered = plan.hosts * sum(plan.message_tokens(slot) for slot in range(plan.blocks_per_host))
    several = len(share.blocks) > 1 or plan.split_anchor or share.query_rows > 0
    return (1 + several) * out + lse + (columns + gathered) * shape.kv_bytes
