"""Attention of a document's rows to the keys that a `SparseIndex` lists for them (MInference, arXiv 2407.02490)."""

import torch
from jaxtyping import Float
from torch import Tensor

from apb.attend.check import Backend, check_inputs
from apb.attend.sparse_index import TILE, SparseIndex

__all__ = ["sparse_attention"]

_MASK_ELEMENTS = 2**24  # the "sdpa" backend spells out so many (row, column) pairs of the mask at a time


def sparse_attention(
    q: Float[Tensor, "batch q_heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    index: SparseIndex,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch q_heads tokens dim"], Float[Tensor, "batch q_heads tokens"]]:
    """Attend from every row to the columns of `index`: softmax(scale · q kᵀ, where index.mask()) v.

    Inference only, but for "reference".

    Args:
        q: queries, float16, bfloat16 or float32 (float64 with "reference"), dim 16..256.
        k: keys of the same tokens; query head h reads KV head h // (q_heads / kv_heads).
        v: values, as k.
        index: what a pattern's `index(q, k, scale)` returned for these tokens and heads.
        scale: multiplies the scores, > 0; 1/√dim if None.
        backend: "reference" (float64), "sdpa" (PyTorch's fused kernel with a mask, some rows at a time) or "triton".

    Returns:
        The output in q's dtype, and the LSE of each row, natural log, float32.

    Raises:
        ValueError: if an argument is out of range or the chosen backend does not take it.
        RuntimeError: if the chosen backend cannot run here, or would lose a gradient.

    Example:
        >>> from apb.attend import AShape
        >>> q, k = torch.zeros(1, 4, 200, 16), torch.zeros(1, 2, 200, 16)
        >>> out, lse = sparse_attention(q, k, k, AShape(sink=2, local=1).index(q, k))
        >>> round(float(lse[0, 0, 199].exp()))  # 2 of the beginning, 8 of its own tile
        10
    """
    backend, scale = check_inputs(q, k, v, scale, backend, ("reference", "sdpa", "triton"))
    found = (*index.tile_counts.shape[:2], index.tokens, index.tokens)
    if found != (*q.shape[:3], k.shape[2]):
        raise ValueError(
            f"index: made for batch, query heads, rows and columns {list(found)}; q and k have "
            f"{[*q.shape[:3], k.shape[2]]}. Make it from these tensors, pattern.index(q, k)"
        )
    if index.tiles.device != q.device:
        raise ValueError(f"index: lies on {index.tiles.device}, q on {q.device}; make it there, pattern.index(q, k)")
    if backend == "reference":
        from apb.reference import attention

        out, lse = attention(q, k, v, index.mask(), scale)
        return out.to(q.dtype), lse.float()
    if backend == "sdpa":
        return _sdpa(q, k, v, index, scale)
    from apb.kernels.vertical_slash import sparse_flash

    lists = ("tiles", "tile_counts", "columns", "column_counts", "covered")
    return sparse_flash(q, k, v, **{name: getattr(index, name) for name in lists}, scale=scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, scale: float) -> tuple[Tensor, Tensor]:
    """Call PyTorch's fused kernel that takes a mask and returns the log-sum-exp, on bounded numbers of rows."""
    batch, q_heads, tokens, _ = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.is_cuda:  # the memory-efficient kernel knows no groups of heads
        k, v = (x.repeat_interleave(q_heads // k.shape[1], dim=1) for x in (k, v))
    rows = max(1, _MASK_ELEMENTS // (batch * q_heads * tokens * TILE)) * TILE
    outs, lses = [], []
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        seen = index.mask(start, stop)[..., :stop]
        # The kernel on CUDA wants rows of the mask 16 bytes aligned.
        bias = q.new_empty(*seen.shape[:3], -(-stop // 16) * 16)[..., :stop]
        bias.fill_(-torch.inf).masked_fill_(seen, 0.0)
        args = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
        if q.is_cuda:
            kernel = torch.ops.aten._scaled_dot_product_efficient_attention
            out, lse = kernel(*args, bias, True, 0.0, False, scale=scale)[:2]
        else:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, lse = kernel(*args, 0.0, False, attn_mask=bias, scale=scale)[:2]
        outs.append(out)
        lses.append(lse[:, :, : stop - start].float())
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)
