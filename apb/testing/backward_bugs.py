"""Planted bugs in the backward pass; what a `Bug` is, and what it is for, stands in `apb.testing.bugs`."""

from apb.testing.bugs import Bug

__all__ = ["BACKWARD_BUGS"]

BACKWARD_BUGS = (
    Bug(
        name="a gradient that the LSE loses",
        file="kernels/masked_flash_backward.py",
        old="tl.sum(values * grads, 1) - through_lse",
        new="tl.sum(values * grads, 1) + 0 * through_lse",
        tests="tests/test_backward.py -k merge_of_two_parts",
    ),
    Bug(
        name="keys whose gradient comes from the first query head of their group only",
        file="kernels/masked_flash_backward_kernels.py",
        old="head + member, start, rows, stride_qn",
        new="head, start, rows, stride_qn",
        tests="tests/test_backward.py -k 'gradients_equal'",
    ),
    Bug(
        name="the block's first rows take no part in the gradient of the passing keys",
        file="kernels/masked_flash_backward_kernels.py",
        old="tl.maximum(column - shift, anchor_rows)",
        new="tl.maximum(column - anchor_tokens, anchor_rows)",
        tests="tests/test_backward.py -k 'gradients_equal'",
    ),
    Bug(
        name="passed keys whose gradient does not come home",
        file="parallel/gradient.py",
        old="wait()).sum(dim=0)",
        new="wait())[ctx.host.rank]",
        tests="tests/test_backward_hosts.py -k those_by_hand",
    ),
)
