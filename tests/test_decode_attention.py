"""Few rows against a long cache: every backend against the oracle, splits, empty rows and errors."""

import pytest
import torch
from attention_cases import HEADS, LAYOUTS, SEEDS, assert_attention, draw_inputs, lay_out
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from apb.attend import decode_attention
from apb.reference import apb_mask

ROWS = st.sampled_from([0, 1, 1, 2, 7, 40])
COLUMNS = st.sampled_from([0, 1, 5, 33, 100, 200])


def mask_of(causal, rows, columns):
    return apb_mask(rows, columns, 0, 0) if causal else torch.ones(rows, columns, dtype=torch.bool)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@given(seed=SEEDS, heads=HEADS, rows=ROWS, columns=COLUMNS, causal=st.booleans(), dim=st.sampled_from([16, 64, 80]),
       dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), layout=LAYOUTS)  # fmt: skip
def test_equals_the_oracle(backend, seed, heads, rows, columns, causal, dim, dtype, layout):
    if backend == "triton":
        assume(dtype != torch.bfloat16)
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("runs under the interpreter; see tests/gpu")
    q, k, v = draw_inputs(seed, heads, rows, columns, dim, dtype, layout)
    out, lse = decode_attention(q, k, v, causal=causal, backend=backend)
    atol = 1e-4 if backend == "sdpa" and dtype != torch.float32 else 2e-5  # PyTorch's quick CPU exponential
    assert_attention(out, lse, q, k, v, mask_of(causal, rows, columns), lse_atol=atol)


@given(seed=SEEDS, heads=HEADS, rows=st.sampled_from([1, 7, 40]), columns=st.sampled_from([1, 33, 100]),
       causal=st.booleans(), splits=st.integers(1, 5), block_n=st.sampled_from([16, 32]), layout=LAYOUTS)  # fmt: skip
@settings(max_examples=10)
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")
def test_any_number_of_splits(seed, heads, rows, columns, causal, splits, block_n, layout):
    decode = pytest.importorskip("apb.kernels.decode")
    q, k, v = draw_inputs(seed, heads, rows, columns, 16, torch.float32, layout)
    split_keys = -(-columns // (splits * block_n)) * block_n
    tiles = decode.Tiles(16, block_n, 4, 2)
    out, lse = decode.launch(q, k, v, causal, 0.25, -(-columns // split_keys), tiles)
    assert_attention(out, lse, q, k, v, mask_of(causal, rows, columns))


def ragged(seed, heads, rows, capacity, layout, lengths):
    """Draw inputs whose keys beyond `lengths` are NaN; return them and each batch row alone, cut."""
    q, k, v = draw_inputs(seed, heads, rows, capacity, 16, torch.float32)
    alone = [(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n]) for i, n in enumerate(lengths)]
    k, v = k.clone(), v.clone()
    for i, n in enumerate(lengths):
        k[i, :, n:] = v[i, :, n:] = torch.nan
    return q, lay_out(k, layout), lay_out(v, layout), alone


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@given(seed=SEEDS, kv_heads=st.sampled_from([1, 2]), rows=st.sampled_from([1, 7]), causal=st.booleans(),
       lengths=st.lists(st.sampled_from([0, 1, 5, 64, 299, 300]), min_size=1, max_size=2), layout=LAYOUTS)  # fmt: skip
@example(seed=0, kv_heads=1, rows=1, causal=False, lengths=[299, 5], layout="nan_around")
@settings(max_examples=6)
def test_lengths_on_the_device(backend, seed, kv_heads, rows, causal, lengths, layout):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("runs under the interpreter; see tests/gpu")
    q, k, v, alone = ragged(seed, (len(lengths), kv_heads, 2), rows, 300, layout, lengths)
    counts = torch.tensor([[n, -1] for n in lengths], dtype=torch.int32)[:, 0]
    out, lse = decode_attention(q, k, v, causal=causal, lengths=counts, backend=backend)
    for i, (each, n) in enumerate(zip(alone, lengths, strict=True)):
        assert_attention(out[i : i + 1], lse[i : i + 1], *each, mask_of(causal, rows, n))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_lengths_out_of_range_read_nothing_else(backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("runs under the interpreter; see tests/gpu")
    q, k, v = draw_inputs(1, (2, 1, 2), 1, 40, 16, torch.float32)
    counts = torch.tensor([-3, 70], dtype=torch.int32)
    out, lse = decode_attention(q, k, v, causal=False, lengths=counts, backend=backend)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert_attention(out[1:], lse[1:], q[1:], k[1:], v[1:], mask_of(False, 1, 40))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")
def test_whatever_memory_held_before(monkeypatch):
    """Partial results and outputs begin as NaN."""
    decode = pytest.importorskip("apb.kernels.decode")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    q, k, v = draw_inputs(2, (1, 2, 2), 3, 100, 16, torch.float32)
    for causal, n in ((False, 100), (True, 100), (False, 40), (True, 7)):
        lengths = torch.tensor([n], dtype=torch.int32)  # of short ones some splits have nothing
        out, lse = decode.launch(q, k, v, causal, 0.25, 4, decode.Tiles(16, 16, 4, 2), lengths)
        assert_attention(out, lse, q, k[:, :, :n], v[:, :, :n], mask_of(causal, 3, n))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")
def test_as_a_torch_operator():
    pytest.importorskip("apb.kernels.decode")
    q, k, v = draw_inputs(3, (1, 1, 2), 3, 40, 16, torch.float32, "tokens_first")
    torch.library.opcheck(torch.ops.apb.split_kv_decode.default, (q, k, v, True, 0.25))
    lengths = torch.tensor([30], dtype=torch.int32)
    torch.library.opcheck(torch.ops.apb.split_kv_decode.default, (q, k, v, True, 0.25, lengths))


def test_the_question_on_another_host_is_not_causal():
    """Early query tokens must see the end of a block that comes before all of them."""
    q, k, v = draw_inputs(5, (1, 1, 1), 3, 20, 16, torch.float32)
    _, everything = decode_attention(q, k, v, causal=False)
    _, causal = decode_attention(q, k, v, causal=True)
    assert (everything[..., 0] > causal[..., 0]).all()
    torch.testing.assert_close(everything[..., -1], causal[..., -1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "flex"}, "backend must be one of auto, reference, sdpa, triton; got 'flex'"),
        ({"v": torch.zeros(1, 2, 8, 16)}, r"v \[1, 2, 8, 16\]"),
        ({"q": torch.zeros(1, 3, 6, 16)}, "q's 3 heads must be a multiple of the 2 heads"),
        ({"scale": -1.0}, "scale must be a positive number, got -1.0"),
        ({"lengths": torch.tensor([9])}, r"lengths must be int32 \[batch 1\] on cpu, got torch.int64 \[1\] on cpu"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, r"lengths must be int32 \[batch 1\] on cpu, .* \[2\]"),
    ],
)
def test_errors(change, says):
    arguments = {"q": torch.zeros(1, 4, 6, 16), "k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16)}
    with pytest.raises(ValueError, match=says):
        decode_attention(**(arguments | {"causal": True} | change))
