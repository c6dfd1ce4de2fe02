"""Launch the Hopper attention of `hopper_kernel.py`: tiles, tensor maps, and the operator."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_kernel import hopper_flash_kernel
from .masked_flash import backward, save_for_backward, tma_can_read

__all__ = ["DIMS", "GLUON_TYPE", "Tiles", "choose_tiles", "hopper_flash", "launch"]

DIMS = (64, 128)
"""Head dims that the kernel takes."""
GLUON_TYPE = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


class Tiles(NamedTuple):
    """How one program cuts its work: warpgroups of 64 rows, keys of a tile, buffers of keys, where Q stays."""

    consumers: int
    block_n: int
    stages: int
    q_in_registers: bool
    registers: int


def choose_tiles(dim: int) -> Tiles:
    """Look up the tiles for a head dim, 64 or 128."""
    return Tiles(2, 128, 4, False, 240) if dim == 64 else Tiles(2, 128, 3, False, 240)


def launch(
    q: Tensor, k: Tensor, v: Tensor, anchor_tokens: int, passing_tokens: int, scale: float, tiles: Tiles,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel with the given tiles; tensors that TMA cannot read are copied first."""
    out = torch.empty_like(q)
    # Not x.contiguous(), which is x itself where it begins at an odd address.
    q, k, v = (x if tma_can_read(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    batch, q_heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    anchor_rows = max(0, rows - (columns - anchor_tokens - passing_tokens)) if causal else 0
    lse = torch.empty((batch, q_heads, rows), dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    block_m = 64 * tiles.consumers
    row_tiles = triton.cdiv(anchor_rows, block_m) + triton.cdiv(rows - anchor_rows, block_m)
    all_tiles = batch * q_heads * row_tiles
    programs = min(all_tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device_of(q):
        hopper_flash_kernel[(programs,)](
            _boxes(q, 64), _boxes(k, tiles.block_n), _boxes(v, tiles.block_n), out, lse, counter,
            scale * math.log2(math.e), rows, columns, anchor_tokens, anchor_rows, kv_heads, q_heads // kv_heads,
            all_tiles, *out.stride(), CAUSAL=causal, D=dim, CONSUMERS=tiles.consumers, BLOCK_N=tiles.block_n,
            STAGES=tiles.stages, Q_IN_REGISTERS=tiles.q_in_registers, REGISTERS=tiles.registers, num_warps=4,
        )  # fmt: skip
    return out, lse


def _boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe x to TMA in boxes of `rows` tokens of one head."""
    box = [1, 1, rows, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(box, GLUON_TYPE[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


@torch.library.custom_op("apb::hopper_flash", mutates_args=())
def _hopper_flash(
    q: Tensor, k: Tensor, v: Tensor, anchor_tokens: int, passing_tokens: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    return launch(q, k, v, anchor_tokens, passing_tokens, scale, choose_tiles(q.shape[-1]), causal)


@_hopper_flash.register_fake
def _(q, k, v, anchor_tokens, passing_tokens, scale, causal=True):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


_hopper_flash.register_autograd(backward, setup_context=save_for_backward)


def hopper_flash(
    q: Tensor, k: Tensor, v: Tensor, *, anchor_tokens: int, passing_tokens: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Attend as `apb.kernels.masked_flash.masked_flash`; tensors that TMA cannot read are copied first.

    The backward pass is that of the portable kernel.
    """
    return _hopper_flash(q, k, v, anchor_tokens, passing_tokens, scale, causal)
