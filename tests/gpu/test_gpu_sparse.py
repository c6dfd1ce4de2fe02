"""MInference's sparse attention on a GPU: every dtype, head dim and pattern against float64 over the spelt-out mask."""

import pytest
import torch
from attention_cases import assert_attention, draw_inputs

from apb.attend import AShape, BlockSparse, VerticalSlash, masked_attention, sparse_attention

pytestmark = pytest.mark.gpu
PATTERNS = (VerticalSlash(vertical=90, slash=150), AShape(sink=10, local=100), BlockSparse(blocks=3))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_patterns(dtype, dim):
    for tokens, pattern in zip((1, 65, 700, 1000, 640, 333), PATTERNS * 2, strict=True):
        q, k, v = draw_inputs(tokens, (2, 2, 2), tokens, tokens, dim, dtype, device="cuda")
        index = pattern.index(q, k)
        out, lse = sparse_attention(q, k, v, index, backend="triton")
        assert_attention(out, lse, q, k, v, index.mask(), lse_atol=1e-4)


@pytest.mark.parametrize("layout", ["tokens_first", "step_2", "nan_around"])
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_layouts_and_backends(backend, layout):
    for pattern in PATTERNS:
        q, k, v = draw_inputs(1, (2, 2, 2), 700, 700, 64, torch.float16, layout, device="cuda")
        index = pattern.index(q, k)
        out, lse = sparse_attention(q, k, v, index, backend=backend)
        assert_attention(out, lse, q, k, v, index.mask(), lse_atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_selected_is_causal_attention(dtype):
    q, k, v = draw_inputs(2, (1, 2, 4), 3000, 3000, 128, dtype, device="cuda")
    index = VerticalSlash(vertical=3000, slash=3000).index(q, k)
    assert (index.density() == 1).all()
    found = sparse_attention(q, k, v, index)
    exact = masked_attention(q, k, v, anchor_tokens=0, passing_tokens=0)
    tol = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, exact, atol=tol, rtol=tol)


def test_a_long_document_chooses_the_same_twice_and_counts_its_pairs():
    q, k, v = draw_inputs(3, (1, 1, 4), 40000, 40000, 128, torch.bfloat16, device="cuda")
    pattern = VerticalSlash(vertical=512, slash=2048)
    index, again = pattern.index(q, k), pattern.index(q, k)
    assert torch.equal(index.tiles, again.tiles) and torch.equal(index.columns, again.columns)
    assert torch.equal(index.pairs()[:, 0], index.mask()[:, 0].sum(dim=(1, 2)))
    out, lse = sparse_attention(q, k, v, index)
    rows = slice(39 * 1024, 39 * 1024 + 64)  # a row tile
    mask = index.mask(rows.start, rows.stop)
    assert_attention(out[:, :, rows], lse[:, :, rows], q[:, :, rows], k, v, mask, lse_atol=1e-4)


def test_as_a_torch_operator():
    q, k, v = draw_inputs(4, (1, 2, 2), 150, 150, 64, torch.float16, "tokens_first", device="cuda")
    index = PATTERNS[0].index(q, k)
    sparse_attention(q, k, v, index)
    lists = (index.tiles, index.tile_counts, index.columns, index.column_counts, index.covered)
    torch.library.opcheck(torch.ops.apb.sparse_flash.default, (q, k, v, *lists, 0.125))
