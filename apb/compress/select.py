"""Pick the best tokens: deterministic, sorted by position, nested as the budget grows."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apb.compress.backend import CompressBackend, choose_backend
from apb.compress.pool import MaxPool, MeanPool, Pool, no_pool

__all__ = ["gather", "pool_and_select", "select"]

_FUSED_KERNEL = 5  # the kernel loads every neighbour of a token: wider pools would spill registers
_MOST_TOKENS = 2**21 - 1  # as far as it is tested


def select(scores: Float[Tensor, "*heads tokens"], keep: int) -> Int[Tensor, "*heads kept"]:
    """Return the positions of the `keep` highest scores, ascending; equal scores go to the lowest position.

    A stable sort is a total order, so the selection of a smaller budget is part of a larger one's (top-k promises
    neither).

    Args:
        scores: any leading dimensions; NaN counts as the highest.
        keep: 0 ≤ keep ≤ tokens.

    Raises:
        ValueError: `keep` out of range.
    """
    _check_keep(scores, keep)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def pool_and_select(
    scores: Float[Tensor, "batch heads tokens"], keep: int, pool: Pool, *, backend: CompressBackend = "auto"
) -> tuple[Int[Tensor, "batch heads kept"], Bool[Tensor, "batch heads"]]:
    """Return `select(pool(scores), keep)`, computed in float32, and which heads' scores held NaN.

    Given the same scores, every backend selects the same tokens, to the last one.

    Args:
        scores: of any float dtype.
        keep: 0 ≤ keep ≤ tokens.
        pool: any; "triton" computes `MaxPool` and `MeanPool` of up to 5 tokens itself, and lets others run before.
        backend: "torch" runs anywhere; "triton" pools and selects in kernels, of up to 2²¹ − 1 tokens; "auto"
            takes it on CUDA, as far as it goes.

    Raises:
        ValueError: `keep` out of range, or a backend that cannot run here.
    """
    if scores.ndim != 3 or not scores.is_floating_point():
        raise ValueError(f"scores: expected floats [batch, heads, tokens], got {scores.dtype} {list(scores.shape)}")
    _check_keep(scores, keep)
    if scores.numel() == 0:
        return scores.new_zeros((*scores.shape[:2], keep), dtype=torch.int64), scores.isnan().any(dim=-1)
    chosen = choose_backend(backend, scores)
    if chosen == "triton" and scores.shape[-1] > _MOST_TOKENS:
        if backend == "triton":
            raise ValueError(
                f"backend 'triton' takes up to {_MOST_TOKENS} tokens, got {scores.shape[-1]}; use backend='torch'"
            )
        chosen = "torch"
    if chosen == "torch" or keep == 0:
        return select(pool(scores.float()), keep), scores.isnan().any(dim=-1)
    from apb.kernels.select import select_kept

    if pool is no_pool:
        return select_kept(scores, keep, 1, False)
    if isinstance(pool, MaxPool | MeanPool) and pool.kernel <= _FUSED_KERNEL:
        return select_kept(scores, keep, pool.kernel, isinstance(pool, MeanPool))
    return select_kept(pool(scores.float()), keep, 1, False)[0], scores.isnan().any(dim=-1)


def gather(
    k: Float[Tensor, "batch heads tokens dim"],
    v: Float[Tensor, "batch heads tokens dim_v"],
    indices: Int[Tensor, "batch heads kept"],
    *,
    backend: CompressBackend = "auto",
) -> Float[Tensor, "batch heads kept both_dims"]:
    """Return the keys and values at `indices` side by side, as they are sent: [k, v] along the last dimension.

    Args:
        k, v: of the same dtype.
        indices: positions among the tokens, int64; nobody looks whether they are in range.
        backend: "torch" runs anywhere; "triton" copies both in one launch; "auto" takes it on CUDA.

    Raises:
        ValueError: arguments that do not belong together, or a backend that cannot run here.
    """
    if k.dtype != v.dtype:
        raise ValueError(f"k, v: expected one dtype, got {k.dtype} and {v.dtype}; convert with v.to(k)")
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k, v: expected [batch, heads, tokens, dim] of as many tokens, got {list(k.shape)} and {list(v.shape)}"
        )
    if indices.dtype != torch.int64 or indices.ndim != 3 or indices.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"indices: expected int64 [batch {k.shape[0]}, heads {k.shape[1]}, kept], got {indices.dtype} "
            f"{list(indices.shape)}; take those that select returns"
        )
    if choose_backend(backend, k, v) == "triton":
        from apb.kernels.select import gather_kept

        return gather_kept(k, v, indices.contiguous())
    return torch.cat([x.gather(2, indices[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v)], dim=-1)


def _check_keep(scores: Tensor, keep: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or not 0 <= keep <= scores.shape[-1]:
        raise ValueError(f"keep: expected 0 to {scores.shape[-1]}, the number of scores, got {keep}")
