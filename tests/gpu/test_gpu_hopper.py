"""The Hopper kernel on a Hopper GPU: every dtype, head dim and ragged length against float64, at the edge of memory."""

import pytest
import torch
from attention_cases import assert_attention, draw_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.attend import masked_attention
from apb.kernels import hopper
from apb.reference import apb_mask

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")]
HALF = (torch.float16, torch.bfloat16)
SHAPES = [
    (0, 0, 1), (0, 0, 127), (0, 0, 128), (0, 0, 129), (129, 0, 0), (33, 70, 1), (128, 128, 256), (200, 333, 517),
    (1, 0, 1000), (0, 129, 300), (64, 0, 64), (127, 1, 129), (512, 1024, 2048),
]  # fmt: skip


def attend(q, k, v, anchor, passing):
    out, lse = masked_attention(q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend="hopper")
    assert_attention(out, lse, q, k, v, apb_mask(q.shape[2], k.shape[2], anchor, passing), lse_atol=1e-4)


@pytest.mark.parametrize("dim", hopper.DIMS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("heads", [(2, 2, 2), (1, 1, 1), (1, 3, 3)])
def test_dtypes_dims_and_ragged_lengths(dtype, dim, heads):
    for seed, (anchor, passing, block) in enumerate(SHAPES):
        q, k, v = draw_inputs(seed, heads, anchor + block, anchor + passing + block, dim, dtype, device="cuda")
        attend(q, k, v, anchor, passing)


@settings(max_examples=60, deadline=None)
@given(
    anchor=st.integers(0, 400), passing=st.integers(0, 400), block=st.integers(1, 700), left_out=st.integers(0, 900),
    dim=st.sampled_from(hopper.DIMS), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_lengths(anchor, passing, block, left_out, dim, seed):
    rows = max(1, anchor + block - left_out)
    q, k, v = draw_inputs(seed, (1, 1, 4), rows, anchor + passing + block, dim, torch.bfloat16, device="cuda")
    attend(q, k, v, anchor, passing)


@pytest.mark.parametrize("layout", ["tokens_first", "step_2", "nan_around"])
@pytest.mark.parametrize("dtype", HALF)
def test_layouts_and_left_out_anchor_rows(dtype, layout):
    for rows in (1, 517, 600, 717):
        q, k, v = draw_inputs(rows, (2, 2, 3), rows, 1050, 128, dtype, layout, device="cuda")
        attend(q, k, v, 200, 333)


@pytest.mark.parametrize("dim", hopper.DIMS)
def test_every_row_sees_every_key(dim):
    for seed, (rows, columns) in enumerate([(1, 1), (300, 77), (513, 1000), (128, 128), (1000, 129)]):
        q, k, v = draw_inputs(seed, (2, 2, 2), rows, columns, dim, torch.bfloat16, device="cuda")
        lengths = {"anchor_tokens": 0, "passing_tokens": 0}
        out, lse = hopper.hopper_flash(q, k, v, **lengths, scale=dim**-0.5, causal=False)
        assert_attention(out, lse, q, k, v, torch.ones(rows, columns, dtype=torch.bool), lse_atol=1e-4)


@pytest.mark.parametrize("dim", hopper.DIMS)
@pytest.mark.parametrize("dtype", HALF)
def test_scores_that_grow(dtype, dim):
    """Peaks must follow, in some warps of a warpgroup and not in others, and in some rows of a warp."""
    q, k, v = draw_inputs(3, (1, 2, 2), 900, 2000, dim, dtype, device="cuda")
    row, column = (torch.arange(n, device="cuda")[:, None] for n in (900, 2000))
    for some in (row >= 0, row % 64 < 16, row % 16 == 3, row % 16 == 11, row == 517):
        attend((q * some).to(dtype), (k * (0.1 + column / 100)).to(dtype), v, 200, 1000)


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_not_a_number_stays_in_its_rows(dtype):
    q, k, v = draw_inputs(4, (1, 1, 2), 700, 1700, 128, dtype, device="cuda")
    q[:, :, 333], k[:, :, 1500] = torch.nan, torch.nan  # column 1500 is row 500's own
    out, lse = masked_attention(q, k, v, anchor_tokens=200, passing_tokens=1000, backend="hopper")
    spoilt = (torch.arange(700) == 333) | (torch.arange(700) >= 500)
    assert out[:, :, spoilt].isnan().all() and lse[:, :, spoilt].isnan().all()
    q, k = q[:, :, ~spoilt].nan_to_num(), k.nan_to_num()
    mask = apb_mask(700, 1700, 200, 1000)[~spoilt]
    assert_attention(out[:, :, ~spoilt], lse[:, :, ~spoilt], q, k, v, mask, lse_atol=1e-4)


def test_fewer_buffers_give_the_same():
    q, k, v = draw_inputs(5, (2, 2, 2), 1300, 1500, 128, torch.bfloat16, device="cuda")
    out, lse = hopper.launch(q, k, v, 300, 200, 128**-0.5, stages=2)
    assert_attention(out, lse, q, k, v, apb_mask(1300, 1500, 300, 200), lse_atol=1e-4)


def test_every_row_is_written_and_runs_agree():
    """More tiles than programs, so that every program draws several; twice, since who draws what may change."""
    q, k, v = draw_inputs(7, (1, 8, 4), 3000, 4000, 128, torch.bfloat16, device="cuda")
    poisoned = torch.full((2, *q.shape), torch.nan, dtype=q.dtype, device="cuda")  # freed, and likely to be reused
    del poisoned
    runs = [masked_attention(q, k, v, anchor_tokens=900, passing_tokens=1000, backend="hopper") for _ in range(5)]
    attend(q, k, v, 900, 1000)
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))


def test_what_it_does_not_take():
    for dim, dtype, says in ((96, torch.bfloat16, "head dims 64 and 128, got 96"), (64, torch.float32, "float16 and")):
        q = torch.zeros(1, 1, 1, dim, device="cuda", dtype=dtype)
        with pytest.raises(ValueError, match=says):
            masked_attention(q, q, q, anchor_tokens=0, passing_tokens=0, backend="hopper")


def test_tensors_that_tma_cannot_read_are_copied():
    """Contiguous ones too: at an odd address, or with an odd stride of a dimension of size 1."""
    store = torch.randn(3, 8 * 300 * 64 + 4, device="cuda").half()
    shape, strides = (1, 8, 300, 64), (7, 300 * 64, 64, 1)
    for offset in (0, 4):
        attend(*(x[offset:].as_strided(shape, strides) for x in store), 100, 0)


def test_operator_graph_and_compilation():
    q, k, v = draw_inputs(3, (1, 2, 2), 390, 520, 64, torch.float16, "tokens_first", device="cuda")
    hopper.hopper_flash(q, k, v, anchor_tokens=40, passing_tokens=130, scale=0.125)
    torch.library.opcheck(torch.ops.apb.hopper_flash.default, (q, k, v, 40, 130, 0.125))

    def layer(q, k, v, anchor, passing):
        return masked_attention(2 * q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend="hopper")

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for anchor, passing, block in [(10, 20, 40), (33, 64, 70), (100, 1, 200)]:
        q, k, v = draw_inputs(0, (1, 2, 2), anchor + block, anchor + passing + block, 64, torch.float16, device="cuda")
        torch.testing.assert_close(compiled(q, k, v, anchor, passing), layer(q, k, v, anchor, passing))

    graph = torch.cuda.CUDAGraph()
    layer(q, k, v, 100, 1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out, lse = layer(q, k, v, 100, 1)
    truth = [x.clone() for x in layer(q, k, v, 100, 1)]
    for _ in range(3):  # the counter of tiles starts at zero in every replay
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, truth[0]) and torch.equal(lse, truth[1])
