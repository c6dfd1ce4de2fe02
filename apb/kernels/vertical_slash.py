"""FlashAttention over listed keys: 64-wide tiles at any column, and single gathered columns (MInference, 2407.02490).

A program computes up to 64 rows of one head, in three sweeps of an online softmax:

    1. the nearest tile (the diagonal) and the farthest, which may begin left of column 0: masked;
    2. the tiles between them: contiguous keys that every row sees, no mask;
    3. the vertical columns left of the rows, gathered 64 at a time; those that a tile covers are left out.

Programs run KV head by KV head, the longest row tiles first, the query heads that share the keys side by side.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .masked_flash import tile_capability, tma_can_read

__all__ = ["TILE", "Tiles", "choose_tiles", "launch", "sparse_flash", "vertical_slash_kernel"]

TILE = 64
"""Rows that share a list, and columns of a listed tile."""


class Tiles(NamedTuple):
    """How one program cuts its work: rows × keys of a step (divisors of 64), warps, stages, loads of tiles by TMA."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    column_stages: int
    tma: bool = False


def choose_tiles(dtype: torch.dtype, dim: int, capability: tuple[int, int], *, tma: bool) -> Tiles:
    """Look up the tiles for a dtype, head dim, compute capability, and whether TMA can read the keys and values."""
    if dtype == torch.float32:
        return Tiles(16, 32, 8, 1, 1) if dim > 128 else Tiles(32, 16, 8, 1, 1)
    tma = tma and capability[0] >= 9
    if dim > 128:
        return Tiles(64, 64, 8, 2, 1, tma)
    return Tiles(64, 64, 4, 3 if dim <= 64 else 2, 2 if tma and capability[0] == 9 else 1, tma)


@triton.jit
def take(acc, peak, total, q, k_tile, v_tile, seen, scale_log2, MASKED: tl.constexpr):
    """Take one tile of keys into the online softmax: per row the peak, Σ 2^(score − peak) and Σ of those · v."""
    scores = tl.dot(q, k_tile.T, input_precision="ieee")
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    # The first tile of all begins at or left of every row's own column: peaks are finite from there on.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc, new_peak, total


@triton.jit
def load_tile(source, batch, head, start, columns, stride_n, stride_d, D: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Load keys or values [start, start + BLOCK_N) of one head; zeros outside [0, columns) (pointers: if MASKED)."""
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        rows = tl.arange(0, BLOCK_N)[:, None]
        dims = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
        pointers = source + start.to(tl.int64) * stride_n + (rows.to(tl.int64) * stride_n + dims * stride_d)
        if MASKED:
            column = start + rows
            tile = tl.load(pointers, mask=(column >= 0) & (column < columns) & (dims < D), other=0.0)
        elif BLOCK_D != D:
            tile = tl.load(pointers, mask=dims < D, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def sweep_tiles(acc, peak, total, q, k, v, batch, head, tiles, lo, hi, count, first, row, columns,
                stride_kn, stride_kd, stride_vn, stride_vd, scale_log2, D: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_D: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
                STAGES: tl.constexpr):  # fmt: skip
    """Take the listed tiles [lo, hi), or if MASKED the first and the last of `count`, in steps of BLOCK_N keys."""
    STEPS: tl.constexpr = TILE // BLOCK_N
    for i in tl.range(lo * STEPS, hi * STEPS, num_stages=STAGES):
        listed = i // STEPS
        if MASKED:
            listed = tl.where(listed == 0, 0, count - 1)
        start = first - tl.load(tiles + listed) - (TILE - 1) + i % STEPS * BLOCK_N
        k_tile = load_tile(k, batch, head, start, columns, stride_kn, stride_kd, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        v_tile = load_tile(v, batch, head, start, columns, stride_vn, stride_vd, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        column = (start + tl.arange(0, BLOCK_N))[None, :]
        seen = (column >= 0) & (column <= row[:, None])
        acc, peak, total = take(acc, peak, total, q, k_tile, v_tile, seen, scale_log2, MASKED)
    return acc, peak, total


@triton.jit
def sweep_columns(acc, peak, total, q, k, v, listed, covered, count, first, stride_kn, stride_kd, stride_vn, stride_vd,
                  scale_log2, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Take the first `count` listed columns, all of them left of column `first`, unless a tile covers them."""
    for start in tl.range(0, count, BLOCK_N, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK_N)
        inside = slot < count
        column = tl.load(listed + slot, mask=inside, other=0)
        seen = tl.load(covered + (first - 1 - column), mask=inside, other=1) == 0
        dims = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
        loaded = inside[:, None] & (dims < D)
        far = column.to(tl.int64)[:, None]
        k_tile = tl.load(k + (far * stride_kn + dims * stride_kd), mask=loaded, other=0.0)
        v_tile = tl.load(v + (far * stride_vn + dims * stride_vd), mask=loaded, other=0.0)
        acc, peak, total = take(acc, peak, total, q, k_tile, v_tile, seen[None, :], scale_log2, True)
    return acc, peak, total


@triton.jit(do_not_specialize=["tokens", "kv_heads", "group", "listed", "vertical"])
def vertical_slash_kernel(
    q, k, v, k_tiles, v_tiles, out, lse, tiles, tile_counts, columns, column_counts, covered, scale_log2,
    tokens, kv_heads, group, listed, vertical,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
    LISTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr, COLUMN_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M rows of one query head; `lse` and the lists are contiguous, `k_tiles` is k or its tensor map."""
    blocks, row_tiles = tl.cdiv(tokens, BLOCK_M), tl.cdiv(tokens, TILE)
    program = tl.program_id(0)
    member = program % group
    block = blocks - 1 - (program // group) % blocks  # longest first
    batch = (program // (group * blocks)) // kv_heads
    kv_head = (program // (group * blocks)) % kv_heads
    head = batch.to(tl.int64) * kv_heads * group + kv_head * group + member  # of all batch entries
    own = block * BLOCK_M // TILE  # the row tile, whose distances count from its first row
    first = own * TILE

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    stored = (row < tokens)[:, None] & (dims < D)[None, :]
    q += batch.to(tl.int64) * stride_qb + (kv_head * group + member).to(tl.int64) * stride_qh
    q_tile = tl.load(q + (row.to(tl.int64)[:, None] * stride_qn + dims[None, :] * stride_qd), mask=stored, other=0.0)
    k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh
    if TMA:
        k_source, v_source = k_tiles, v_tiles
    else:
        k_source, v_source = k, v
    tiles += (head * row_tiles + own) * listed if LISTS else head * listed
    count = tl.load(tile_counts + head * row_tiles + own)
    gathered = tl.load(column_counts + head * row_tiles + own)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # A loop even where there are two steps at most, pipelined like the next, and gathers that are not unless the tiles
    # come by TMA: else, on sm_90, ptxas waits for every wgmma in turn (its message C7515).
    acc, peak, total = sweep_tiles(acc, peak, total, q_tile, k_source, v_source, batch, kv_head, tiles,
                                   0, tl.minimum(count, 2), count, first, row, tokens,
                                   stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
                                   D, BLOCK_N, BLOCK_D, TILE, True, TMA, STAGES)  # fmt: skip
    acc, peak, total = sweep_tiles(acc, peak, total, q_tile, k_source, v_source, batch, kv_head, tiles,
                                   1, count - 1, count, first, row, tokens,
                                   stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
                                   D, BLOCK_N, BLOCK_D, TILE, False, TMA, STAGES)  # fmt: skip
    acc, peak, total = sweep_columns(acc, peak, total, q_tile, k, v, columns + head * vertical,
                                     covered + head * (row_tiles - 1) * TILE, gathered, first,
                                     stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
                                     D, BLOCK_N, BLOCK_D, COLUMN_STAGES)  # fmt: skip

    acc = acc / total[:, None]
    out += batch.to(tl.int64) * stride_ob + (kv_head * group + member).to(tl.int64) * stride_oh
    out += row.to(tl.int64)[:, None] * stride_on + dims[None, :] * stride_od
    tl.store(out, acc.to(out.dtype.element_ty), mask=stored)
    tl.store(lse + head * tokens + row, (peak + tl.log2(total)) * 0.6931471805599453, mask=row < tokens)


def launch(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, tile_counts: Tensor, columns: Tensor, column_counts: Tensor,
    covered: Tensor, scale: float, cut: Tiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel with the given cut; `cut.tma` needs keys and values that `tma_can_read`."""
    (batch, q_heads, tokens, dim), kv_heads = q.shape, k.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty((batch, q_heads, tokens), dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(dim)
    k_tiles, v_tiles = k, v
    if cut.tma:
        box = [1, 1, cut.block_n, block_d]
        k_tiles, v_tiles = (TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (k, v))
    lists = [x.contiguous() for x in (tiles, tile_counts, columns, column_counts, covered)]
    with torch.cuda.device_of(q):
        vertical_slash_kernel[(batch * q_heads * triton.cdiv(tokens, cut.block_m),)](
            q, k, v, k_tiles, v_tiles, out, lse, *lists, scale * math.log2(math.e),
            tokens, kv_heads, q_heads // kv_heads, tiles.shape[3], columns.shape[2],
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            LISTS=tiles.shape[2] > 1, D=dim, BLOCK_D=block_d, BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, TILE=TILE,
            TMA=cut.tma, STAGES=cut.stages, COLUMN_STAGES=cut.column_stages, num_warps=cut.warps,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("apb::sparse_flash", mutates_args=())
def _sparse_flash(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, tile_counts: Tensor, columns: Tensor, column_counts: Tensor,
    covered: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    capability = tile_capability(q)
    cut = choose_tiles(q.dtype, q.shape[-1], capability, tma=tma_can_read(k) and tma_can_read(v))
    return launch(q, k, v, tiles, tile_counts, columns, column_counts, covered, scale, cut)


@_sparse_flash.register_fake
def _(q, k, v, tiles, tile_counts, columns, column_counts, covered, scale):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def sparse_flash(
    q: Tensor, k: Tensor, v: Tensor, *, tiles: Tensor, tile_counts: Tensor, columns: Tensor, column_counts: Tensor,
    covered: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend as `apb.attend.sparse_attention`, which checks the arguments; the lists are those of its index."""
    return _sparse_flash(q, k, v, tiles, tile_counts, columns, column_counts, covered, scale)
