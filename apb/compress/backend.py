"""Who computes a step of the compression. The name of a step fixes what it means; this fixes only who does it."""

from typing import Literal

import torch
from torch import Tensor

from apb.device import why_not_triton

__all__ = ["CompressBackend", "choose_backend"]

CompressBackend = Literal["auto", "torch", "triton"]


def choose_backend(backend: CompressBackend, *tensors: Tensor) -> Literal["torch", "triton"]:
    """Check that a backend can compute with these tensors; "auto" is triton on CUDA where it can, else torch.

    Raises:
        ValueError: no such backend, or it cannot compute with these tensors here.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be auto, torch or triton, got {backend!r}")
    if backend == "torch" or (backend == "auto" and not all(x.is_cuda for x in tensors)):
        return "torch"
    reason = _why_not_triton(tensors)
    if backend == "triton" and reason:
        raise ValueError(f"backend 'triton' {reason}; use backend='torch'")
    return "torch" if reason else "triton"


def _why_not_triton(tensors: tuple[Tensor, ...]) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "has no backward pass, and an input requires a gradient"
    dtypes = {x.dtype for x in tensors}
    if not dtypes <= {torch.float16, torch.bfloat16, torch.float32}:
        return f"takes float16, bfloat16 and float32, got {', '.join(map(str, dtypes))}"
    return why_not_triton(*tensors)
