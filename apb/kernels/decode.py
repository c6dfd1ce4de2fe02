"""Attention of a few query rows over a long cache, the keys split over programs (APB section 3.6).

Reading the cache is all the cost, so it is read once: the rows of all query heads that share a KV head are packed
into one tile (l rows × g heads), and the keys are cut into enough splits to fill the GPU. Every split leaves a
partial output and its log-sum-exp in float32; the merge kernel joins them.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .merge import merge_partials

__all__ = ["Tiles", "choose_splits", "choose_tiles", "launch", "split_kv_decode", "split_kv_decode_kernel"]


@triton.jit
def sweep_keys(acc, peak, total, q, k, v, lo, hi, limit, stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
               D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Take the keys [lo, hi) into the online softmax; a row may see none of them."""
    for start in tl.range(lo, hi, BLOCK_N):
        local = tl.arange(0, BLOCK_N)[:, None]
        dims = tl.arange(0, BLOCK_D)[None, :]
        loaded = dims < D
        if MASKED:
            loaded = loaded & (start + local < hi)
        start64 = tl.cast(start, tl.int64)
        k_tile = tl.load(k + start64 * stride_kn + (local * stride_kn + dims * stride_kd), mask=loaded, other=0.0)
        scores = tl.dot(q, k_tile.T, input_precision="ieee") * scale_log2
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            seen = (column[None, :] <= limit[:, None]) & (column < hi)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # (−inf) − (−inf) would be NaN
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v_tile = tl.load(v + start64 * stride_vn + (local * stride_vn + dims * stride_vd), mask=loaded, other=0.0)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["rows", "columns", "kv_heads", "group", "split_keys"])
def split_kv_decode_kernel(
    q, k, v, outs, lses, scale_log2, rows, columns, kv_heads, group, split_keys,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_op, stride_ob, stride_oh, stride_on, stride_od, stride_lp,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of packed rows to one split; `lses` is contiguous but for its first stride."""
    tile, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # row · group + member: a causal tile ends early
    row, q_head = packed // group, kv_head * group + packed % group
    dims = tl.arange(0, BLOCK_D)
    inside = packed < rows * group
    stored = inside[:, None] & (dims < D)[None, :]
    q += batch * stride_qb + (q_head * stride_qh + row.to(tl.int64) * stride_qn)[:, None] + dims[None, :] * stride_qd
    q_tile = tl.load(q, mask=stored, other=0.0)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh

    lo = split * split_keys
    hi = tl.minimum(lo + split_keys, columns)
    limit = tl.zeros([BLOCK_M], tl.int32) + (columns - 1)
    seen_by_all = hi
    if CAUSAL:
        limit = row + (columns - rows)
        seen_by_all = tl.minimum(hi, tile * BLOCK_M // group + columns - rows + 1)
        hi = tl.minimum(hi, tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, rows - 1) + columns - rows + 1)
    full = lo + tl.maximum(seen_by_all - lo, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, peak, total = sweep_keys(acc, peak, total, q_tile, k, v, lo, full, limit, stride_kn, stride_kd, stride_vn,
                                  stride_vd, scale_log2, D, BLOCK_N, BLOCK_D, False)  # fmt: skip
    acc, peak, total = sweep_keys(acc, peak, total, q_tile, k, v, full, hi, limit, stride_kn, stride_kd, stride_vn,
                                  stride_vd, scale_log2, D, BLOCK_N, BLOCK_D, True)  # fmt: skip

    total = tl.where(peak == float("-inf"), 1.0, total)  # a row that saw nothing: (0, −inf)
    acc = acc / total[:, None]
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    outs += split.to(tl.int64) * stride_op + batch * stride_ob
    outs += (q_head * stride_oh + row.to(tl.int64) * stride_on)[:, None] + dims[None, :] * stride_od
    tl.store(outs, acc.to(outs.dtype.element_ty), mask=stored)
    lses += split.to(tl.int64) * stride_lp + (batch * kv_heads * group + q_head) * rows + row
    tl.store(lses, lse, mask=inside)


class Tiles(NamedTuple):
    """How one program cuts its work: packed rows × keys of a tile, warps and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose_tiles(dtype: torch.dtype, dim: int, packed_rows: int) -> Tiles:
    """Fit the row tile to the packed rows, 16 .. 64, and the key tile to shared memory and registers."""
    block_m = min(64, max(16, triton.next_power_of_2(packed_rows)))
    if dtype == torch.float32:
        return Tiles(16, 32, 8, 1)
    return Tiles(block_m, 64, 4, 3) if dim <= 128 else Tiles(block_m, 32, 8 if block_m == 64 else 4, 3)


def choose_splits(programs: int, columns: int, block_n: int, slots: int) -> tuple[int, int]:
    """Return (splits, keys of each): at most `slots` programs in all, each at least four blocks long."""
    blocks = triton.cdiv(columns, block_n)
    wanted = max(1, min(slots // programs, blocks // 4))
    split_blocks = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, split_blocks), split_blocks * block_n


def launch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, splits: int, split_keys: int, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """Run the split kernel, then the merge where there is more than one split; needs keys and rows."""
    batch, q_heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    dtype = q.dtype if splits == 1 else torch.float32
    outs = torch.empty((splits, batch, q_heads, rows, dim), dtype=dtype, device=q.device)
    lses = torch.empty((splits, batch, q_heads, rows), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(rows * group, tiles.block_m), splits, batch * kv_heads)
    with torch.cuda.device_of(q):
        split_kv_decode_kernel[grid](
            q, k, v, outs, lses, scale * math.log2(math.e), rows, columns, kv_heads, group, split_keys,
            *q.stride(), *k.stride(), *v.stride(), *outs.stride(), lses.stride(0),
            CAUSAL=causal, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return (outs[0], lses[0]) if splits == 1 else merge_partials(outs, lses, q.dtype)


@torch.library.custom_op("apb::split_kv_decode", mutates_args=())
def _split_kv_decode(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    packed_rows = q.shape[1] // k.shape[1] * q.shape[2]
    tiles = choose_tiles(q.dtype, q.shape[-1], packed_rows)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    row_tiles = triton.cdiv(packed_rows, tiles.block_m)
    # Measured on an H100: one program per multiprocessor reads fastest, two compute fastest.
    slots = processors if row_tiles == 1 else 2 * processors
    splits, split_keys = choose_splits(q.shape[0] * k.shape[1] * row_tiles, k.shape[2], tiles.block_n, slots)
    return launch(q, k, v, causal, scale, splits, split_keys, tiles)


@_split_kv_decode.register_fake
def _(q, k, v, causal, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def split_kv_decode(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `apb.attend.decode_attention`, which checks the arguments; needs rows and keys."""
    return _split_kv_decode(q, k, v, causal, scale)
