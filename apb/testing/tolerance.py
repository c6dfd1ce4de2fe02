"""One rule for "close enough", used by every numeric test.

The truth is float64 on the quantised inputs. A row passes if its worst element errs by at most twice what plain
eager PyTorch errs in the same working dtype, plus a rounding band of that dtype scaled by max |V|. One wrong row
fails: nothing is averaged.
"""

import math

import torch
from einops import repeat
from torch import Tensor

from apb.reference import attention

__all__ = ["assert_attention", "assert_lse_close", "assert_rows_close", "eager_attention"]

_UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Run the textbook formula in the inputs' own dtype: the yardstick of what rounding alone costs."""
    group = q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = (repeat(x, "b h m d -> b (h g) m d", g=group) for x in (k, v))
    scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(~mask, -math.inf)
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ v


def assert_rows_close(actual: Tensor, truth: Tensor, *, eager: Tensor, value_scale: float) -> None:
    """Assert, row by row, max |actual − truth| ≤ 2 · max |eager − truth| + band, band = 4 roundoffs · value_scale.

    Args:
        actual: result under test, `... dim`, in its working dtype (which sets the band).
        truth: the same in float64.
        eager: the textbook formula in the working dtype, same shape.
        value_scale: max |V| of the inputs.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    band = 4 * _UNIT_ROUNDOFF[actual.dtype] * value_scale
    error = (actual.double().cpu() - truth.cpu()).abs().amax(dim=-1)
    allowed = 2 * (eager.double().cpu() - truth.cpu()).abs().amax(dim=-1) + band
    bad = ~(error <= allowed)  # NaN is bad
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} rows differ; first at {where}: "
            f"error {float(error[where]):.3e}, allowed {float(allowed[where]):.3e}"
        )


def assert_lse_close(actual: Tensor, truth: Tensor, *, atol: float = 2e-5) -> None:
    """Assert LSEs agree absolutely (natural log, so an absolute error is a relative error of the sum); −inf exactly."""
    assert actual.dtype == torch.float32, f"LSE must be float32, got {actual.dtype}"
    torch.testing.assert_close(actual.double().cpu(), truth.double().cpu(), atol=atol, rtol=2e-6)


def assert_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    lse_atol: float = 2e-5,
) -> None:
    """Assert that an attention's output and LSE are the oracle's, row by row; the arguments are `attention`'s."""
    truth, truth_lse = attention(q, k, v, mask, scale)
    assert out.dtype == q.dtype and out.shape == q.shape and lse.shape == q.shape[:-1]
    if out.numel() == 0:
        return
    mask = mask.to(q.device)
    eager = eager_attention(q, k, v, mask, scale) if k.shape[2] else torch.zeros_like(q)
    value_scale = float(v.abs().max()) if v.numel() else 1.0
    if q.dtype == torch.float32 and k.numel():
        # A score s is rounded too, by 2⁻²⁴ · |s|; in half precision it is float32's and too small to see.
        size = q.shape[-1] ** -0.5 if scale is None else scale
        value_scale *= 1 + size * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    assert_rows_close(out, truth, eager=eager, value_scale=value_scale)
    assert_lse_close(lse, truth_lse, atol=lse_atol)
