"""What the online softmax can do without asking other lanes, or without doing it at all, in nearly every step."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["add_by_lane", "raise_peak", "rescale", "spread_over_lanes"]

_SLACK = gl.constexpr(8.0)  # weights grow to 2⁸ before a peak follows: little in float32, and even in float16

# [64, 4]: the four lanes that hold a row of a product with 64 rows, with a number each.
_BY_LANE = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
    block_bases=[], shape=[64, 4],
))  # fmt: skip


@gluon.jit
def add_by_lane(x):
    """Sum each row of x [64, n] over the columns that a lane holds: [64, 4]."""
    sums = gl.sum(gl.sum(x.reshape([64, x.shape[1] // 8, 4, 2]), 1), 2)
    return gl.convert_layout(sums, _BY_LANE, assert_trivial=True)


@gluon.jit
def spread_over_lanes(by_row):
    """Return a number of each row to each of its lanes: [64, 1]."""
    return gl.convert_layout(by_row, gl.SliceLayout(1, _BY_LANE), assert_trivial=True)[:, None]


@gluon.jit
def raise_peak(peak, block_peak):
    """Return `peak`, a row's bound in powers of two, or the block's where that is higher by more than the slack.

    Any bound gives the same softmax. One that stays spares the row the rescaling of what it has summed up.
    """
    return gl.where(block_peak > peak + _SLACK, block_peak, peak)


@gluon.constexpr_function
def _multiply(n):
    """Write: multiply $0 … by $2n …, n each, unless the factors of the warp's rows, of which a lane has two, are 1."""
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * n + i}; " for i in range(n))
    return (
        f"{{ .reg .pred p; setp.neu.f32 p, ${2 * n}, 0f3F800000; setp.neu.or.f32 p, ${2 * n + 2}, 0f3F800000, p; "
        f"vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE; {products}DONE: }}"
    )


@gluon.constexpr_function
def _operands(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)  # the results are where the first n were


@gluon.jit
def rescale(acc, decay):
    """Return acc [64, n] · decay [64, 1], which a warp leaves out if none of its rows decays."""
    each: gl.constexpr = acc.shape[1] // 2  # numbers that a lane holds: rows r and r + 8, two and two in turns
    asm: gl.constexpr = _multiply(each)
    operands: gl.constexpr = _operands(each)
    decay, acc = gl.broadcast(decay, acc)
    return gl.inline_asm_elementwise(asm, operands, [acc, decay], dtype=gl.float32, is_pure=True, pack=each)
