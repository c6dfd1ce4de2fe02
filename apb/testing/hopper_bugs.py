"""Planted bugs of the Hopper kernel; see `apb.testing.bugs`."""

from apb.testing.bugs import Bug

__all__ = ["HOPPER_BUGS"]

HOPPER_BUGS = (
    Bug(
        name="the Hopper kernel hides the diagonal",
        file="kernels/hopper_softmax.py",
        old="return gl.where(columns[None, :] <= limit",
        new="return gl.where(columns[None, :] < limit",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel masks nothing in the block before the diagonal",
        file="kernels/hopper_kernel.py",
        old="full = (first + shift + 1) // BLOCK_N",
        new="full = (first + shift + BLOCK_N) // BLOCK_N",
        tests="tests/test_hopper_kernel.py -k any_lengths",
    ),
    Bug(
        name="the Hopper kernel reads sums that the tensor cores still add to",
        file="kernels/hopper_kernel.py",
        old="acc = warpgroup_mma_wait(0, deps=(acc,))\n    if MASKED",
        new="acc = warpgroup_mma_wait(1, deps=(acc,))\n    if MASKED",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel does not rescale what it has summed",
        file="kernels/hopper_softmax.py",
        old="    acc *= gl.convert_layout(decay, gl.SliceLayout(1, LAYOUT_O), assert_trivial=True)[:, None]\n",
        new="",
        tests="tests/test_hopper_kernel.py -k grow",
    ),
    Bug(
        name="the Hopper kernel keeps the first block's peak",
        file="kernels/hopper_kernel.py",
        old="    if any_above(more) != 0:",
        new="    if any_above(more) < 0:",
        tests="tests/test_hopper_kernel.py -k grow",
    ),
    Bug(
        name="the Hopper kernel's anchor tiles write over the block's first rows",
        file="kernels/hopper_kernel.py",
        old="end = gl.where(in_anchor, self.anchor_rows, self.rows)",
        new="end = gl.where(in_anchor, self.rows, self.rows)",
        tests="tests/test_hopper_kernel.py -k any_lengths",
    ),
    Bug(
        name="the Hopper kernel's rows leave through keys that another consumer still scores",
        file="kernels/hopper_kernel.py",
        old="    mbarrier.wait(work.scored.index(drawn % 2), drawn // 2 & 1)\n",
        new="",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel gives the rows' buffer back before they have left",
        file="kernels/hopper_kernel.py",
        old="        tma.store_wait(0)\n",
        new="",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel fetches a tile's last values from its first block",
        file="kernels/hopper_kernel.py",
        old="batch, kv_head, (blocks - 1) * BLOCK_N\n",
        new="batch, kv_head, 0\n",
        tests="tests/test_hopper_kernel.py -k any_lengths",
    ),
    Bug(
        name="the Hopper kernel fills a pair that is still in use",
        file="kernels/hopper_pairs.py",
        old="if n >= self.slots:",
        new="if n > self.slots:",
        tests="tests/test_hopper_kernel.py -k any_lengths",
    ),
    Bug(
        name="the Hopper kernel ends with arrivals that nobody came for",
        file="kernels/hopper_kernel.py",
        old="        work.pairs.drain(filled)\n",
        new="",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
    Bug(
        name="the Hopper kernel's block 0 is never masked",
        file="kernels/hopper_kernel.py",
        old="if full == 0:",
        new="if full < 0:",
        tests="tests/test_hopper_kernel.py -k fit_the_tiles",
    ),
)
