"""The kernels of others, called as their users would, on APB's mask: keys in the order [A, P, B], rows [A, B] or B.

Each is a class that prepares its inputs once and computes when called.
"""

import torch
from torch import Tensor

from apb.merge import merge_pair

__all__ = ["CuDNN", "FlashAttention3"]


class FlashAttention3:
    """FlashAttention-3 from the wheel `fa3_fwd`: a causal launch for the anchor's rows, and one for the block's.

    Its causal mask is aligned at the bottom right, which is what a block with keys before it needs.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, anchor_rows: int) -> None:
        self.anchor_rows = anchor_rows
        self.tensors = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # batch tokens heads dim

    def __call__(self) -> list[object]:
        """Compute; its LSE is not asked for."""
        from fa3_fwd_interface import flash_attn_func  # ty: ignore[import-not-found]

        q, k, v = self.tensors
        a = self.anchor_rows
        anchor = [flash_attn_func(q[:, :a], k[:, :a], v[:, :a], causal=True)] if a else []
        return [*anchor, flash_attn_func(q[:, a:], k, v, causal=True)]


class CuDNN:
    """cuDNN through PyTorch, on keys and values repeated for every query head.

    Three calls, since its causal mask is aligned at the top left: the anchor on itself, the block on what stands before
    it, and the block on itself; the last two merged by their LSEs.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, anchor_rows: int) -> None:
        self.anchor_rows = anchor_rows
        group = q.shape[1] // k.shape[1]
        self.tensors = [q, *(x.repeat_interleave(group, dim=1) for x in (k, v))]

    def __call__(self) -> list[tuple[Tensor, Tensor]]:
        """Compute the output and the LSE of the anchor's rows, if any, and of the block's."""
        q, k, v = self.tensors
        a = self.anchor_rows
        before = k.shape[2] - (q.shape[2] - a)
        anchor = [_cudnn(q[:, :, :a], k[:, :, :a], v[:, :, :a], causal=True)] if a else []
        block = _cudnn(q[:, :, a:], k[:, :, before:], v[:, :, before:], causal=True)
        if before:
            block = merge_pair(*block, *_cudnn(q[:, :, a:], k[:, :, :before], v[:, :, :before], causal=False))
        return [*anchor, block]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[:2]
    return out, lse.reshape(q.shape[:3]).float()
