"""Join partial attention: the algebra that lets hosts, splits and passes work on disjoint keys.

Each part holds attention over its own keys and the log-sum-exp (LSE) of its scores. Merging is associative
and commutative, with (0, −inf) as its identity, so any partition of the keys merges to the whole (APB
section 3.6).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from apb.device import TRITON_INSTALLED, why_not_triton

__all__ = ["MergeBackend", "merge", "merge_into", "merge_pair"]

MergeBackend = Literal["auto", "torch", "triton"]


def merge(
    outs: Float[Tensor, "parts batch heads rows dim"],
    lses: Float[Tensor, "parts batch heads rows"],
    *,
    backend: MergeBackend = "auto",
) -> tuple[Float[Tensor, "batch heads rows dim"], Float[Tensor, "batch heads rows"]]:
    """Merge stacked partial outputs of attention over disjoint keys into the output over all of them.

    l = log Σᵢ exp(lᵢ), o = Σᵢ oᵢ · exp(lᵢ − l), in float32. A part with lᵢ = −inf counts for nothing,
    whatever its output holds; where every part is empty the result is (0, −inf).

    Args:
        outs: partial outputs, one or more parts.
        lses: their LSEs, natural log, float32.
        backend: "torch" runs anywhere and is differentiable, "triton" reads every part once; "auto" takes triton on
            CUDA, but torch where an input wants a gradient.

    Returns:
        The merged output in the dtype of `outs`, and the merged LSE in float32.

    Raises:
        ValueError: if the shapes do not belong together, there is no part, or the backend cannot run here.
        RuntimeError: if backend "triton" would lose a gradient.
    """
    if outs.ndim != 5 or outs.shape[:-1] != lses.shape or outs.shape[0] == 0:
        raise ValueError(
            f"outs must be [parts ≥ 1, batch, heads, rows, dim] and lses the same without dim; "
            f"got {list(outs.shape)} and {list(lses.shape)}. Use torch.stack to build them."
        )
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be auto, torch or triton, got {backend!r}")
    if backend == "triton" and (why := why_not_triton(outs, lses)):
        raise ValueError(f"backend 'triton' {why}; use backend='torch'")
    wants_gradient = torch.is_grad_enabled() and (outs.requires_grad or lses.requires_grad)
    if backend == "triton" and wants_gradient:
        raise RuntimeError(
            "backend 'triton' has no backward pass: run under torch.no_grad() or torch.inference_mode(), "
            "or use backend='torch'"
        )
    if backend == "triton" or (backend == "auto" and outs.is_cuda and TRITON_INSTALLED and not wants_gradient):
        from apb.kernels.merge import merge_partials

        return merge_partials(outs, lses)
    lses = lses.to(torch.promote_types(outs.dtype, torch.float32))
    empty = torch.isneginf(lses).all(dim=0)
    lses = lses.masked_fill(empty, 0.0)  # the softmax of −inf alone would be NaN, and so would its gradient
    weights = torch.softmax(lses, dim=0).masked_fill(empty, 0.0)  # exp(lᵢ − l), summing to 1
    counted = outs.masked_fill((weights == 0)[..., None], 0.0)  # before the product, whose gradient reads it
    out = (counted * weights[..., None]).sum(dim=0)
    return out.to(outs.dtype), torch.logsumexp(lses, dim=0).masked_fill(empty, -torch.inf).float()


def merge_pair(
    out1: Float[Tensor, "batch heads rows dim"],
    lse1: Float[Tensor, "batch heads rows"],
    out2: Float[Tensor, "batch heads rows dim"],
    lse2: Float[Tensor, "batch heads rows"],
) -> tuple[Float[Tensor, "batch heads rows dim"], Float[Tensor, "batch heads rows"]]:
    """Merge two partial outputs: l = logaddexp(l₁, l₂), o = o₁ · exp(l₁ − l) + o₂ · exp(l₂ − l).

    Args:
        out1: first partial output.
        lse1: its LSE, natural log, float32.
        out2: second partial output, over other keys, in any dtype.
        lse2: its LSE.

    Returns:
        The merged output in the dtype of `out1`, and the merged LSE in float32.

    Raises:
        ValueError: as `merge`.
    """
    if out1.shape != out2.shape or lse1.shape != lse2.shape:
        raise ValueError(
            f"out1, out2 and lse1, lse2 must agree in shape; got {list(out1.shape)}, {list(out2.shape)} "
            f"and {list(lse1.shape)}, {list(lse2.shape)}"
        )
    return merge(torch.stack((out1, out2.to(out1.dtype))), torch.stack((lse1, lse2)))


def merge_into(
    out: Float[Tensor, "batch heads rows dim"],
    lse: Float[Tensor, "batch heads rows"],
    part: Float[Tensor, "batch heads rows dim"],
    part_lse: Float[Tensor, "batch heads rows"],
) -> None:
    """Merge a part into `out` and `lse` as `merge_pair` does, in place; no gradient. On CUDA each is read once.

    Args:
        out: a partial output, float32 (or float64 on a CPU), of any strides.
        lse: its LSE, natural log, float32.
        part: another one, over other keys, in any dtype.
        part_lse: its LSE.

    Raises:
        ValueError: as `merge`.
    """
    if out.is_cuda and TRITON_INSTALLED and out.dtype == torch.float32 and out.shape == part.shape:
        from apb.kernels.merge import merge_into_rows

        merge_into_rows(out, lse, part, part_lse)
    else:
        merged, merged_lse = merge_pair(out, lse, part, part_lse)
        out.copy_(merged)
        lse.copy_(merged_lse)
