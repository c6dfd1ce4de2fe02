"""FlashAttention with APB's mask, in one launch that never touches a fully masked block (APB section 3.5).

Keys come as [A, P, B], rows as the last ones of [A, B]. A tile of rows lies in A or in B, so that for the whole tile
the mask is "column ≤ row + shift": causal attention whose limit jumps by |P| at the block.

              A      P      B
          ┌──────┬──────┬────────┐
        A │◣     │      │        │      ▓ sweep 1: keys that every row of the tile sees, no mask
          ├──────┼──────┼────────┤      ◣ sweep 2: the diagonal
        B │▓▓▓▓▓▓│▓▓▓▓▓▓│◣       │
          │▓▓▓▓▓▓│▓▓▓▓▓▓│▓▓▓◣    │
          └──────┴──────┴────────┘

Programs run KV head by KV head (its keys then stay in L2), the longest row tiles first, the query heads that share
the keys side by side.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = [
    "Tiles",
    "backward",
    "choose_tiles",
    "launch",
    "masked_flash",
    "masked_flash_kernel",
    "save_for_backward",
    "tma_can_read",
]


class Tiles(NamedTuple):
    """How one program cuts its work: rows × keys of a tile, warps, pipeline stages, and loads by TMA or pointers."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    diagonal_stages: int
    tma: bool = False


def choose_tiles(dtype: torch.dtype, dim: int, capability: tuple[int, int], *, tma: bool) -> Tiles:
    """Look up the tiles for a dtype, head dim, compute capability, and whether TMA can read the keys and values.

    Tuned on sm_90 (bfloat16); on sm_80 and sm_100 chosen by what the assembler reports.
    """
    wide = dim > 128
    if dtype == torch.float32:  # no tensor cores in full float32: small tiles
        return Tiles(16, 32, 8, 1, 1) if wide else Tiles(32, 16, 8, 1, 1)
    if capability[0] < 9:
        return Tiles(64, 32, 8, 2, 2) if wide else Tiles(128, 64, 8, 3, 3)
    if not tma:
        return Tiles(128, 32, 8, 2, 1) if wide else Tiles(128, 64, 8, 3, 1)
    if dim <= 64:
        return Tiles(128, 64, 8, 4, 1, True)
    return Tiles(128, 64, 8, 2, 2, True) if wide else Tiles(128, 128, 8, 3, 1, True)


@triton.jit
def load_tile(source, batch, head, start, hi, stride_n, stride_d, D: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Load keys or values [start, start + BLOCK_N) of one head; zeros at and after `hi` (TMA: after the last)."""
    if TMA:
        tile = source.load([batch, head, start, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        rows = tl.arange(0, BLOCK_N)[:, None].to(tl.int64)
        dims = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
        pointers = source + tl.cast(start, tl.int64) * stride_n + (rows * stride_n + dims * stride_d)
        if MASKED:
            tile = tl.load(pointers, mask=(start + rows < hi) & (dims < D), other=0.0)
        elif BLOCK_D != D:
            tile = tl.load(pointers, mask=dims < D, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def sweep(acc, peak, total, q, k, v, batch, head, lo, hi, limit, stride_kn, stride_kd, stride_vn, stride_vd,
          scale_log2, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
          TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Take the keys [lo, hi) into the online softmax: per row the peak score, Σ 2^(score − peak) and Σ of those · v."""
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        k_tile = load_tile(k, batch, head, start, hi, stride_kn, stride_kd, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        v_tile = load_tile(v, batch, head, start, hi, stride_vn, stride_vd, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        scores = tl.dot(q, k_tile.T, input_precision="ieee")
        if MASKED:
            columns = start + tl.arange(0, BLOCK_N)
            scores = tl.where(columns[None, :] <= limit[:, None], scores, float("-inf"))
        # Every row sees column 0, so its peak is finite from the first block on: no (−inf) − (−inf) below.
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["rows", "columns", "anchor_tokens", "anchor_rows", "kv_heads", "group"])
def masked_flash_kernel(
    q, k, v, out, lse, scale_log2,
    rows, columns, anchor_tokens, anchor_rows, kv_heads, group,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on, stride_od,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, DIAGONAL_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute one row tile of one query head; `lse` is [batch, q_heads, rows], contiguous.

    If not CAUSAL every row sees every column, and there are no anchor rows.
    """
    # Which (batch, KV head, row tile, query head of the group): the last varies fastest.
    block_tiles = tl.cdiv(rows - anchor_rows, BLOCK_M)
    tiles = block_tiles + tl.cdiv(anchor_rows, BLOCK_M)
    program = tl.program_id(0)
    member = program % group
    tile = tiles - 1 - (program // group) % tiles  # counted from the top; longest first
    batch = (program // (group * tiles)) // kv_heads
    kv_head = (program // (group * tiles)) % kv_heads
    q_head = kv_head * group + member

    anchor_tiles = tiles - block_tiles
    if tile < anchor_tiles:
        first, end, shift = tile * BLOCK_M, anchor_rows, anchor_tokens - anchor_rows
    else:
        first, end, shift = anchor_rows + (tile - anchor_tiles) * BLOCK_M, rows, columns - rows

    row = first + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (row < end)[:, None] & (dims < D)[None, :]
    q += batch.to(tl.int64) * stride_qb + q_head.to(tl.int64) * stride_qh + first.to(tl.int64) * stride_qn
    local = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    q_tile = tl.load(q + (local * stride_qn + dims[None, :] * stride_qd), mask=inside, other=0.0)
    if not TMA:
        k += batch.to(tl.int64) * stride_kb + kv_head.to(tl.int64) * stride_kh
        v += batch.to(tl.int64) * stride_vb + kv_head.to(tl.int64) * stride_vh

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if CAUSAL:
        limit = row + shift  # the last column that each row sees
        full = (first + shift + 1) // BLOCK_N * BLOCK_N  # the columns before it are seen by every row
        hi = tl.minimum(first + BLOCK_M, end) + shift
    else:
        limit = tl.zeros([BLOCK_M], tl.int32) + (columns - 1)
        full = columns // BLOCK_N * BLOCK_N
        hi = columns
    acc, peak, total = sweep(acc, peak, total, q_tile, k, v, batch, kv_head, 0, full, limit,
                             stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
                             D, BLOCK_N, BLOCK_D, False, TMA, STAGES)  # fmt: skip
    # A second loop, not one straight-line step: that would make ptxas wait for every wgmma in turn. On sm_90 a
    # pipelined second loop of pointer loads does too, hence its own number of stages.
    acc, peak, total = sweep(acc, peak, total, q_tile, k, v, batch, kv_head, full, hi, limit,
                             stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
                             D, BLOCK_N, BLOCK_D, True, TMA, DIAGONAL_STAGES)  # fmt: skip

    acc = acc / total[:, None]
    out += batch.to(tl.int64) * stride_ob + q_head.to(tl.int64) * stride_oh + first.to(tl.int64) * stride_on
    tl.store(out + (local * stride_on + dims[None, :] * stride_od), acc.to(out.dtype.element_ty), mask=inside)
    lse += (batch.to(tl.int64) * kv_heads * group + q_head) * rows
    tl.store(lse + row, (peak + tl.log2(total)) * 0.6931471805599453, mask=row < end)


def launch(
    q: Tensor, k: Tensor, v: Tensor, anchor_tokens: int, passing_tokens: int, scale: float, tiles: Tiles,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel with the given tiles; `tiles.tma` needs keys and values that `tma_can_read`."""
    batch, q_heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    anchor_rows = max(0, rows - (columns - anchor_tokens - passing_tokens)) if causal else 0
    out = torch.empty_like(q)
    lse = torch.empty((batch, q_heads, rows), dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(dim)
    keys, values = k, v
    if tiles.tma:
        box = [1, 1, tiles.block_n, block_d]
        keys, values = (TensorDescriptor(x, list(x.shape), list(x.stride()), box) for x in (k, v))
    row_tiles = triton.cdiv(anchor_rows, tiles.block_m) + triton.cdiv(rows - anchor_rows, tiles.block_m)
    with torch.cuda.device_of(q):
        masked_flash_kernel[(batch * q_heads * row_tiles,)](
            q, keys, values, out, lse, scale * math.log2(math.e),
            rows, columns, anchor_tokens, anchor_rows, kv_heads, q_heads // kv_heads,
            *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            CAUSAL=causal, D=dim, BLOCK_D=block_d, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            TMA=tiles.tma, STAGES=tiles.stages, DIAGONAL_STAGES=tiles.diagonal_stages, num_warps=tiles.warps,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("apb::masked_flash", mutates_args=())
def _masked_flash(
    q: Tensor, k: Tensor, v: Tensor, anchor_tokens: int, passing_tokens: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    capability = tile_capability(q)
    tiles = choose_tiles(q.dtype, q.shape[-1], capability, tma=tma_can_read(k) and tma_can_read(v))
    return launch(q, k, v, anchor_tokens, passing_tokens, scale, tiles, causal)


@_masked_flash.register_fake
def _(q, k, v, anchor_tokens, passing_tokens, scale, causal=True):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what `backward` needs of one forward pass."""
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.settings = inputs[3:]


def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of an operator's seven arguments, of which q, k and v have one."""
    from .masked_flash_backward import masked_flash_backward  # it imports this file

    grads = masked_flash_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, None, None)


_masked_flash.register_autograd(backward, setup_context=save_for_backward)


def masked_flash(
    q: Tensor, k: Tensor, v: Tensor, *, anchor_tokens: int, passing_tokens: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Attend as `apb.attend.masked_attention`, which checks the arguments; needs at least one row.

    With causal=False every row sees every key (no anchor, no passing tokens, at least one key). Both results have
    gradients: `masked_flash_backward`.
    """
    return _masked_flash(q, k, v, anchor_tokens, passing_tokens, scale, causal)


def tile_capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability whose tiles fit x's device; (0, 0) under the interpreter.

    Consumer GPUs of capability 12 have neither sm_90's tensor cores nor its shared memory: sm_86's tiles fit them.
    """
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    return (8, 6) if capability[0] == 12 else capability


def tma_can_read(x: Tensor) -> bool:
    """Say whether a tensor map can describe x: last stride 1, base and other strides of whole 16 bytes, not 0."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
