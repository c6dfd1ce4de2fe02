"""Masked attention as a FlexAttention mask: the whole idea of APB's mask in four lines of PyTorch.

Compiled on CUDA, eager (and slow) on a CPU. Differentiable there.
"""

from functools import cache, lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, create_block_mask, flex_attention

__all__ = ["masked_attention"]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, *, anchor_tokens: int, passing_tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend as `apb.attend.masked_attention`, with the blocks that FlexAttention finds in the mask."""
    mask = _block_mask(q.shape[2], k.shape[2], anchor_tokens, passing_tokens, q.device)
    attend = _compiled() if q.is_cuda else flex_attention
    gqa = q.shape[1] != k.shape[1]
    result = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=gqa, return_aux=AuxRequest(lse=True))
    out, aux = cast(tuple[Tensor, AuxOutput], result)
    return out, cast(Tensor, aux.lse).float()


@lru_cache(maxsize=8)
def _block_mask(rows: int, columns: int, anchor_tokens: int, passing_tokens: int, device: torch.device) -> BlockMask:
    """Describe the mask; the oracle of it is `apb.reference.apb_mask`."""
    first = columns - passing_tokens - rows  # rows that are left out at the start

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        token = row + first
        return column <= token + torch.where(token < anchor_tokens, 0, passing_tokens)

    return create_block_mask(sees, None, None, rows, columns, device=str(device))


@cache
def _compiled():
    return torch.compile(flex_attention)
