"""Merging: any partition of the keys merges to the whole, in any order, and nothing is its identity."""

from itertools import pairwise

import pytest
import torch
from attention_cases import SEEDS, draw_inputs
from hypothesis import given
from hypothesis import strategies as st

from apb import reference
from apb.merge import merge, merge_into, merge_pair
from apb.testing.tolerance import assert_lse_close

NO_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")
BACKENDS = ["torch", pytest.param("triton", marks=NO_INTERPRETER)]
INF = torch.inf


def draw_parts(seed, parts, shape, size=20.0):
    generator = torch.Generator().manual_seed(seed)
    outs = torch.randn(parts, *shape, generator=generator)
    return outs, size * torch.randn(outs.shape[:-1], generator=generator)


def assert_merged(out, lse, outs, lses, tol=5e-5):
    truth, truth_lse = reference.merge(outs.nan_to_num(), lses)
    torch.testing.assert_close(out.double(), truth, atol=tol, rtol=tol)
    assert_lse_close(lse, truth_lse)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_partition_of_the_keys_merges_to_the_whole(backend, seed, cuts):
    q, k, v = draw_inputs(seed, (2, 1, 2), 5, 40, 16, torch.float64)
    ends = [0, *sorted(cuts), 40]
    parts = [
        reference.attention(q, k[:, :, a:b], v[:, :, a:b], torch.ones(5, b - a, dtype=torch.bool))
        for a, b in pairwise(ends)
    ]
    outs, lses = (torch.stack(x).float() for x in zip(*parts, strict=True))
    out, lse = merge(outs, lses, backend=backend)
    whole, whole_lse = reference.attention(q, k, v, torch.ones(5, 40, dtype=torch.bool))
    torch.testing.assert_close(out.double(), whole, atol=5e-5, rtol=5e-5)
    assert_lse_close(lse, whole_lse)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=SEEDS, parts=st.integers(1, 5), dim=st.sampled_from([16, 80]), strided=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float16]))  # fmt: skip
def test_equals_the_oracle(backend, seed, parts, dim, strided, dtype):
    outs, lses = draw_parts(seed, parts, (2, 3, 7, dim), size=200.0)
    outs = outs.to(dtype)
    if strided:
        outs, lses = outs.transpose(2, 3).contiguous().transpose(2, 3), lses.mT.contiguous().mT
    out, lse = merge(outs, lses, backend=backend)
    assert out.dtype == dtype
    assert_merged(out, lse, outs, lses, tol=2e-3 if dtype == torch.float16 else 5e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=SEEDS, order=st.permutations(range(4)))
def test_order_free(backend, seed, order):
    outs, lses = draw_parts(seed, 4, (1, 2, 5, 16))
    out, lse = merge(outs, lses, backend=backend)
    again, again_lse = merge(outs[order], lses[order], backend=backend)
    torch.testing.assert_close((out, lse), (again, again_lse), atol=2e-5, rtol=2e-5)


@given(seed=SEEDS)
def test_associative(seed):
    outs, lses = draw_parts(seed, 3, (1, 2, 5, 16))
    (a, b, c), (x, y, z) = outs, lses
    left = merge_pair(*merge_pair(a, x, b, y), c, z)
    right = merge_pair(a, x, *merge_pair(b, y, c, z))
    torch.testing.assert_close(left, right, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(left, merge(outs, lses), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_part_counts_for_nothing_even_if_it_holds_nan(backend):
    outs, lses = draw_parts(0, 3, (1, 2, 5, 16))
    outs[1], lses[1] = torch.nan, -INF
    out, lse = merge(outs, lses, backend=backend)
    torch.testing.assert_close((out, lse), merge(outs[::2], lses[::2], backend=backend))
    torch.testing.assert_close(merge_pair(outs[0], lses[0], outs[1], lses[1]), (outs[0], lses[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=SEEDS, dim=st.sampled_from([16, 80]), dtype=st.sampled_from([torch.float32, torch.float16]))
def test_in_place_is_the_pairs_and_touches_nothing_else(backend, seed, dim, dtype):
    outs, lses = draw_parts(seed, 2, (2, 11, 3, dim))
    outs, lses = outs.transpose(2, 3), lses.mT  # rows lie together, as a model's do
    lses[1, 0, 0], outs[1, 0, 0] = -INF, torch.nan
    lses[0, 1, 1] = -INF
    lses[:, 1, 2] = -INF
    rows, part = slice(2, 9), outs[1].to(dtype)
    expected, expected_lse = merge_pair(outs[0], lses[0], part, lses[1])
    out, lse = outs[0].clone(), lses[0].clone()
    arguments = out[:, :, rows], lse[:, :, rows], part[:, :, rows], lses[1][:, :, rows]
    if backend == "triton":
        from apb.kernels.merge import merge_into_rows

        merge_into_rows(*arguments)
    else:
        merge_into(*arguments)
    torch.testing.assert_close((out[:, :, rows], lse[:, :, rows]), (expected[:, :, rows], expected_lse[:, :, rows]))
    for outside in (slice(0, 2), slice(9, None)):
        assert torch.equal(out[:, :, outside], outs[0][:, :, outside])
        assert torch.equal(lse[:, :, outside], lses[0][:, :, outside])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_merges_to_nothing(backend):
    outs, lses = torch.full((3, 1, 2, 5, 16), torch.nan), torch.full((3, 1, 2, 5), -INF)
    out, lse = merge(outs, lses, backend=backend)
    assert (out == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-3e38, -1e6, 1e6, 3e38])
def test_any_size_of_lse_is_stable(backend, shift):
    outs, lses = torch.ones(2, 1, 1, 3, 16), torch.full((2, 1, 1, 3), shift)
    outs[1] = 3
    out, _ = merge(outs, lses, backend=backend)
    torch.testing.assert_close(out, torch.full((1, 1, 3, 16), 2.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    out, lse = merge(torch.zeros(2, 1, 2, 0, 16), torch.zeros(2, 1, 2, 0), backend=backend)
    assert out.shape == (1, 2, 0, 16) and lse.shape == (1, 2, 0)


def draw_parts_with_gaps(seed, parts=3):
    """Draw parts in float64, some of them empty and full of NaN; the last row has no other."""
    outs, lses = (x.double() for x in draw_parts(seed, parts, (1, 2, 5, 16), size=3.0))
    generator = torch.Generator().manual_seed(seed)
    empty = torch.rand(lses.shape, generator=generator) < 0.3
    empty[..., -1] = True
    return outs.masked_fill(empty[..., None], torch.nan), lses.masked_fill(empty, -INF), empty


@given(seed=SEEDS, parts=st.integers(1, 4), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_gradients_equal_the_textbooks(seed, parts, dtype):
    outs, lses, empty = draw_parts_with_gaps(seed, parts)
    grad_out, grad_lse = (x[0].double() for x in draw_parts(seed + 1, 1, outs.shape[1:], size=1.0))
    inputs = [x.to(dtype).requires_grad_() for x in (outs, lses)]
    found = torch.autograd.grad(merge(*inputs), inputs, (grad_out.to(dtype), grad_lse.float()))
    nothing = empty.all(dim=0)  # has no gradient, but NaN by the book
    plain = [outs.nan_to_num().requires_grad_(), lses.masked_fill(nothing, 0.0).requires_grad_()]
    grads = grad_out.masked_fill(nothing[..., None], 0.0), grad_lse.masked_fill(nothing, 0.0)
    truth = torch.autograd.grad(reference.merge(*plain), plain, grads)
    assert not found[0][empty].any() and not found[1][empty].any()
    tol = 1e-5 if dtype == torch.float32 else 1e-12
    for x, y in zip(found, truth, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, atol=tol, rtol=tol)


def test_gradients_by_finite_differences():
    outs, lses, empty = draw_parts_with_gaps(0)
    outs, lses = outs.nan_to_num().requires_grad_(), lses.masked_fill(empty, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: merge(x, y.masked_fill(empty, -INF))[0], (outs, lses), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, y: merge(x, y)[0], (outs, lses), fast_mode=True)


def test_gradients_of_a_pair():
    outs, lses = (x.double().requires_grad_() for x in draw_parts(1, 2, (1, 2, 5, 16), size=3.0))
    whole, _ = merge(outs, lses)
    pair, _ = merge_pair(outs[0], lses[0], outs[1], lses[1])
    for x, y in zip(*(torch.autograd.grad(out.square().sum(), (outs, lses)) for out in (whole, pair)), strict=True):
        assert x.any() and torch.equal(x, y)


def test_a_backend_that_would_lose_a_gradient_raises():
    pytest.importorskip("triton")
    outs, lses = draw_parts(0, 2, (1, 2, 5, 16))
    for wanting in ((outs.clone().requires_grad_(), lses), (outs, lses.clone().requires_grad_())):
        with pytest.raises(RuntimeError, match=r"'triton' has no backward pass: .* use backend='torch'"):
            merge(*wanting, backend="triton")
        assert merge(*wanting)[0].requires_grad


@NO_INTERPRETER
def test_without_grad_mode_triton_takes_what_wants_a_gradient():
    pytest.importorskip("triton")
    outs, lses = (x.requires_grad_() for x in draw_parts(0, 2, (1, 2, 5, 16)))
    with torch.no_grad():
        torch.testing.assert_close(merge(outs, lses, backend="triton"), merge(outs, lses, backend="torch"))


def test_errors():
    outs, lses = draw_parts(0, 2, (1, 2, 5, 16))
    with pytest.raises(ValueError, match=r"got \[1, 2, 5, 16\] and \[1, 2, 5\]. Use torch.stack"):
        merge(outs[0], lses[0])
    with pytest.raises(ValueError, match="parts ≥ 1"):
        merge(outs[:0], lses[:0])
    with pytest.raises(ValueError, match="backend must be auto, torch or triton, got 'sdpa'"):
        merge(outs, lses, backend="sdpa")
    with pytest.raises(ValueError, match="must agree in shape"):
        merge_pair(outs[0], lses[0], outs[0, :, :1], lses[0, :, :1])


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors, got cpu; use backend='torch'"):
        merge(torch.zeros(2, 1, 1, 1, 16), torch.zeros(2, 1, 1, 1), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_bfloat16_under_the_interpreter_is_refused():
    with pytest.raises(ValueError, match="computes bfloat16 wrongly under TRITON_INTERPRET=1; use backend='torch'"):
        merge(torch.zeros(2, 1, 1, 1, 16).bfloat16(), torch.zeros(2, 1, 1, 1), backend="triton")
