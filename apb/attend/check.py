"""The arguments of every attention of this package, checked once and for all backends."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from apb.device import GLUON_INSTALLED, TRITON_INSTALLED

__all__ = ["DIFFERENTIABLE", "Backend", "check_inputs", "choose_backend"]

Backend = Literal["auto", "reference", "sdpa", "flex", "triton", "hopper"]

DIFFERENTIABLE: tuple[Backend, ...] = ("reference", "flex", "triton", "hopper")
"""Backends of `masked_attention` that have a backward pass."""

_DTYPES = {
    "reference": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "sdpa": (torch.float16, torch.bfloat16, torch.float32),
    "flex": (torch.float16, torch.bfloat16, torch.float32),
    "triton": (torch.float16, torch.bfloat16, torch.float32),
    "hopper": (torch.float16, torch.bfloat16),
}

_HOPPER_DIMS = (64, 128)


def choose_backend(
    q: Float[Tensor, "batch q_heads rows dim"], legal: tuple[Backend, ...] = get_args(Backend)
) -> Backend:
    """Name the backend that "auto" takes: hopper where it can, triton on CUDA, sdpa elsewhere, reference in float64.

    `legal` are those that an attention has: sparse attention, and decoding with few rows, have no Hopper kernel. Where
    a gradient is wanted and the backend has none, "auto" takes reference.
    """
    if q.dtype == torch.float64:
        return "reference"
    if not (q.is_cuda and TRITON_INSTALLED):
        return "sdpa"
    return "triton" if "hopper" not in legal or _hopper_refusal(q) else "hopper"


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    backend: Backend,
    legal: tuple[Backend, ...],
    *,
    differentiable: tuple[Backend, ...] = ("reference", "flex"),
) -> tuple[Backend, float]:
    """Raise if the arguments do not fit each other or the backend; return the backend and scale to use.

    `differentiable` are the backends that have a backward pass here; "auto" takes reference, if it is one of them,
    where a gradient is wanted and the backend it would take has none.
    """
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
    chosen = choose_backend(q, legal) if backend == "auto" else backend
    wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if backend == "auto" and wants_gradient and chosen not in differentiable and "reference" in differentiable:
        chosen = "reference"
    if backend == "hopper" and (why := _hopper_refusal(q)):
        raise ValueError(f"backend 'hopper' {why}; use backend='auto'")
    if q.dtype not in _DTYPES[chosen]:
        raise ValueError(f"backend {chosen!r} takes {', '.join(map(str, _DTYPES[chosen]))}; got {q.dtype}")
    if chosen == "sdpa" and q.is_cuda and dim % 8:
        raise ValueError(f"backend 'sdpa' on CUDA needs a head dim divisible by 8, got {dim}; use 'triton'")
    if wants_gradient and (chosen not in differentiable or (chosen == "flex" and not q.is_cuda)):
        others = "or take backend='auto' or 'reference'" if differentiable else "no backend has one here"
        raise RuntimeError(
            f"backend {chosen!r} has no backward pass here: run under torch.no_grad() or inference_mode(), {others}"
        )
    if chosen == "triton":
        _check_triton(q)
    return chosen, dim**-0.5 if scale is None else float(scale)


def _hopper_refusal(q: Tensor) -> str | None:
    """Say why the Hopper kernel cannot take q, or None if it can."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0), got a tensor on {q.device}"
    if not GLUON_INSTALLED:
        return "needs Triton 3.6, whose Gluon it is written in"
    if q.dtype not in _DTYPES["hopper"]:
        return f"takes float16 and bfloat16, got {q.dtype}"
    return None if q.shape[-1] in _HOPPER_DIMS else f"takes head dims 64 and 128, got {q.shape[-1]}"


def _check_triton(q: Tensor) -> None:
    """Raise if Triton cannot compile, or interpret, kernels for q's device and dtype."""
    if not TRITON_INSTALLED:
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
