"""Merge partial attention by log-sum-exp, reading every part once (APB section 3.6).

l = log Σᵢ exp(lᵢ), o = Σᵢ oᵢ · exp(lᵢ − l). The LSEs of a row are small: a first loop finds l, a second one sums the
outputs. A part with lᵢ = −inf is not read at all, so whatever it holds (NaN too) counts for nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge_kernel", "merge_partials"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["parts", "heads", "rows", "all_rows"])
def merge_kernel(
    outs, lses, out, lse, parts, heads, rows, all_rows,
    stride_sp, stride_sb, stride_sh, stride_sn, stride_sd, stride_lp, stride_lb, stride_lh, stride_ln,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_ROWS of the batch · heads · rows rows; `out` and `lse` are contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < all_rows
    batch, head, n = row // (heads * rows), row // rows % heads, row % rows
    dims = tl.arange(0, BLOCK_D)
    lses += batch * stride_lb + head * stride_lh + n * stride_ln
    outs += (batch * stride_sb + head * stride_sh + n * stride_sn)[:, None] + dims.to(tl.int64)[None, :] * stride_sd

    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    for part in range(0, parts):
        part_lse = tl.load(lses + tl.cast(part, tl.int64) * stride_lp, mask=inside, other=float("-inf"))
        peak = tl.maximum(peak, part_lse.to(tl.float32))
    empty = peak == float("-inf")
    base = tl.where(empty, 0.0, peak)  # (−inf) − (−inf) would be NaN

    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for part in range(0, parts):
        part_lse = tl.load(lses + tl.cast(part, tl.int64) * stride_lp, mask=inside, other=float("-inf"))
        weight = tl.exp2((part_lse.to(tl.float32) - base) * LOG2_E)
        counts = (weight > 0)[:, None] & (dims < D)[None, :]
        part_out = tl.load(outs + tl.cast(part, tl.int64) * stride_sp, mask=counts, other=0.0)
        acc += weight[:, None] * part_out.to(tl.float32)
        total += weight
    total = tl.where(empty, 1.0, total)
    stored = inside[:, None] & (dims < D)[None, :]
    tl.store(out + row[:, None] * D + dims[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=stored)
    tl.store(lse + row, tl.where(empty, float("-inf"), base + tl.log2(total) / LOG2_E), mask=inside)


def block_rows(block_d: int) -> int:
    """Give a program about 2048 outputs: fewer leave the memory system idle, more leave multiprocessors idle."""
    return 2048 // block_d


def merge_partials(outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Merge outs [parts, batch, heads, rows, dim] and lses [parts, batch, heads, rows]; out in `dtype` or outs'."""
    return _merge_partials(outs, lses, outs.dtype if dtype is None else dtype)


@torch.library.custom_op("apb::merge_partials", mutates_args=())
def _merge_partials(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts, batch, heads, rows, dim = outs.shape
    out = torch.empty((batch, heads, rows, dim), dtype=dtype, device=outs.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=outs.device)
    block_d = triton.next_power_of_2(dim)
    program_rows = block_rows(block_d)
    if out.numel():
        with torch.cuda.device_of(outs):
            merge_kernel[(triton.cdiv(batch * heads * rows, program_rows),)](
                outs, lses, out, lse, parts, heads, rows, batch * heads * rows, *outs.stride(), *lses.stride(),
                D=dim, BLOCK_D=block_d, BLOCK_ROWS=program_rows, num_warps=4,
            )  # fmt: skip
    return out, lse


@_merge_partials.register_fake
def _(outs, lses, dtype):
    return outs.new_empty(outs.shape[1:], dtype=dtype), lses.new_empty(lses.shape[1:], dtype=torch.float32)
