"""Launch the Hopper attention of `hopper_kernel.py`: tensor maps, and the operator."""

import math

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .hopper_kernel import BLOCK_M, BLOCK_N, hopper_flash_kernel
from .masked_flash import backward, save_for_backward, tma_can_read

__all__ = ["DIMS", "GLUON_TYPE", "choose_stages", "hopper_flash", "launch"]

DIMS = (64, 128)
"""Head dims that the kernel takes."""
GLUON_TYPE = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def choose_stages(dim: int) -> int:
    """Look up how many buffers of keys, and of values, for a head dim of 64 or 128."""
    return 4 if dim == 64 else 3


def launch(
    q: Tensor, k: Tensor, v: Tensor, anchor_tokens: int, passing_tokens: int, scale: float, stages: int,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel with that many buffers; what TMA cannot read, or write, is copied before, or after."""
    wanted = torch.empty_like(q)
    out = wanted if tma_can_read(wanted) else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Not x.contiguous(), which is x itself where it begins at an odd address.
    q, k, v = (x if tma_can_read(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    batch, q_heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    anchor_rows = max(0, rows - (columns - anchor_tokens - passing_tokens)) if causal else 0
    lse = torch.empty((batch, q_heads, rows), dtype=torch.float32, device=q.device)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    row_tiles = triton.cdiv(anchor_rows, BLOCK_M.value) + triton.cdiv(rows - anchor_rows, BLOCK_M.value)
    all_tiles = batch * q_heads * row_tiles
    programs = min(all_tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device_of(q):
        hopper_flash_kernel[(programs,)](
            _boxes(q, 64), _boxes(k, BLOCK_N.value), _boxes(v, BLOCK_N.value), out, _boxes(out, 64), lse, counter,
            scale * math.log2(math.e), rows, columns, anchor_tokens, anchor_rows, kv_heads, q_heads // kv_heads,
            all_tiles, *out.stride()[:3], CAUSAL=causal, D=dim, STAGES=stages, num_warps=4,
        )  # fmt: skip
    return (out if out is wanted else wanted.copy_(out)), lse


def _boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """Describe x to TMA in boxes of `rows` tokens of one head."""
    box = [1, 1, rows, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(box, GLUON_TYPE[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


@torch.library.custom_op("apb::hopper_flash", mutates_args=())
def _hopper_flash(
    q: Tensor, k: Tensor, v: Tensor, anchor_tokens: int, passing_tokens: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    return launch(q, k, v, anchor_tokens, passing_tokens, scale, choose_stages(q.shape[-1]), causal)


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
