"""Sums over a tile's rows that stay apart by lane until the end, so that no lane asks the others in every step."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["add_by_lane", "spread_over_lanes"]

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
