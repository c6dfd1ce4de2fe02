"""Planted bugs of the Hopper kernel; see `apb.testing.bugs`."""

from apb.testing.bugs import Bug

__all__ = ["HOPPER_BUGS"]

HOPPER_BUGS = (
    Bug(
        name="the Hopper kernel hides the diagonal",
        file="kernels/hopper_kernel.py",
        old="columns[None, :] <= limit[:, None]",
        new="columns[None, :] < limit[:, None]",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel masks nothing in the block before the diagonal",
        file="kernels/hopper_kernel.py",
        old="full = (first + shift + 1) // self.BLOCK_N",
        new="full = (first + shift + self.BLOCK_N) // self.BLOCK_N",
        tests="tests/test_hopper_kernel.py -k any_lengths",
    ),
    Bug(
        name="the Hopper kernel reads sums that the tensor cores still add to",
        file="kernels/hopper_kernel.py",
        old="acc = warpgroup_mma_wait(0, deps=(acc,))\n    work.v.release",
        new="acc = warpgroup_mma_wait(1, deps=(acc,))\n    work.v.release",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel does not rescale what it has summed",
        file="kernels/hopper_kernel.py",
        old="return acc * gl.convert_layout(decay, gl.SliceLayout(1, LAYOUT_O))[:, None], weights",
        new="return acc, weights",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel's anchor tiles write over the block's first rows",
        file="kernels/hopper_kernel.py",
        old="end = gl.where(in_anchor, self.anchor_rows, self.rows)",
        new="end = gl.where(in_anchor, self.rows, self.rows)",
        tests="tests/test_hopper_kernel.py -k any_lengths",
    ),
)
