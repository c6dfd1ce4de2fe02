"""What warps and lanes do by themselves, without asking the others of their warpgroup."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["add_by_lane", "any_above", "narrow", "prepare_votes", "spread_over_lanes"]

# [64, 4]: the four lanes that hold a row of a product with 64 rows, with a number each.
_BY_LANE = gl.constexpr(gl.DistributedLinearLayout(
    reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
    block_bases=[], shape=[64, 4],
))  # fmt: skip
_VOTE = gl.constexpr(  # 0f45800000 is 2¹²; "gtu" is greater or not a number
    "{ .reg .pred p; setp.gtu.f32 p, $2, 0f45800000; setp.gtu.or.f32 p, $3, 0f45800000, p; "
    "vote.sync.any.pred apb_vote, p, 0xffffffff; mov.u32 $0, 0; mov.u32 $1, 0; }"
)


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
def prepare_votes():
    """Name the register that holds a vote's outcome, for all of the kernel; once, before anything votes."""
    gl.inline_asm_elementwise(".reg .pred apb_vote; mov.u32 $0, 0;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def any_above(sums):
    """Say whether one of the warp's numbers in `sums`, by lane, is above 2¹² or NaN: 1 or 0, by warp.

    What depends on it may be done by some warps of a warpgroup and not by others, so it must not wait for other warps
    nor issue a product. A reduction of Gluon's would have one answer for the warpgroup, and wait for all of it; so the
    outcome goes from the vote to the branch by a register that only the assembler knows.
    """
    gl.inline_asm_elementwise(_VOTE, "=r,=r,f,f", [sums], dtype=gl.int32, is_pure=False, pack=2)
    return gl.inline_asm_elementwise("selp.u32 $0, 1, 0, apb_vote;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32,
                                     is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def narrow(x, DTYPE: gl.constexpr):
    """Round float32 to float16 or bfloat16, before the branch that follows: the compiler's own would go behind it."""
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16,
                                         is_pure=True, pack=2)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16,
                                         is_pure=True, pack=2)  # fmt: skip
