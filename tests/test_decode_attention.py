"""Few rows against a long cache: every backend against the oracle, splits, empty rows and errors."""

import pytest
import torch
from attention_cases import HEADS, LAYOUTS, SEEDS, assert_attention, draw_inputs
from hypothesis import assume, given, settings
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
    out, lse = decode.launch(q, k, v, causal, 0.25, -(-columns // split_keys), split_keys, tiles)
    assert_attention(out, lse, q, k, v, mask_of(causal, rows, columns))


@given(programs=st.integers(1, 5000), columns=st.integers(1, 10**6), block_n=st.sampled_from([32, 64]))
def test_the_splits_cover_the_keys_once(programs, columns, block_n):
    choose_splits = pytest.importorskip("apb.kernels.decode").choose_splits
    splits, split_keys = choose_splits(programs, columns, block_n, 132)
    assert splits >= 1 and split_keys % block_n == 0
    assert (splits - 1) * split_keys < columns <= splits * split_keys


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")
def test_as_a_torch_operator():
    pytest.importorskip("apb.kernels.decode")
    q, k, v = draw_inputs(3, (1, 1, 2), 3, 40, 16, torch.float32, "tokens_first")
    torch.library.opcheck(torch.ops.apb.split_kv_decode.default, (q, k, v, True, 0.25))


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
    ],
)
def test_errors(change, says):
    arguments = {"q": torch.zeros(1, 4, 6, 16), "k": torch.zeros(1, 2, 9, 16), "v": torch.zeros(1, 2, 9, 16)}
    with pytest.raises(ValueError, match=says):
        decode_attention(**(arguments | {"causal": True} | change))
