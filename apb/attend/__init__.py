"""Attention of one host, with its log-sum-exp: over [anchor, passing, block], over a cache, over listed keys.

The name of a function fixes the mathematics; `backend` fixes only who computes it. Every backend agrees with
`apb.reference` and none falls back to another. Arguments are checked here, once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apb.attend.check import DIFFERENTIABLE, Backend, check_inputs, choose_backend
from apb.attend.patterns import AShape, BlockSparse, Pattern, VerticalSlash
from apb.attend.sparse import sparse_attention
from apb.attend.sparse_index import SparseIndex

__all__ = [
    "AShape",
    "Backend",
    "BlockSparse",
    "Pattern",
    "SparseIndex",
    "VerticalSlash",
    "choose_backend",
    "decode_attention",
    "masked_attention",
    "sparse_attention",
]

_FEW_ROWS = 256  # measured on an H100: up to so many, splitting the keys pays; more rows fill the GPU themselves


def masked_attention(
    q: Float[Tensor, "batch q_heads rows dim"],
    k: Float[Tensor, "batch kv_heads columns dim"],
    v: Float[Tensor, "batch kv_heads columns dim"],
    *,
    anchor_tokens: int,
    passing_tokens: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch q_heads rows dim"], Float[Tensor, "batch q_heads rows"]]:
    """Attend from the rows [A, B] to the keys [A, P, B] of one host (APB section 3.5).

    softmax(scale · q kᵀ) v, where anchor row i sees A[0..i] and block row j sees all of A, all of P and
    B[0..j]. The block has columns − anchor_tokens − passing_tokens tokens. Rows fewer than |A| + |B| are the
    last ones, so rows = |B| leaves the anchor's rows out. With no anchor and no passing this is causal
    attention. Output and LSE are differentiable with "reference", "triton" and "hopper", and with "flex" on CUDA.

    Args:
        q: queries of [A, B], float16, bfloat16 or float32 (float64 with "reference"), dim 16..256.
        k: keys in the order [A, P, B]; q_heads is a multiple of kv_heads, and query head h reads KV head
            h // (q_heads / kv_heads).
        v: values, as k.
        anchor_tokens: |A| ≥ 0.
        passing_tokens: |P| ≥ 0.
        scale: multiplies the scores, > 0; 1/√dim if None.
        backend: who computes it; `choose_backend` says what "auto" takes.

    Returns:
        The output in q's dtype, and the LSE of each row, natural log, float32.

    Raises:
        ValueError: if an argument is out of range or the chosen backend does not take it.
        RuntimeError: if the chosen backend cannot run here, or would lose a gradient.

    Example:
        >>> q, k = torch.zeros(1, 4, 5, 16), torch.zeros(1, 2, 8, 16)
        >>> out, lse = masked_attention(q, k, k, anchor_tokens=2, passing_tokens=3)
        >>> [round(x) for x in lse[0, 0].exp().tolist()]  # how many keys each row saw
        [1, 2, 6, 7, 8]
    """
    legal = ("reference", "sdpa", "flex", "triton", "hopper")
    backend, scale = check_inputs(q, k, v, scale, backend, legal, differentiable=DIFFERENTIABLE)
    for name, count in (("anchor_tokens", anchor_tokens), ("passing_tokens", passing_tokens)):
        if isinstance(count, bool) or not isinstance(count, int | torch.SymInt) or count < 0:
            raise ValueError(f"{name} must be an integer ≥ 0, got {count!r}")
    rows, columns = q.shape[2], k.shape[2]
    if anchor_tokens + passing_tokens > columns:
        raise ValueError(
            f"anchor_tokens + passing_tokens = {anchor_tokens} + {passing_tokens} exceeds the {columns} "
            f"keys; k and v must hold [anchor, passing, block] in this order"
        )
    if rows > columns - passing_tokens:
        raise ValueError(
            f"q has {rows} rows, but anchor and block hold only {columns - passing_tokens} tokens; passing "
            f"tokens have keys and values but no queries, so leave them out of q"
        )
    if q.numel() == 0:  # nothing to compute, but a graph to keep: other hosts may wait for the keys' gradients
        backend = "reference"
    if backend == "reference":
        from apb.reference import apb_mask, attention

        out, lse = attention(q, k, v, apb_mask(rows, columns, anchor_tokens, passing_tokens), scale)
        return out.to(q.dtype), lse.float()
    lengths = {"anchor_tokens": anchor_tokens, "passing_tokens": passing_tokens}
    if backend == "sdpa":
        from apb.attend import sdpa

        return sdpa.masked_attention(q, k, v, **lengths, scale=scale)
    if backend == "flex":
        from apb.attend import flex

        return flex.masked_attention(q, k, v, **lengths, scale=scale)
    if backend == "hopper":
        from apb.kernels.hopper import hopper_flash

        return hopper_flash(q, k, v, anchor_tokens=anchor_tokens, passing_tokens=passing_tokens, scale=scale)
    from apb.kernels.masked_flash import masked_flash

    return masked_flash(q, k, v, anchor_tokens=anchor_tokens, passing_tokens=passing_tokens, scale=scale)


def decode_attention(
    q: Float[Tensor, "batch q_heads rows dim"],
    k: Float[Tensor, "batch kv_heads columns dim"],
    v: Float[Tensor, "batch kv_heads columns dim"],
    *,
    causal: bool,
    lengths: Int[Tensor, "batch"] | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch q_heads rows dim"], Float[Tensor, "batch q_heads rows"]]:
    """Attend to a cache with a mask of its own (APB section 3.6): the query, then one token at a time.

    softmax(scale · q kᵀ) v. Only on the host that owns the new tokens are they among the keys, and only there
    is the mask causal, aligned at the bottom right; every other host's keys all come before them. Differentiable
    with "reference", and for more than 256 rows with "triton" and "hopper", where the kernels of `masked_attention`
    attend.

    Args:
        q: queries, float16, bfloat16 or float32 (float64 with "reference"), dim 16..256.
        k: keys of this host's cache, zero or more; q_heads is a multiple of kv_heads.
        v: values, as k.
        causal: False: every row sees every key. True: of n rows and m keys, row i sees keys 0 .. m − n + i.
        lengths: how many keys of each batch row count, int32, on q's device (less than 0 is 0, more than there are is
            all); None is all of them. What lies behind them is not read, so k and v may be buffers that a cache grows
            into, and with "triton" a CUDA graph may be replayed as it grows. The other backends wait for the device to
            tell them.
        scale: multiplies the scores, > 0; 1/√dim if None.
        backend: "reference", "sdpa", "triton", or "hopper" for more than 256 rows; `choose_backend` says what "auto"
            takes.

    Returns:
        The output in q's dtype, and the LSE of each row, natural log, float32: the parts that
        `apb.merge.merge` joins across hosts. A row that sees no key gives (0, −inf).

    Raises:
        ValueError: if an argument is out of range or the chosen backend does not take it.
        RuntimeError: if the chosen backend cannot run here, or would lose a gradient.
    """
    # Few rows go to the split-KV kernel, which has no backward pass; many to that of `masked_attention`, which has one.
    many = lengths is None and q.shape[-2] > _FEW_ROWS and not (causal and q.shape[-2] > k.shape[-2])
    if backend == "hopper" and not many:
        raise ValueError(
            f"backend 'hopper' takes more than {_FEW_ROWS} rows, no lengths, and causal no more rows than keys; got "
            f"{q.shape[-2]} rows, {k.shape[-2]} keys and {'no lengths' if lengths is None else 'lengths'}: "
            f"use backend='auto'"
        )
    legal = ("reference", "sdpa", "triton", "hopper") if many else ("reference", "sdpa", "triton")
    differentiable = ("reference", "triton", "hopper") if many else ("reference",)
    backend, scale = check_inputs(q, k, v, scale, backend, legal, differentiable=differentiable)
    if lengths is not None and (lengths.dtype, lengths.device, lengths.shape) != (torch.int32, q.device, q.shape[:1]):
        raise ValueError(
            f"lengths must be int32 [batch {q.shape[0]}] on {q.device}, got {lengths.dtype} {list(lengths.shape)} "
            f"on {lengths.device}; convert with lengths.to(q.device, torch.int32)"
        )
    if q.numel() == 0 or k.shape[2] == 0:
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
            return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
        backend, lengths = "reference", None  # nothing to compute, but a graph to keep
    if lengths is not None and backend != "triton":  # one at a time
        each = (
            decode_attention(
                q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n], causal=causal, scale=scale, backend=backend
            )
            for i, n in enumerate(lengths.clamp(min=0).tolist())
        )
        outs, lses = zip(*each, strict=True)
        return torch.cat(outs), torch.cat(lses)
    if backend == "reference":
        from apb.reference import apb_mask, attention

        rows, columns = q.shape[2], k.shape[2]
        mask = apb_mask(rows, columns, 0, 0) if causal else torch.ones(rows, columns, dtype=torch.bool)
        out, lse = attention(q, k, v, mask, scale)
        return out.to(q.dtype), lse.float()
    if backend == "sdpa":
        from apb.attend import sdpa

        return sdpa.decode_attention(q, k, v, causal=causal, scale=scale)
    if backend == "hopper":
        from apb.kernels.hopper import hopper_flash

        return hopper_flash(q, k, v, anchor_tokens=0, passing_tokens=0, scale=scale, causal=causal)
    if many:
        from apb.kernels.masked_flash import masked_flash

        return masked_flash(q, k, v, anchor_tokens=0, passing_tokens=0, scale=scale, causal=causal)
    from apb.kernels.decode import split_kv_decode

    return split_kv_decode(q, k, v, causal=causal, scale=scale, lengths=lengths)
