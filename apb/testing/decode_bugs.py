"""Planted bugs in decoding, its merge and the benchmarks' pictures; what a `Bug` is stands in `apb.testing.bugs`."""

from apb.testing.bugs import Bug

__all__ = ["DECODE_BUGS"]

DECODE_BUGS = (
    Bug(
        name="lengths that all batch rows have from the first",
        file="kernels/decode.py",
        old="tl.load(lengths + batch * stride_length)",
        new="tl.load(lengths)",
        tests="tests/test_decode_attention.py -k 'on_the_device and triton'",
    ),
    Bug(
        name="a merge of splits that counts those that were never computed",
        file="kernels/decode.py",
        old="merge_parts(partials, lses, live, ROWS",
        new="merge_parts(partials, lses, splits, ROWS",
        tests="tests/test_decode_attention.py -k held_before",
    ),
    Bug(
        name="a part whose LSE is −inf multiplied by 0, NaN or not",
        file="kernels/merge.py",
        old="tl.where((weight > 0)[:, None], weight[:, None] * out, 0.0)",
        new="weight[:, None] * out",
        tests="tests/test_merge.py -k 'nan and triton'",
    ),
    Bug(
        name="a picture of the ledger's first run",
        file="bench/plots.py",
        old="run(row) == run(found[-1])",
        new="run(row) == run(found[0])",
        tests="tests/test_bench.py -k newest",
    ),
)
