"""Masked attention out of PyTorch's own fused kernels: the fast path on a CPU.

The mask of APB is two causal calls aligned at the bottom right, A × A and B × [A, P, B] (APB section 3.5).
PyTorch's kernels align a causal mask at the top left, so each call becomes a rectangle that every row sees
and a square causal tail, joined by their log-sum-exps.
"""

import torch
from torch import Tensor

from apb.merge import merge_pair

__all__ = ["decode_attention", "masked_attention"]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, *, anchor_tokens: int, passing_tokens: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend as `apb.attend.masked_attention`, in up to four kernel calls."""
    block_tokens = k.shape[2] - anchor_tokens - passing_tokens
    anchor_rows = max(0, q.shape[2] - block_tokens)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # kernels ignore it
    if anchor_rows == 0:
        return _bottom_right_causal(q, k, v, scale)
    anchor_keys = (x[:, :, :anchor_tokens] for x in (k, v))
    out, lse = _bottom_right_causal(q[:, :, :anchor_rows], *anchor_keys, scale)
    if anchor_rows == q.shape[2]:
        return out, lse
    block_out, block_lse = _bottom_right_causal(q[:, :, anchor_rows:], k, v, scale)
    return torch.cat((out, block_out), dim=2), torch.cat((lse, block_lse), dim=2)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `apb.attend.decode_attention`; needs at least one key."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if not causal or q.shape[2] == 1:
        return _fused(q, k, v, scale, causal=False)
    empty_rows = max(0, q.shape[2] - k.shape[2])
    out, lse = _bottom_right_causal(q[:, :, empty_rows:], k, v, scale)
    if empty_rows == 0:
        return out, lse
    out = torch.nn.functional.pad(out, (0, 0, empty_rows, 0))
    return out, torch.nn.functional.pad(lse, (empty_rows, 0), value=-torch.inf)


def _bottom_right_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Let row i of n see the first m − n + i + 1 of m ≥ n keys: a rectangle, then a square causal tail."""
    seen_by_all = k.shape[2] - q.shape[2]
    tail = _fused(q, k[:, :, seen_by_all:], v[:, :, seen_by_all:], scale, causal=True)
    if seen_by_all == 0:
        return tail
    return merge_pair(*_fused(q, k[:, :, :seen_by_all], v[:, :, :seen_by_all], scale, causal=False), *tail)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Call the ATen kernel of this device that returns the log-sum-exp too (`causal` needs a square)."""
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)[:2]
    elif q.dtype == torch.float32:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out, lse[:, :, : q.shape[2]].float()  # the memory-efficient kernel pads its LSE
