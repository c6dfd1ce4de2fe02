"""Gradients of `masked_flash`: one kernel for the keys and values, one for the queries, no atomics.

With P = exp(scale · q kᵀ − lse) where the mask allows, and else 0, made again from the saved LSE:

    D = rowsum(gₒ ∘ out) − gₗ      dS = P ∘ (gₒ vᵀ − D)      dq = scale · dS k      dk = scale · dSᵀ q      dv = Pᵀ gₒ

gₒ and gₗ are the gradients of the output and of the LSE. Each gradient is written by one program that adds in one
order, the query heads of a group included; so equal inputs give equal bits.
"""

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .masked_flash import Tiles, tile_capability, tma_can_read
from .masked_flash_backward_kernels import grad_keys_kernel, grad_queries_kernel

__all__ = ["choose_tiles", "delta_kernel", "launch", "masked_flash_backward"]

_DELTA_ELEMENTS = 4096  # of one program that computes D


# By what the assembler reports: the largest tiles without a spill, or on sm_90 a wait for every wgmma in turn. For
# head dims up to 64, 128 and 256.
_TILES = {
    "keys": {
        "float32": (Tiles(16, 32, 8, 1, 1), Tiles(16, 32, 8, 1, 1), Tiles(16, 16, 16, 1, 1)),
        "sm_80": (Tiles(32, 128, 8, 2, 2), Tiles(64, 64, 8, 2, 2), Tiles(32, 64, 8, 2, 2)),
        "sm_90": (Tiles(64, 128, 8, 3, 2), Tiles(32, 128, 8, 3, 2), Tiles(64, 32, 8, 2, 2)),
        "sm_90 tma": (Tiles(64, 128, 8, 3, 2), Tiles(64, 64, 4, 2, 2), Tiles(64, 32, 8, 2, 2)),
        "sm_100": (Tiles(64, 128, 8, 2, 2), Tiles(64, 64, 8, 2, 2), Tiles(32, 64, 8, 2, 2)),
    },
    "queries": {
        "float32": (Tiles(32, 16, 8, 1, 1), Tiles(32, 16, 8, 1, 1), Tiles(16, 16, 4, 1, 1)),
        "sm_80": (Tiles(128, 64, 8, 3, 3), Tiles(64, 64, 8, 2, 1), Tiles(64, 32, 8, 2, 1)),
        "sm_90": (Tiles(128, 64, 8, 2, 1), Tiles(128, 64, 8, 2, 1), Tiles(64, 16, 8, 2, 1)),
        "sm_90 tma": (Tiles(128, 64, 8, 2, 1), Tiles(128, 64, 8, 3, 2), Tiles(64, 64, 8, 2, 2)),
        "sm_100": (Tiles(128, 64, 8, 2, 2), Tiles(128, 64, 8, 2, 1), Tiles(128, 32, 8, 2, 1)),
    },
}


def choose_tiles(
    gradient: Literal["keys", "queries"], dtype: torch.dtype, dim: int, capability: tuple[int, int], *, tma: bool
) -> Tiles:
    """Look up the tiles of one kernel.

    Args:
        gradient: of the keys and values, or of the queries.
        dtype: of the inputs.
        dim: head dim.
        capability: compute capability.
        tma: whether TMA can read what the kernel streams: the queries and the output's gradient for "keys", the keys
            and values for "queries".
    """
    tma = tma and capability[0] >= 9 and dtype != torch.float32
    if dtype == torch.float32:
        line = "float32"
    elif capability[0] == 9:
        line = "sm_90 tma" if tma else "sm_90"
    else:
        line = "sm_100" if capability[0] > 9 else "sm_80"
    return _TILES[gradient][line][(dim > 64) + (dim > 128)]._replace(tma=tma)


@triton.jit
def delta_kernel(
    out, grad_out, grad_lse, delta, rows, heads,
    stride_ob, stride_oh, stride_on, stride_od, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_lb, stride_lh, stride_ln,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Compute D = rowsum(gₒ ∘ out) − gₗ of some rows; `delta` is [batch, q_heads, rows], contiguous."""
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    row = (tl.program_id(0) % tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    n, dims = row.to(tl.int64)[:, None], tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    seen = inside[:, None] & (dims < D)
    out += batch * stride_ob + head * stride_oh
    grad_out += batch * stride_gb + head * stride_gh
    grad_lse += batch * stride_lb + head * stride_lh
    values = tl.load(out + (n * stride_on + dims * stride_od), mask=seen, other=0.0).to(tl.float32)
    grads = tl.load(grad_out + (n * stride_gn + dims * stride_gd), mask=seen, other=0.0).to(tl.float32)
    through_lse = tl.load(grad_lse + row.to(tl.int64) * stride_ln, mask=inside, other=0.0)
    tl.store(delta + plane * rows + row, tl.sum(values * grads, 1) - through_lse, mask=inside)


def launch(
    grads: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, anchor_tokens: int,
    passing_tokens: int, scale: float, key_tiles: Tiles, query_tiles: Tiles, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the kernels; `grads` are those of out and LSE, and tiles with `tma` need tensors that `tma_can_read`."""
    batch, q_heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    anchor_rows = max(0, rows - (columns - anchor_tokens - passing_tokens)) if causal else 0
    shift = columns - rows if causal else columns  # not causal: every row's limit lies behind the last column
    grad_out, grad_lse = grads
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    delta = torch.empty_like(lse)
    sizes = {"D": dim, "BLOCK_D": triton.next_power_of_2(dim)}
    lengths = (rows, columns, anchor_tokens, anchor_rows, shift, kv_heads, q_heads // kv_heads)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride())
    with torch.cuda.device_of(q):
        block_rows = _DELTA_ELEMENTS // sizes["BLOCK_D"]
        delta_kernel[(batch * q_heads * triton.cdiv(rows, block_rows),)](
            out, grad_out, grad_lse, delta, rows, q_heads, *out.stride(), *grad_out.stride(), *grad_lse.stride(),
            **sizes, BLOCK_ROWS=block_rows,
        )  # fmt: skip
        queries, out_grads = (_described(x, key_tiles.tma, key_tiles.block_m) for x in (q, grad_out))
        grad_keys_kernel[(batch * kv_heads * triton.cdiv(columns, key_tiles.block_n),)](
            queries, k, v, out_grads, lse, delta, grad_k, grad_v, scale, scale * math.log2(math.e),
            *lengths, *strides, *grad_k.stride(), *grad_v.stride(), **sizes, **_settings(key_tiles),
        )  # fmt: skip
        keys, values = (_described(x, query_tiles.tma, query_tiles.block_n) for x in (k, v))
        row_tiles = sum(triton.cdiv(n, query_tiles.block_m) for n in (anchor_rows, rows - anchor_rows))
        grad_queries_kernel[(batch * q_heads * row_tiles,)](
            q, keys, values, grad_out, lse, delta, grad_q, scale, scale * math.log2(math.e),
            *lengths, *strides, *grad_q.stride(), **sizes, **_settings(query_tiles),
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _described(x: Tensor, tma: bool, tokens: int) -> Tensor | TensorDescriptor:
    """Return what a kernel reads `tokens` rows of x at a time through."""
    if not tma:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tokens, triton.next_power_of_2(x.shape[-1])])


def _settings(tiles: Tiles) -> dict[str, int | bool]:
    return {
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "TMA": tiles.tma, "STAGES": tiles.stages,
        "DIAGONAL_STAGES": tiles.diagonal_stages, "num_warps": tiles.warps,
    }  # fmt: skip


@torch.library.custom_op("apb::masked_flash_backward", mutates_args=())
def masked_flash_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    anchor_tokens: int, passing_tokens: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of q, k and v from those of the output and the LSE of `masked_flash`."""
    capability = tile_capability(q)
    key_tiles, query_tiles = (
        choose_tiles(gradient, q.dtype, q.shape[-1], capability, tma=all(tma_can_read(x) for x in streamed))
        for gradient, streamed in (("keys", (q, grad_out)), ("queries", (k, v)))
    )
    grads = grad_out, grad_lse
    return launch(grads, q, k, v, out, lse, anchor_tokens, passing_tokens, scale, key_tiles, query_tiles, causal)


@masked_flash_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
