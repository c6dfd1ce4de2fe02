"""Planted bugs in the compressor's kernels; what a `Bug` is, and what it is for, stands in `apb.testing.bugs`."""

from apb.testing.bugs import Bug

__all__ = ["COMPRESS_BUGS"]

COMPRESS_BUGS = (
    Bug(
        name="a selecting kernel that admits the ties of every sweep anew",
        file="kernels/select.py",
        old="tied = equal + (upto >> 16)",
        new="tied = upto >> 16",
        tests="tests/test_compress_kernels.py -k 'selects_as_the_reference or fields'",
    ),
    Bug(
        name="a selecting part that knows of earlier parts only what they have of the last digit",
        file="kernels/select.py",
        old="higher + before, equal",
        new="before, equal",
        tests="tests/test_compress_kernels.py -k 'sweeps_and_parts or memory_held'",
    ),
    Bug(
        name="a selecting kernel that reports the NaN of a head's first part alone",
        file="kernels/select.py",
        old="tl.store(nans + row, tl.max(nan, 0) != 0)",
        new="tl.store(nans + row, tl.max(tl.where(tl.arange(0, PARTS) == 0, nan, 0), 0) != 0)",
        tests="tests/test_compress_kernels.py -k memory_held",
    ),
    Bug(
        name="minus zero below zero",
        file="kernels/select.py",
        old="(bits == size) | (size == 0)",
        new="(bits == size)",
        tests="tests/test_compress_kernels.py -k special_values",
    ),
    Bug(
        name="query-aware scores for a KV head of another group's vectors",
        file="kernels/score.py",
        old="row % heads * group * stride_qh",
        new="row % heads * stride_qh",
        tests="tests/test_compress_kernels.py -k query_aware_scores_equal",
    ),
    Bug(
        name="query-aware scores that sum a question's first tile of vectors, and divide by all",
        file="kernels/score.py",
        old="tl.range(0, group * tokens, ROWS)",
        new="tl.range(0, min(ROWS, group * tokens), ROWS)",
        tests="tests/test_compress_kernels.py -k query_aware_scores_equal",
    ),
    Bug(
        name="a retaining head that reads v's columns of the weights for k",
        file="kernels/retaining_head.py",
        old="rows, width, kv_heads, q_heads, all_heads,",
        new="rows, width, kv_heads, q_heads + kv_heads, all_heads,",
        tests="tests/test_compress_kernels.py -k retaining_head_equals",
    ),
    Bug(
        name="NaN scores blamed on another layer",
        file="compress/nan.py",
        old="in zip(notes, ",
        new="in zip(notes[::-1], ",
        tests="tests/test_compress_kernels.py -k watch",
    ),
    Bug(
        name="prepared heads forget which model they were trained for",
        file="compress/retaining_head.py",
        old="return replace(self, fc1=fc1, fc2=fc2)",
        new="return RetainingHead(pool=self.pool, fc1=fc1, fc2=fc2)",
        tests="tests/test_retaining_head.py -k warn",
    ),
)
