"""The online softmax of one block of scores [64, n], whose peaks are any numbers that keep the weights in range."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_lanes import add_by_lane, narrow, spread_over_lanes

__all__ = ["hide", "raise_peak", "weigh"]


@gluon.jit
def hide(scores, block, limit, LAYOUT: gl.constexpr):
    """Hide what lies beyond the last column that each row sees, `limit`."""
    columns = block * scores.shape[1] + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
    return gl.where(columns[None, :] <= limit[:, None], scores, float("-inf"))


@gluon.jit
def weigh(scores, peak, scale_log2, DTYPE: gl.constexpr, LAYOUT_O: gl.constexpr):
    """Return 2^(score − peak), narrowed for the product with the values, and each row's sum of it by lane."""
    weights = gl.exp2(scores * scale_log2 - peak[:, None])
    p = gl.convert_layout(narrow(weights, DTYPE), gl.DotOperandLayout(0, LAYOUT_O, 2), assert_trivial=True)
    return p, add_by_lane(weights)


@gluon.jit
def raise_peak(scores, acc, peak, total, scale_log2, DTYPE: gl.constexpr, LAYOUT_O: gl.constexpr):
    """Weigh a block once more, with peaks not below its scores, and rescale what came before: (P, …, the block's Σ).

    One warp may come here and another not, so nothing in it may wait for others: layouts change within lanes only.
    """
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    decay = gl.exp2(peak - new_peak)
    p, more = weigh(scores, new_peak, scale_log2, DTYPE, LAYOUT_O)
    acc *= gl.convert_layout(decay, gl.SliceLayout(1, LAYOUT_O), assert_trivial=True)[:, None]
    return p, acc, new_peak, total * spread_over_lanes(decay), more
