"""Score tokens with a retaining head, in one kernel over the projections where they lie (Locret, arXiv 2410.01805).

scores(t) = fc2(silu(fc1([q_t, k_t, v_t]))). The first layer's weights are three groups of columns, so its product is
a sum over the heads of q, then k, then v, and no concatenation is made. A program accumulates a tile of tokens ×
hidden units in float32, applies silu and its share of the second layer; the shares of all hidden units are added
afterwards, in a fixed order. So no hidden unit reaches memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .masked_flash import tile_capability, tma_can_read

__all__ = ["Tiles", "choose_tiles", "launch", "retaining_head_kernel", "retaining_head_scores"]


class Tiles(NamedTuple):
    """How one program cuts its work: tokens × hidden units, dims of a step, warps, pipeline stages, loads by TMA."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False


def choose_tiles(dtype: torch.dtype, width: int, dim: int, capability: tuple[int, int], *, tma: bool) -> Tiles:
    """Look up the tiles for a dtype, hidden width, head dim, capability, and whether TMA can read all inputs."""
    block_k = min(64, max(16, triton.next_power_of_2(dim)))
    units = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:  # no tensor cores in full float32: small tiles
        return Tiles(64, min(32, units), 16, 8, 2)
    tma = tma and capability[0] >= 9
    if capability[0] >= 9 and units >= 256:
        return Tiles(128, 256, block_k, 8, 3, tma)
    return Tiles(128, min(128, units), block_k, 8, 3, tma)


@triton.jit
def load_rows(x, batch, head, first, dim, rows, stride_b, stride_h, stride_n, stride_d,
              D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Load dims [dim, dim + BLOCK_K) of BLOCK_M tokens of one head, zeros outside."""
    if TMA:
        tile = x.load([batch, head, first, dim]).reshape(BLOCK_M, BLOCK_K)
    else:
        row = first + tl.arange(0, BLOCK_M)
        dims = dim + tl.arange(0, BLOCK_K)
        x += tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
        x += row.to(tl.int64)[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d
        tile = tl.load(x, mask=(row < rows)[:, None] & (dims < D)[None, :], other=0.0)
    return tile


@triton.jit
def add_part(acc, x, fc1, batch, first, unit, rows, width, heads, first_head, all_heads,
             stride_b, stride_h, stride_n, stride_d,
             D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Add the product of one projection's heads with their columns of fc1."""
    steps: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    for step in tl.range(0, heads * steps, num_stages=STAGES):
        head, dim = step // steps, step % steps * BLOCK_K
        rows_tile = load_rows(x, batch, head, first, dim, rows, stride_b, stride_h, stride_n, stride_d,
                              D, BLOCK_M, BLOCK_K, TMA)  # fmt: skip
        weights = load_rows(fc1, 0, first_head + head, unit, dim, width, 0, D, all_heads * D, 1,
                            D, BLOCK_N, BLOCK_K, TMA)  # fmt: skip
        acc = tl.dot(rows_tile, weights.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["batches", "rows", "width", "q_heads"])
def retaining_head_kernel(
    q, k, v, fc1, fc2, scores, batches, rows, width, q_heads, kv_heads,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Score BLOCK_M tokens by BLOCK_N hidden units; `fc2` and `scores` [unit tiles, batch, heads, rows] are contiguous.

    Programs that share tokens are neighbours, so the projections come from memory once.
    """
    unit_tile = tl.program_id(0)
    batch = tl.program_id(2)
    unit, first = unit_tile * BLOCK_N, tl.program_id(1) * BLOCK_M
    all_heads = q_heads + 2 * kv_heads
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = add_part(acc, q, fc1, batch, first, unit, rows, width, q_heads, 0, all_heads,
                   stride_qb, stride_qh, stride_qn, stride_qd, D, BLOCK_M, BLOCK_N, BLOCK_K, TMA, STAGES)  # fmt: skip
    acc = add_part(acc, k, fc1, batch, first, unit, rows, width, kv_heads, q_heads, all_heads,
                   stride_kb, stride_kh, stride_kn, stride_kd, D, BLOCK_M, BLOCK_N, BLOCK_K, TMA, STAGES)  # fmt: skip
    acc = add_part(acc, v, fc1, batch, first, unit, rows, width, kv_heads, q_heads + kv_heads, all_heads,
                   stride_vb, stride_vh, stride_vn, stride_vd, D, BLOCK_M, BLOCK_N, BLOCK_K, TMA, STAGES)  # fmt: skip

    hidden = acc / (1 + tl.exp(-acc))
    head, units = tl.arange(0, BLOCK_H), unit + tl.arange(0, BLOCK_N)
    second = tl.load(fc2 + head[None, :] * width + units[:, None],
                     mask=(head < kv_heads)[None, :] & (units < width)[:, None], other=0.0)  # fmt: skip
    out = tl.dot(hidden.to(second.dtype), second, input_precision="ieee")
    row = first + tl.arange(0, BLOCK_M)
    place = (tl.cast(unit_tile, tl.int64) * batches + batch) * kv_heads + head.to(tl.int64)[None, :]
    tl.store(scores + place * rows + row[:, None], out, mask=(head < kv_heads)[None, :] & (row < rows)[:, None])


def launch(q: Tensor, k: Tensor, v: Tensor, fc1: Tensor, fc2: Tensor, tiles: Tiles) -> Tensor:
    """Run the kernel with the given tiles and add the shares; `tiles.tma` needs inputs that `tma_can_read`."""
    (batch, q_heads, rows, dim), kv_heads, width = q.shape, k.shape[1], fc1.shape[0]
    unit_tiles = triton.cdiv(width, tiles.block_n)
    shares = torch.empty((unit_tiles, batch, kv_heads, rows), dtype=torch.float32, device=q.device)
    inputs, weights = [q, k, v], fc1
    if tiles.tma:
        box = [1, 1, tiles.block_m, tiles.block_k]
        inputs = [TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (q, k, v)]
        by_head = fc1.view(1, width, -1, dim).transpose(1, 2)
        box = [1, 1, tiles.block_n, tiles.block_k]
        weights = TensorDescriptor(by_head, list(by_head.shape), list(by_head.stride()), box)
    grid = (unit_tiles, triton.cdiv(rows, tiles.block_m), batch)
    with torch.cuda.device_of(q):
        retaining_head_kernel[grid](
            *inputs, weights, fc2, shares, batch, rows, width, q_heads, kv_heads,
            *q.stride(), *k.stride(), *v.stride(),
            D=dim, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            BLOCK_H=max(16, triton.next_power_of_2(kv_heads)), TMA=tiles.tma, STAGES=tiles.stages,
            num_warps=tiles.warps,
        )  # fmt: skip
    return shares[0] if unit_tiles == 1 else shares.sum(0)


@torch.library.custom_op("apb::retaining_head_scores", mutates_args=())
def retaining_head_scores(q: Tensor, k: Tensor, v: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """Return float32 scores [batch, kv_heads, tokens] of projections [batch, heads, tokens, dim], of any stride.

    fc1 [width, (q_heads + 2 · kv_heads) · dim] and fc2 [kv_heads, width] are contiguous; all share a dtype.
    Needs at least one token.
    """
    capability = tile_capability(q)
    tma = all(map(tma_can_read, (q, k, v))) and tma_can_read(fc1.view(fc1.shape[0], -1, q.shape[3]))
    tiles = choose_tiles(q.dtype, fc1.shape[0], q.shape[3], capability, tma=tma)
    return launch(q, k, v, fc1, fc2, tiles)


@retaining_head_scores.register_fake
def _(q, k, v, fc1, fc2):
    return q.new_empty(k.shape[:3], dtype=torch.float32)
