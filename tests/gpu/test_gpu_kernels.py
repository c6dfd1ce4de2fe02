"""The Triton kernels on a GPU: every dtype and head dim against float64, compiled, huge and at the edge of memory."""

import pytest
import torch
from attention_cases import assert_attention, draw_inputs, lay_out

from apb import reference
from apb.attend import choose_backend, decode_attention, masked_attention
from apb.merge import merge
from apb.reference import apb_mask

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)
DIMS = (16, 32, 64, 80, 96, 112, 128, 192, 256)
SHAPES = [(0, 0, 1), (0, 0, 300), (129, 0, 0), (33, 70, 1), (128, 128, 256), (200, 333, 517), (1, 0, 1000)]


def attend(q, k, v, anchor, passing, backend="triton"):
    out, lse = masked_attention(q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend=backend)
    mask = apb_mask(q.shape[2], k.shape[2], anchor, passing)
    # FlexAttention on TF32 or the efficient kernel in float32 are not ours to judge to the last bit.
    assert_attention(out, lse, q, k, v, mask, lse_atol=1e-4)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_dtypes_and_head_dims(dtype, dim):
    for seed, (anchor, passing, block) in enumerate(SHAPES):
        q, k, v = draw_inputs(seed, (2, 2, 2), anchor + block, anchor + passing + block, dim, dtype, device="cuda")
        attend(q, k, v, anchor, passing)


@pytest.mark.parametrize("layout", ["tokens_first", "step_2", "nan_around"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layouts_and_left_out_anchor_rows(dtype, layout):
    for rows in (1, 517, 600, 717):
        q, k, v = draw_inputs(rows, (2, 2, 3), rows, 1050, 128, dtype, layout, device="cuda")
        attend(q, k, v, 200, 333)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("dtype", HALF)
def test_the_other_backends_agree(backend, dtype):
    q, k, v = draw_inputs(0, (1, 2, 2), 384, 640, 64, dtype, device="cuda")
    attend(q, k, v, 128, 256, backend)


def test_flex_has_gradients():
    grads = []
    for backend in ("reference", "flex"):
        q, k, v = (x.requires_grad_() for x in draw_inputs(2, (1, 2, 2), 384, 640, 64, torch.bfloat16, device="cuda"))
        out, _ = masked_attention(q, k, v, anchor_tokens=128, passing_tokens=256, backend=backend)
        out.float().square().sum().backward()
        grads.append([x.grad for x in (q, k, v)])
    for theirs, truth in zip(grads[1], grads[0], strict=True):
        assert (theirs - truth).norm() < 0.02 * truth.norm()


def test_auto_is_the_fastest_that_takes_the_input():
    fast = "hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    for dtype, dim, expected in (
        (torch.bfloat16, 128, fast), (torch.float16, 64, fast), (torch.bfloat16, 96, "triton"),
        (torch.float32, 128, "triton"), (torch.float64, 128, "reference"),
    ):  # fmt: skip
        assert choose_backend(torch.zeros(1, 1, 1, dim, device="cuda", dtype=dtype)) == expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_decode(dtype, causal):
    cases = [(1, 1, 64), (1, 5000, 128), (7, 3, 80), (64, 4097, 128), (300, 1000, 256), (1, 40000, 96)]
    for seed, (rows, columns, dim) in enumerate(cases):
        for layout in ("dense", "step_2", "nan_around"):
            q, k, v = draw_inputs(seed, (2, 2, 4), rows, columns, dim, dtype, layout, device="cuda")
            out, lse = decode_attention(q, k, v, causal=causal)
            mask = apb_mask(rows, columns, 0, 0) if causal else torch.ones(rows, columns, dtype=torch.bool)
            assert_attention(out, lse, q, k, v, mask, lse_atol=1e-4)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_merge(dtype):
    outs = torch.randn(5, 2, 3, 100, 80, device="cuda").to(dtype)
    lses = 20 * torch.randn(5, 2, 3, 100, device="cuda")
    lses[1], outs[1] = -torch.inf, torch.nan
    out, lse = merge(outs, lses)
    truth, truth_lse = reference.merge(outs.nan_to_num(), lses)
    tol = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(out.double(), truth, atol=tol, rtol=tol)
    torch.testing.assert_close(lse.double(), truth_lse, atol=2e-5, rtol=1e-5)


def test_operators():
    q, k, v = draw_inputs(3, (1, 2, 2), 90, 120, 64, torch.float16, "tokens_first", device="cuda")
    decode_attention(q, k, v, causal=True), merge(torch.stack((q, q)), torch.zeros(2, *q.shape[:-1], device="cuda"))
    masked_attention(q, k, v, anchor_tokens=40, passing_tokens=30)  # the kernels are imported where they are used
    torch.library.opcheck(torch.ops.apb.masked_flash.default, (q, k, v, 40, 30, 0.125))
    torch.library.opcheck(torch.ops.apb.split_kv_decode.default, (q, k, v, True, 0.125))
    partials = torch.randn(2, 1, 2, 9, 16, device="cuda"), torch.randn(2, 1, 2, 9, device="cuda")
    torch.library.opcheck(torch.ops.apb.merge_partials.default, (*partials, torch.bfloat16))


def test_compiled_with_changing_lengths():
    def layer(q, k, v, anchor, passing):
        out, lse = masked_attention(2 * q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend="triton")
        more, more_lse = decode_attention(2 * q, k, v, causal=True, backend="triton")
        return merge(torch.stack((out, more)), torch.stack((lse, more_lse)))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for anchor, passing, block in [(10, 20, 40), (33, 64, 70), (100, 1, 200), (64, 64, 128)]:
        q, k, v = draw_inputs(0, (1, 2, 2), anchor + block, anchor + passing + block, 64, torch.float16, device="cuda")
        torch.testing.assert_close(
            compiled(q, k, v, anchor, passing), layer(q, k, v, anchor, passing), atol=2e-3, rtol=2e-3
        )


@pytest.mark.parametrize("layout", ["tma", "pointers"])
def test_offsets_beyond_two_to_the_31(layout):
    """Tokens 2^22 elements apart, so that the last lie beyond 2^31."""
    apart, tokens = 2**22, 700
    store = torch.empty(tokens * apart, dtype=torch.float16, device="cuda")
    small_q, small_k, small_v = draw_inputs(1, (1, 1, 1), tokens, tokens, 64, torch.float16, device="cuda")
    step = 1 if layout == "tma" else 2
    k = store.as_strided((1, 1, tokens, 64), (tokens * apart, tokens * apart, apart, step))
    v = store.as_strided((1, 1, tokens, 64), (tokens * apart, tokens * apart, apart, step), 2**20)
    k.copy_(small_k)
    v.copy_(small_v)
    assert (tokens - 1) * apart > 2**31
    attend(small_q, k, v, 0, 0)
    out, lse = decode_attention(small_q[:, :, -3:], k, v, causal=True)
    assert_attention(out, lse, small_q[:, :, -3:], k, v, apb_mask(3, tokens, 0, 0), lse_atol=1e-4)


def test_inputs_at_the_end_of_an_allocation():
    """Keys that end where their memory ends: reading on would fault, or take up the NaN that follows."""
    for columns in (1, 127, 129, 1000):
        for dim in (64, 80):
            q, k, v = draw_inputs(columns, (1, 1, 2), columns, columns, dim, torch.float16, device="cuda")
            ends = []
            for x in (k, v):
                flat = torch.full((2**20,), torch.nan, dtype=x.dtype, device="cuda")
                flat[-x.numel() :] = x.flatten()
                ends.append(flat[-x.numel() :].view_as(x))
            attend(q, *ends, 0, 0)
            out, lse = decode_attention(q[:, :, -1:], *ends, causal=False)
            assert_attention(out, lse, q[:, :, -1:], k, v, torch.ones(1, columns, dtype=torch.bool), lse_atol=1e-4)
            torch.cuda.synchronize()


def test_layouts_change_no_result():
    q, k, v = draw_inputs(4, (2, 2, 2), 300, 400, 64, torch.bfloat16, device="cuda")
    dense = masked_attention(q, k, v, anchor_tokens=50, passing_tokens=100)
    other = masked_attention(*(lay_out(x, "tokens_first") for x in (q, k, v)), anchor_tokens=50, passing_tokens=100)
    assert all(torch.equal(x, y) for x, y in zip(dense, other, strict=True))
