"""The public function: every backend against the oracle, its laws and its errors."""

from functools import partial

import pytest
import torch
from attention_cases import HEADS, LAYOUTS, LENGTHS, SEEDS, assert_attention, draw_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from apb.attend import check, choose_backend, masked_attention
from apb.reference import apb_mask

BACKENDS = ["reference", "sdpa", "flex"]  # triton: test_masked_flash_kernel.py
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
HALF_LSE = 1e-4  # PyTorch's CPU kernel takes a quick exponential in half precision


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=SEEDS, heads=HEADS, lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS), missing=LENGTHS,
       dim=st.sampled_from([16, 64, 80]), dtype=DTYPES, layout=LAYOUTS)  # fmt: skip
def test_equals_the_oracle(backend, seed, heads, lengths, missing, dim, dtype, layout):
    anchor, passing, block = lengths
    rows = max(0, anchor + block - missing)
    q, k, v = draw_inputs(seed, heads, rows, sum(lengths), dim, dtype, layout)
    out, lse = masked_attention(q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend=backend)
    mask = apb_mask(rows, sum(lengths), anchor, passing)
    assert_attention(out, lse, q, k, v, mask, lse_atol=2e-5 if dtype == torch.float32 else HALF_LSE)


@given(seed=SEEDS, lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS), j=st.integers(0, 200))
def test_a_key_changes_no_row_before_it(seed, lengths, j):
    anchor, passing, block = lengths
    if anchor + block == 0:
        return
    q, k, v = draw_inputs(seed, (1, 1, 2), anchor + block, sum(lengths), 16, torch.float32)
    j = min(j, sum(lengths) - 1)
    blind = ~apb_mask(anchor + block, sum(lengths), anchor, passing)[:, j]
    before = masked_attention(q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend="sdpa")
    k[:, :, j] = torch.nan
    v[:, :, j] = 1e4
    after = masked_attention(q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend="sdpa")
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :, blind], y[:, :, blind])


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    q, k, v = draw_inputs(0, (1, 1, 2), 9, 12, 16, torch.float32)
    out, lse = masked_attention(q, k, v, anchor_tokens=4, passing_tokens=3, scale=0.01, backend=backend)
    assert_attention(out, lse, q, k, v, apb_mask(9, 12, 4, 3), scale=0.01)


def test_without_anchor_and_passing_it_is_causal_attention():
    q, k, v = draw_inputs(1, (2, 2, 2), 40, 40, 64, torch.float32)
    out, _ = masked_attention(q, k, v, anchor_tokens=0, passing_tokens=0)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, theirs)


def test_the_reference_has_gradients():  # FlexAttention has them on CUDA only: tests/gpu
    q, k, v = (x.double().requires_grad_() for x in draw_inputs(2, (1, 2, 2), 5, 7, 16, torch.float32))
    attend = partial(masked_attention, anchor_tokens=2, passing_tokens=2, backend="reference")
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v)[0], (q, k, v), fast_mode=True)


def test_choose_backend_is_what_auto_takes():
    q, k, v = draw_inputs(3, (1, 1, 1), 9, 9, 16, torch.float32)
    assert choose_backend(q) == "sdpa"
    assert choose_backend(q.double()) == "reference"
    auto = masked_attention(q, k, v, anchor_tokens=2, passing_tokens=0)
    sdpa = masked_attention(q, k, v, anchor_tokens=2, passing_tokens=0, backend="sdpa")
    assert all(torch.equal(x, y) for x, y in zip(auto, sdpa, strict=True))


GOOD = {"anchor_tokens": 2, "passing_tokens": 3}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "cudnn"}, "backend must be one of auto, reference, sdpa, flex, triton, hopper; got 'cudnn'"),
        ({"backend": "hopper"}, "backend 'hopper' needs a Hopper GPU .* got a tensor on cpu; use backend='auto'"),
        ({"q": torch.zeros(4, 6, 16)}, r"q must be \[batch, heads, tokens, dim\], got shape \[4, 6, 16\]"),
        ({"k": torch.zeros(1, 2, 9, 16).half()}, r"k is torch.float16 .* Convert with k.to\(q\)"),
        ({"v": torch.zeros(1, 2, 8, 16)}, r"v \[1, 2, 8, 16\]"),
        ({"k": torch.zeros(2, 2, 9, 16)}, r"k and v must be \[batch 1"),
        ({"q": torch.zeros(1, 3, 6, 16)}, "q's 3 heads must be a multiple of the 2 heads"),
        ({"anchor_tokens": -1}, "anchor_tokens must be an integer ≥ 0, got -1"),
        ({"passing_tokens": -1}, "passing_tokens must be an integer ≥ 0, got -1"),
        ({"anchor_tokens": 1.5}, "anchor_tokens must be an integer ≥ 0, got 1.5"),
        ({"anchor_tokens": 7}, "7 [+] 3 exceeds the 9 keys"),
        ({"passing_tokens": 5}, "q has 6 rows, but anchor and block hold only 4 tokens"),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
        ({"scale": float("nan")}, "scale must be a positive number"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(change, says):
    arguments = {"q": torch.zeros(1, 4, 6, 16), "k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16)}
    with pytest.raises(ValueError, match=says):
        masked_attention(**(arguments | GOOD | change))


@pytest.mark.parametrize("dim", [8, 264])
def test_head_dim_out_of_range(dim):
    x = torch.zeros(1, 1, 5, dim)
    with pytest.raises(ValueError, match=f"head dim must be 16..256, got {dim}"):
        masked_attention(x, x, x, anchor_tokens=0, passing_tokens=0)


def test_dtype_not_taken():
    x = torch.zeros(1, 1, 5, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"backend 'sdpa' takes torch.float16, .*; got torch.float64"):
        masked_attention(x, x, x, anchor_tokens=0, passing_tokens=0, backend="sdpa")


def test_a_lost_gradient_is_an_error():
    x = torch.zeros(1, 1, 5, 16, requires_grad=True)
    for backend in ("sdpa", "flex"):
        with pytest.raises(RuntimeError, match=rf"{backend}.* no backward pass here: .* take backend='auto'"):
            masked_attention(x, x, x, anchor_tokens=0, passing_tokens=0, backend=backend)
    assert masked_attention(x, x, x, anchor_tokens=0, passing_tokens=0)[0].requires_grad
    with torch.no_grad():
        masked_attention(x, x, x, anchor_tokens=0, passing_tokens=0, backend="sdpa")


def test_auto_takes_the_hopper_kernel_where_it_can(monkeypatch):
    hopper = pytest.importorskip("apb.kernels.hopper")
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        takes = {
            (dtype, dim): choose_backend(torch.empty(1, 1, 1, dim, dtype=dtype, device="cuda"))
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
            for dim in (64, 96, 128, 256)
        }
        taken = {key for key, backend in takes.items() if backend == "hopper"}
        assert taken == {(dtype, dim) for dtype in (torch.bfloat16, torch.float16) for dim in hopper.DIMS}
        assert set(takes.values()) == {"hopper", "triton"}
        q = torch.empty(1, 1, 1, 64, dtype=torch.float16, device="cuda")
        assert choose_backend(q, ("reference", "sdpa", "triton")) == "triton"
        monkeypatch.setattr(check, "GLUON_INSTALLED", False)
        assert choose_backend(q) == "triton"
        monkeypatch.undo()
        capability = (8, 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        assert choose_backend(q) == "triton"


@pytest.mark.parametrize("backend", ["triton", "hopper", "auto"])
def test_traced_whole_up_to_the_kernel(backend, monkeypatch):
    """On CUDA tensors that are not there, so without a GPU too: one graph for all lengths, with the operator in it."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    graphs = []

    def layer(q, k, anchor, passing):
        return masked_attention(2 * q, k, k, anchor_tokens=anchor, passing_tokens=passing, backend=backend)

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=keep)
    with FakeTensorMode():
        for anchor, passing, block in [(10, 20, 40), (33, 64, 70), (100, 1, 200)]:
            q = torch.empty(1, 4, anchor + block, 64, dtype=torch.float16, device="cuda")
            k = torch.empty(1, 2, anchor + passing + block, 64, dtype=torch.float16, device="cuda")
            out, lse = compiled(q, k, anchor, passing)
            assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
    operator = "masked_flash" if backend == "triton" else "hopper_flash"
    assert len(graphs) == 1 and graphs[0].count(f"torch.ops.apb.{operator}") == 1
