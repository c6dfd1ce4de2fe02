"""Choose where to run and in which precision, from what a user has said; say whether Triton's kernels run there."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["DTYPES", "GLUON_INSTALLED", "TRITON_INSTALLED", "pick_device", "pick_dtype", "why_not_triton"]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


TRITON_INSTALLED = find_spec("triton") is not None
"""Triton has no wheels outside Linux."""
GLUON_INSTALLED = _version("triton").startswith("3.6.")
"""Gluon, which the Hopper kernel is written in, is an experimental part of Triton: only the version tested is taken."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """Return a device; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", 0) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda, or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not 0 <= (device.index or 0) < gpus:
        found = f"{gpus} CUDA device{'s' * (gpus > 1)}" if gpus else "no CUDA device"
        raise ValueError(f"device: got {name!r}, but PyTorch sees {found} here; leave device out, or give cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return a precision; "auto" is bfloat16 on a GPU and float32 on the CPU, where bfloat16 is slow.

    Raises:
        ValueError: not one of `DTYPES`.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def why_not_triton(*tensors: Tensor) -> str | None:
    """Say why Triton can neither compile nor interpret kernels for these tensors here, or None if it can."""
    if not TRITON_INSTALLED:
        return "needs Triton, which runs on Linux only"
    if all(x.is_cuda for x in tensors):
        return None
    from triton import knobs

    if not knobs.runtime.interpret:
        return f"needs CUDA tensors, got {', '.join(sorted({str(x.device) for x in tensors}))}"
    bfloat16 = any(x.dtype == torch.bfloat16 for x in tensors)
    return "computes bfloat16 wrongly under TRITON_INTERPRET=1" if bfloat16 else None
