"""The Hopper kernel's logic on a CPU: its own source, and threads that act out the GPU's barriers, copies and warps."""

import math

import pytest
import torch
from attention_cases import assert_attention, draw_inputs
from gluon_interpreter import Box, Pointer, interpreted
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apb.attend import check
from apb.reference import apb_mask


def run(q, k, v, anchor, passing, *, causal=True, stages=2, programs=2):
    """Launch as `apb.kernels.hopper.launch` does."""
    batch, q_heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    anchor_rows = max(0, rows - (columns - anchor - passing)) if causal else 0
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full(q.shape[:3], torch.nan)
    row_tiles = -(-anchor_rows // 128) + -(-(rows - anchor_rows) // 128)
    lengths = (rows, columns, anchor, anchor_rows, kv_heads, q_heads // kv_heads, batch * q_heads * row_tiles)
    scalars = [torch.tensor(n, dtype=torch.int64) for n in lengths]
    counter = Pointer(torch.zeros(1, dtype=torch.int64))
    with interpreted() as (module, machine):
        boxes = [Box(x, [1, 1, n, dim]) for x, n in ((q, 64), (k, 128), (v, 128), (out, 64))]
        args = (*boxes[:3], Pointer(out), boxes[3], Pointer(lse), counter, dim**-0.5 * math.log2(math.e), *scalars,
                *out.stride()[:3], causal, dim, stages)  # fmt: skip
        machine.run([(module.hopper_flash_kernel, args, None) for _ in range(programs)])
    return out, lse


@settings(max_examples=12, deadline=None)
@given(
    anchor=st.integers(0, 200), passing=st.integers(0, 150), block=st.integers(1, 300), left_out=st.integers(0, 400),
    seed=st.integers(0, 2**31), stages=st.sampled_from([2, 3]),
)  # fmt: skip
@example(anchor=70, passing=30, block=100, left_out=0, seed=0, stages=2)
def test_any_lengths(anchor, passing, block, left_out, seed, stages):
    rows, columns = max(1, anchor + block - left_out), anchor + passing + block
    q, k, v = draw_inputs(seed, (1, 1, 2), rows, columns, 16, torch.float16)
    out, lse = run(q, k, v, anchor, passing, stages=stages)
    assert_attention(out, lse, q, k, v, apb_mask(rows, columns, anchor, passing))


@pytest.mark.parametrize("lengths", [(0, 0, 128), (128, 128, 128), (64, 0, 0), (0, 64, 1), (128, 64, 192)])
def test_lengths_that_fit_the_tiles(lengths):
    anchor, passing, block = lengths
    q, k, v = draw_inputs(0, (2, 2, 2), anchor + block, sum(lengths), 16, torch.bfloat16)
    out, lse = run(q, k, v, anchor, passing)
    assert_attention(out, lse, q, k, v, apb_mask(anchor + block, sum(lengths), anchor, passing))


@pytest.mark.parametrize("sizes", [(1, 1), (130, 77), (64, 128), (200, 129)])
def test_every_row_sees_every_key(sizes):
    q, k, v = draw_inputs(1, (1, 2, 1), *sizes, 16, torch.float16, "nan_around")
    out, lse = run(q, k, v, 0, 0, causal=False)
    assert_attention(out, lse, q, k, v, torch.ones(sizes, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_that_grow(dtype):
    """Beyond the range of float32, in some rows: their peaks must follow."""
    q, k, v = draw_inputs(2, (1, 1, 1), 150, 400, 16, dtype)
    k, q = k * torch.linspace(0.1, 20, 400, dtype=dtype)[:, None], q * (torch.arange(150) % 64 < 20)[:, None]
    out, lse = run(q, k, v, 30, 250)
    assert_attention(out, lse, q, k, v, apb_mask(150, 400, 30, 250))


def test_auto_knows_the_kernels_head_dims():
    """`check` says them once more, since torch.compile traces it and not the kernel's import."""
    assert pytest.importorskip("apb.kernels.hopper").DIMS == check._HOPPER_DIMS
