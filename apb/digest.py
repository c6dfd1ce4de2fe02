"""Tell whether hosts hold the same tokens by comparing a few digits instead of sending the tokens."""

from hashlib import sha256

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["digest"]


def digest(*tensors: Int[Tensor, "*shape"]) -> str:
    """Return 16 hex digits of the tensors' shapes and integers, whatever their dtypes and devices."""
    found = sha256()
    for x in tensors:
        found.update(repr(tuple(x.shape)).encode())
        found.update(x.to("cpu", torch.int64).contiguous().numpy())
    return found.hexdigest()[:16]
