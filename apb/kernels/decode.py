"""Attention of a few query rows over a long cache, the keys split over programs (APB section 3.6).

Reading the cache is all the cost, so it is read once: the rows of all query heads that share a KV head are packed
into one tile (l rows × g heads), and the keys are cut into enough splits to fill the GPU. Every split leaves a
partial output and its log-sum-exp in float32. There is one launch: of the programs that share a row tile, the one
that finishes last merges what all of them left, in the order of the keys, so that a result does not depend on who
finishes when.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .masked_flash import tile_capability
from .merge import merge_parts

__all__ = ["Tiles", "choose_splits", "choose_tiles", "launch", "split_kv_decode", "split_kv_decode_kernel",
           "split_shape"]  # fmt: skip


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


@triton.jit
def leave_part(partials, lses, acc, row_lse, split, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    """Store the first ROWS rows of a split's result where the program that merges will look for them."""
    row, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tl.store(lses + split * ROWS + row, row_lse, mask=row < ROWS)
    tl.store(partials + (split * ROWS + row)[:, None] * BLOCK_D + dims[None, :], acc, mask=(row < ROWS)[:, None])
    tl.debug_barrier()  # what all threads stored comes before the ticket that one of them draws


@triton.jit
def store_rows(out, lse, acc, row_lse, first, rows, kv_head, kv_heads, group, batch, D: tl.constexpr,
               BLOCK_D: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Store packed rows from `first` on, of [batch, q_heads, rows, D] without gaps, and their LSEs."""
    packed = first + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    inside = packed < rows * group
    row = (batch * kv_heads * group + kv_head * group + packed % group) * rows + packed // group
    tl.store(lse + row, row_lse, mask=inside)
    stored = inside[:, None] & (dims < D)[None, :]
    tl.store(out + row[:, None] * D + dims[None, :], acc.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows", "columns", "kv_heads", "group", "splits", "block", "stride_length"])
def split_kv_decode_kernel(
    q, k, v, lengths, out, lse, partials, tickets, scale_log2, rows, columns, kv_heads, group, splits, block,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_length,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, MERGED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of packed rows to one split of the keys; the program that ends last merges the splits.

    `partials` holds, for each row tile, [splits, ROWS, BLOCK_D] outputs, and behind them all [splits, ROWS] LSEs.
    `tickets` is a counter for each row tile, 0 at first. `block` is BLOCK_N, which the compiler must not know of here:
    it would unfold the second sweep, and the assembler then serialise the tensor-core instructions.
    """
    tile, split, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    if lengths is not None:
        columns = tl.minimum(tl.maximum(tl.load(lengths + batch * stride_length), 0), columns)
    end, seen_by_all = columns, columns
    if CAUSAL:
        end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // group, rows - 1) + columns - rows + 1
        seen_by_all = tile * BLOCK_M // group + columns - rows + 1
    split_keys = tl.maximum(tl.cdiv(columns, splits * block), 1) * block
    live = tl.maximum(tl.cdiv(tl.maximum(end, 0), split_keys), 1)
    if split >= live:  # no row of this tile sees so far
        return

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # row · group + member: a causal tile ends early
    row, q_head = packed // group, kv_head * group + packed % group
    dims = tl.arange(0, BLOCK_D)
    q += batch * stride_qb + (q_head * stride_qh + row.to(tl.int64) * stride_qn)[:, None] + dims[None, :] * stride_qd
    q_tile = tl.load(q, mask=(packed < rows * group)[:, None] & (dims < D)[None, :], other=0.0)
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh

    lo = split * split_keys
    hi = tl.minimum(lo + split_keys, end)
    full = lo + tl.maximum(tl.minimum(hi, seen_by_all) - lo, 0) // BLOCK_N * BLOCK_N
    limit = tl.zeros([BLOCK_M], tl.int32) + (columns - 1)
    if CAUSAL:
        limit = row + (columns - rows)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, peak, total = sweep_keys(acc, peak, total, q_tile, k, v, lo, full, limit, stride_kn, stride_kd, stride_vn,
                                  stride_vd, scale_log2, D, BLOCK_N, BLOCK_D, False)  # fmt: skip
    acc, peak, total = sweep_keys(acc, peak, total, q_tile, k, v, full, hi, limit, stride_kn, stride_kd, stride_vn,
                                  stride_vd, scale_log2, D, BLOCK_N, BLOCK_D, True)  # fmt: skip
    total = tl.where(peak == float("-inf"), 1.0, total)  # a row that saw nothing: (0, −inf)
    acc = acc / total[:, None]
    row_lse = (peak + tl.log2(total)) * 0.6931471805599453

    if live == 1:
        store_rows(out, lse, acc, row_lse, tile * BLOCK_M, rows, kv_head, kv_heads, group, batch, D, BLOCK_D, BLOCK_M)
        return
    place = pair * tl.num_programs(0) + tile
    all_rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * splits * ROWS
    lses = partials + all_rows * BLOCK_D + place.to(tl.int64) * splits * ROWS
    partials += place.to(tl.int64) * splits * ROWS * BLOCK_D
    leave_part(partials, lses, acc, row_lse, split, BLOCK_D, BLOCK_M, ROWS)
    if tl.atomic_add(tickets + place, 1, sem="acq_rel") == live - 1:
        for first in range(0, ROWS, MERGED):
            local = first + tl.arange(0, MERGED)
            merged, merged_lse = merge_parts(partials, lses, live, ROWS * BLOCK_D, 1, ROWS, local * BLOCK_D, local,
                                             local < ROWS, BLOCK_D, BLOCK_D, PARTS, MERGED)  # fmt: skip
            store_rows(out, lse, merged, merged_lse, tile * BLOCK_M + first, rows, kv_head, kv_heads, group, batch, D,
                       BLOCK_D, MERGED)  # fmt: skip


class Tiles(NamedTuple):
    """How one program cuts its work: packed rows × keys of a tile, warps, pipeline stages, programs on a processor."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    per_processor: int = 1


def choose_tiles(dtype: torch.dtype, dim: int, packed_rows: int, capability: tuple[int, int]) -> Tiles:
    """Fit the row tile to the packed rows, 16 .. 64, and the key tile to shared memory and registers."""
    if dtype == torch.float32:
        block_m, block_n, warps, stages = 16, 32, 8, 1
    else:
        block_m = min(64, max(16, triton.next_power_of_2(packed_rows)))
        # Measured on an H200: four stages read faster than three. GPUs with 99 KB of shared memory have room for three.
        narrow = (64, 4, 4) if capability[0] >= 9 else (64, 4, 3)
        block_n, warps, stages = narrow if dim <= 128 else (32, 8 if block_m == 64 else 4, 3)
    # Measured on an H100: one program per multiprocessor reads fastest, two compute fastest.
    return Tiles(block_m, block_n, warps, stages, 1 if packed_rows <= block_m else 2)


def choose_splits(programs: int, columns: int, block_n: int, slots: int) -> int:
    """Split the keys so that there are at most `slots` programs in all, each at least four blocks long."""
    blocks = triton.cdiv(columns, block_n)
    wanted = max(1, min(slots // programs, blocks // 4))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))


def split_shape(packed_rows: int, block_m: int, block_d: int) -> tuple[int, int, int]:
    """Return how many rows a split leaves, how many are merged at once, and of how many splits: up to 4096 numbers."""
    rows = min(block_m, triton.next_power_of_2(packed_rows))
    merged = min(rows, 16)
    return rows, merged, min(8, max(1, 4096 // (merged * block_d)))


def launch(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, splits: int, tiles: Tiles,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel; needs keys and rows. Of fewer keys than `k` holds, each split takes fewer."""
    batch, q_heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    group = q_heads // kv_heads
    block_d = triton.next_power_of_2(dim)
    kept_rows, merged_rows, parts = split_shape(rows * group, tiles.block_m, block_d)
    grid = (triton.cdiv(rows * group, tiles.block_m), splits, batch * kv_heads)
    places = grid[0] * grid[2] if splits > 1 else 0
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    partials = torch.empty(places * splits * kept_rows * (block_d + 1), dtype=torch.float32, device=q.device)
    tickets = torch.zeros(places, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        split_kv_decode_kernel[grid](
            q, k, v, lengths, out, lse, partials, tickets, scale * math.log2(math.e),
            rows, columns, kv_heads, group, splits, tiles.block_n, *q.stride(), *k.stride(), *v.stride(),
            0 if lengths is None else lengths.stride(0),
            CAUSAL=causal, D=dim, BLOCK_D=block_d, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            ROWS=kept_rows, MERGED=merged_rows, PARTS=parts, num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("apb::split_kv_decode", mutates_args=())
def _split_kv_decode(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    packed_rows = q.shape[1] // k.shape[1] * q.shape[2]
    tiles = choose_tiles(q.dtype, q.shape[-1], packed_rows, tile_capability(q))
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    programs = q.shape[0] * k.shape[1] * triton.cdiv(packed_rows, tiles.block_m)
    splits = choose_splits(programs, k.shape[2], tiles.block_n, tiles.per_processor * processors)
    return launch(q, k, v, causal, scale, splits, tiles, lengths)


@_split_kv_decode.register_fake
def _(q, k, v, causal, scale, lengths=None):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def split_kv_decode(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend as `apb.attend.decode_attention`, which checks the arguments; needs rows and keys."""
    return _split_kv_decode(q, k, v, causal, scale, lengths)
