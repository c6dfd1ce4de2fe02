"""Merge partial attention by log-sum-exp, reading every part once (APB section 3.6).

l = log Σᵢ exp(lᵢ), o = Σᵢ oᵢ · exp(lᵢ − l). Up to eight parts of a row are asked for at once, outputs and LSEs: one by
one, each would cost the wait for memory again. A part with lᵢ = −inf counts for nothing, whatever it holds (NaN too).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge_into_kernel", "merge_into_rows", "merge_kernel", "merge_partials", "merge_parts", "merge_shape"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def merge_parts(outs, lses, parts, stride_sp, stride_sd, stride_lp, out_row, lse_row, inside,
                D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Merge the rows at the offsets `out_row` and `lse_row`, PARTS parts at a time; return (output, LSE) in float32."""
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, parts, PARTS):
        found = ()  # all asked for before any is used
        for i in tl.static_range(PARTS):
            part = tl.cast(first + i, tl.int64)
            there = inside & (part < parts)
            lse = tl.load(lses + part * stride_lp + lse_row, mask=there, other=float("-inf"), cache_modifier=".cg")
            cell = part * stride_sp + out_row[:, None] + dims.to(tl.int64)[None, :] * stride_sd
            held = there[:, None] & (dims < D)[None, :]
            found += ((lse, tl.load(outs + cell, mask=held, other=0.0, cache_modifier=".cg")),)
        for i in tl.static_range(PARTS):
            part_lse, out = found[i][0].to(tl.float32), found[i][1].to(tl.float32)
            new_peak = tl.maximum(peak, part_lse)
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # (−inf) − (−inf) would be NaN
            weight = tl.exp2((part_lse - base) * LOG2_E)
            decay = tl.exp2((peak - base) * LOG2_E)
            acc = acc * decay[:, None] + tl.where((weight > 0)[:, None], weight[:, None] * out, 0.0)
            total = total * decay + weight
            peak = new_peak
    empty = peak == float("-inf")
    total = tl.where(empty, 1.0, total)
    return acc / total[:, None], tl.where(empty, float("-inf"), peak + tl.log2(total) / LOG2_E)


@triton.jit(do_not_specialize=["parts", "heads", "rows", "all_rows"])
def merge_kernel(
    outs, lses, out, lse, parts, heads, rows, all_rows,
    stride_sp, stride_sb, stride_sh, stride_sn, stride_sd, stride_lp, stride_lb, stride_lh, stride_ln,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_ROWS of the batch · heads · rows rows; `out` and `lse` are contiguous."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < all_rows
    n, head, batch = row % rows, row // rows % heads, row // rows // heads  # divided as int32: int64 is far slower
    n, head, batch, row = n.to(tl.int64), head.to(tl.int64), batch.to(tl.int64), row.to(tl.int64)
    out_row = batch * stride_sb + head * stride_sh + n * stride_sn
    lse_row = batch * stride_lb + head * stride_lh + n * stride_ln
    merged, merged_lse = merge_parts(outs, lses, parts, stride_sp, stride_sd, stride_lp, out_row, lse_row, inside,
                                     D, BLOCK_D, PARTS, BLOCK_ROWS)  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    stored = inside[:, None] & (dims < D)[None, :]
    tl.store(out + row[:, None] * D + dims[None, :], merged.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + row, merged_lse, mask=inside)


def merge_shape(parts: int, block_d: int) -> tuple[int, int]:
    """Return (parts read at once, rows of a program): 4096 numbers, or all of one row."""
    at_once = min(8, triton.next_power_of_2(parts))
    return at_once, max(1, 4096 // (at_once * block_d))


def merge_partials(outs: Tensor, lses: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Merge outs [parts, batch, heads, rows, dim] and lses [parts, batch, heads, rows]; out in `dtype` or outs'."""
    return _merge_partials(outs, lses, outs.dtype if dtype is None else dtype)


@torch.library.custom_op("apb::merge_partials", mutates_args=())
def _merge_partials(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts, batch, heads, rows, dim = outs.shape
    out = torch.empty((batch, heads, rows, dim), dtype=dtype, device=outs.device)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=outs.device)
    block_d = triton.next_power_of_2(dim)
    at_once, program_rows = merge_shape(parts, block_d)
    if out.numel():
        with torch.cuda.device_of(outs):
            merge_kernel[(triton.cdiv(batch * heads * rows, program_rows),)](
                outs, lses, out, lse, parts, heads, rows, batch * heads * rows, *outs.stride(), *lses.stride(),
                D=dim, BLOCK_D=block_d, PARTS=at_once, BLOCK_ROWS=program_rows, num_warps=4,
            )  # fmt: skip
    return out, lse


@_merge_partials.register_fake
def _(outs, lses, dtype):
    return outs.new_empty(outs.shape[1:], dtype=dtype), lses.new_empty(lses.shape[1:], dtype=torch.float32)


@triton.jit(do_not_specialize=["heads", "rows", "all_rows"])
def merge_into_kernel(
    out, lse, part, part_lse, heads, rows, all_rows,
    stride_ob, stride_oh, stride_on, stride_od, stride_lb, stride_lh, stride_ln,
    stride_pb, stride_ph, stride_pn, stride_pd, stride_mb, stride_mh, stride_mn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Merge BLOCK_ROWS rows of `part` into those of `out`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < all_rows
    n, head, batch = row % rows, row // rows % heads, row // rows // heads
    n, head, batch, dims = n.to(tl.int64), head.to(tl.int64), batch.to(tl.int64), tl.arange(0, BLOCK_D).to(tl.int64)
    out_cells = out + (batch * stride_ob + head * stride_oh + n * stride_on)[:, None] + dims[None, :] * stride_od
    part_cells = part + (batch * stride_pb + head * stride_ph + n * stride_pn)[:, None] + dims[None, :] * stride_pd
    lse_cells = lse + batch * stride_lb + head * stride_lh + n * stride_ln
    held = inside[:, None] & (dims < D)[None, :]
    a = tl.load(lse_cells, mask=inside, other=float("-inf"))
    b = tl.load(part_lse + batch * stride_mb + head * stride_mh + n * stride_mn, mask=inside, other=float("-inf"))
    x, y = tl.load(out_cells, mask=held, other=0.0), tl.load(part_cells, mask=held, other=0.0).to(tl.float32)
    peak = tl.maximum(a, b)
    empty = peak == float("-inf")
    base = tl.where(empty, 0.0, peak)  # (−inf) − (−inf) would be NaN
    weight_a, weight_b = tl.exp2((a - base) * LOG2_E), tl.exp2((b - base) * LOG2_E)
    total = tl.where(empty, 1.0, weight_a + weight_b)
    x = tl.where((weight_a > 0)[:, None], weight_a[:, None] * x, 0.0)  # an empty part may hold anything
    y = tl.where((weight_b > 0)[:, None], weight_b[:, None] * y, 0.0)
    tl.store(out_cells, (x + y) / total[:, None], mask=held)
    tl.store(lse_cells, tl.where(empty, float("-inf"), base + tl.log2(total) / LOG2_E), mask=inside)


@torch.library.custom_op("apb::merge_into_rows", mutates_args=("out", "lse"))
def merge_into_rows(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge part [batch, heads, rows, dim] and its LSE into float32 `out` and `lse`, in place."""
    batch, heads, rows, dim = out.shape
    block_d = triton.next_power_of_2(dim)
    _, program_rows = merge_shape(2, block_d)
    if out.numel():
        with torch.cuda.device_of(out):
            merge_into_kernel[(triton.cdiv(batch * heads * rows, program_rows),)](
                out, lse, part, part_lse, heads, rows, batch * heads * rows,
                *out.stride(), *lse.stride(), *part.stride(), *part_lse.stride(),
                D=dim, BLOCK_D=block_d, BLOCK_ROWS=program_rows, num_warps=4,
            )  # fmt: skip


@merge_into_rows.register_fake
def _(out, lse, part, part_lse):
    return None
