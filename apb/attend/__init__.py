"""Attention of one host, with its log-sum-exp: over [anchor, passing, block], and over a cache when decoding.

The name of a function fixes the mathematics; `backend` fixes only who computes it. Every backend agrees with
`apb.reference` and none falls back to another. Arguments are checked here, once.
"""

import math
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Backend", "choose_backend", "decode_attention", "masked_attention"]

Backend = Literal["auto", "reference", "sdpa", "flex", "triton"]

_TRITON_INSTALLED = find_spec("triton") is not None  # it has no wheels outside Linux
_DTYPES = {
    "reference": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "sdpa": (torch.float16, torch.bfloat16, torch.float32),
    "flex": (torch.float16, torch.bfloat16, torch.float32),
    "triton": (torch.float16, torch.bfloat16, torch.float32),
}


def choose_backend(q: Float[Tensor, "batch q_heads rows dim"]) -> Backend:
    """Name the backend that "auto" takes: triton on CUDA, sdpa elsewhere, reference in float64."""
    if q.dtype == torch.float64:
        return "reference"
    return "triton" if q.is_cuda and _TRITON_INSTALLED else "sdpa"


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
    attention. Inference only, but for "reference", and "flex" on CUDA.

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
    backend, scale = _check(q, k, v, scale, backend, ("reference", "sdpa", "flex", "triton"))
    for name, count in (("anchor_tokens", anchor_tokens), ("passing_tokens", passing_tokens)):
        if count < 0:
            raise ValueError(f"{name} must be ≥ 0, got {count}")
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
    if q.numel() == 0:  # no row: nothing to compute (a row always sees at least itself)
        return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
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
    from apb.kernels.masked_flash import masked_flash

    return masked_flash(q, k, v, **lengths, scale=scale)


def decode_attention(
    q: Float[Tensor, "batch q_heads rows dim"],
    k: Float[Tensor, "batch kv_heads columns dim"],
    v: Float[Tensor, "batch kv_heads columns dim"],
    *,
    causal: bool,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch q_heads rows dim"], Float[Tensor, "batch q_heads rows"]]:
    """Attend from a few query rows to a long cache (APB section 3.6): the query, then one token at a time.

    softmax(scale · q kᵀ) v. Only on the host that owns the new tokens are they among the keys, and only there
    is the mask causal, aligned at the bottom right; every other host's keys all come before them. Inference
    only, but for the "reference" backend.

    Args:
        q: queries, float16, bfloat16 or float32 (float64 with "reference"), dim 16..256.
        k: keys of this host's cache, zero or more; q_heads is a multiple of kv_heads.
        v: values, as k.
        causal: False: every row sees every key. True: of n rows and m keys, row i sees keys 0 .. m − n + i.
        scale: multiplies the scores, > 0; 1/√dim if None.
        backend: "reference", "sdpa" or "triton"; `choose_backend` says what "auto" takes.

    Returns:
        The output in q's dtype, and the LSE of each row, natural log, float32: the parts that
        `apb.merge.merge` joins across hosts. A row that sees no key gives (0, −inf).

    Raises:
        ValueError: if an argument is out of range or the chosen backend does not take it.
        RuntimeError: if the chosen backend cannot run here, or would lose a gradient.
    """
    backend, scale = _check(q, k, v, scale, backend, ("reference", "sdpa", "triton"))
    if q.numel() == 0 or k.shape[2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf, dtype=torch.float32)
    if backend == "reference":
        from apb.reference import apb_mask, attention

        rows, columns = q.shape[2], k.shape[2]
        mask = apb_mask(rows, columns, 0, 0) if causal else torch.ones(rows, columns, dtype=torch.bool)
        out, lse = attention(q, k, v, mask, scale)
        return out.to(q.dtype), lse.float()
    if backend == "sdpa":
        from apb.attend import sdpa

        return sdpa.decode_attention(q, k, v, causal=causal, scale=scale)
    from apb.kernels.decode import split_kv_decode

    return split_kv_decode(q, k, v, causal=causal, scale=scale)


def _check(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: Backend, legal: tuple[Backend, ...]
) -> tuple[Backend, float]:
    """Raise if the arguments do not fit each other or the backend; return the backend and scale to use."""
    if backend != "auto" and backend not in legal:
        raise ValueError(f"backend must be one of auto, {', '.join(legal)}; got {backend!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, dim], got shape {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device; q is {q.dtype} on {q.device}, {name} is {x.dtype} "
                f"on {x.device}. Convert with {name}.to(q)"
            )
    (batch, q_heads, _, dim), kv_heads = q.shape, k.shape[1]
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k and v must be [batch {batch}, kv_heads, columns, dim {dim}] like q {list(q.shape)}; "
            f"got k {list(k.shape)}, v {list(v.shape)}"
        )
    if q_heads == 0 or kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q's {q_heads} heads must be a multiple of the {kv_heads} heads of k and v")
    if scale is not None and not (0 < scale < math.inf):
        raise ValueError(f"scale must be a positive number, got {scale}; leave it out for 1/√dim")
    if not 16 <= dim <= 256:
        raise ValueError(f"the head dim must be 16..256, got {dim} (q {list(q.shape)})")
    chosen = choose_backend(q) if backend == "auto" else backend
    if q.dtype not in _DTYPES[chosen]:
        raise ValueError(f"backend {chosen!r} takes {', '.join(map(str, _DTYPES[chosen]))}; got {q.dtype}")
    if chosen == "sdpa" and q.is_cuda and dim % 8:
        raise ValueError(f"backend 'sdpa' on CUDA needs a head dim divisible by 8, got {dim}; use 'triton'")
    if (
        chosen in ("sdpa", "triton")
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
    ):
        raise RuntimeError(
            f"backend {chosen!r} has no backward pass: run under torch.no_grad() or torch.inference_mode(), "
            f"or take backend='reference', which is differentiable"
        )
    if chosen == "triton":
        _check_triton(q)
    return chosen, dim**-0.5 if scale is None else float(scale)


def _check_triton(q: Tensor) -> None:
    """Raise if Triton cannot compile, or interpret, kernels for q's device and dtype."""
    if not _TRITON_INSTALLED:
        raise RuntimeError("backend 'triton' needs Triton, which runs on Linux only; use backend='sdpa'")
    if q.is_cuda:
        return
    from triton import knobs

    if not knobs.runtime.interpret:
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors, got {q.device}; use backend='sdpa', or set TRITON_INTERPRET=1 "
            f"before Python starts to interpret the kernel, slowly"
        )
    if q.dtype == torch.bfloat16:
        raise ValueError(
            "Triton's interpreter computes bfloat16 wrongly: with TRITON_INTERPRET=1 use float16 or float32"
        )
