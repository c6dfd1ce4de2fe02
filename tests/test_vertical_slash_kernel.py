"""The kernel over listed keys under the interpreter: every pattern and cut, ragged lengths, any strides."""

import pytest
import torch
from attention_cases import HEADS, LAYOUTS, SEEDS, assert_attention, draw_inputs
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.attend import AShape, BlockSparse, SparseIndex, VerticalSlash, sparse_attention
from apb.attend.sparse_index import TILE, slash_index

pytest.importorskip("triton")
from apb.kernels import vertical_slash
from apb.kernels.masked_flash import tma_can_read
from apb.kernels.vertical_slash import Tiles, choose_tiles, launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")

TOKENS = st.sampled_from([1, 63, 64, 65, 130, 200, 260])
PATTERNS = st.one_of(
    st.builds(VerticalSlash, vertical=st.sampled_from([1, 40, 150]), slash=st.sampled_from([1, 101, 130])),
    st.builds(AShape, sink=st.sampled_from([1, 70]), local=st.sampled_from([1, 66, 150])),
    st.builds(BlockSparse, blocks=st.integers(1, 4)),
)
CUTS = st.builds(
    Tiles, st.sampled_from([32, 64]), st.sampled_from([32, 64]), st.just(4), st.just(2), st.just(1),
    st.booleans(),
)  # fmt: skip
BIG = Tiles(64, 64, 4, 2, 1)  # the interpreter's time goes by steps
SMALL = Tiles(32, 32, 4, 2, 1)


def attend(q, k, v, index, cut):
    cut = cut._replace(tma=cut.tma and tma_can_read(k) and tma_can_read(v))
    lists = (index.tiles, index.tile_counts, index.columns, index.column_counts, index.covered)
    return launch(q, k, v, *lists, q.shape[-1] ** -0.5, cut)


@given(seed=SEEDS, heads=HEADS, tokens=TOKENS, pattern=PATTERNS, cut=CUTS, dim=st.sampled_from([16, 64, 80]),
       dtype=st.sampled_from([torch.float32, torch.float16]), layout=LAYOUTS)  # fmt: skip
@settings(max_examples=12)
def test_equals_the_oracle(seed, heads, tokens, pattern, cut, dim, dtype, layout):
    q, k, v = draw_inputs(seed, heads, tokens, tokens, dim, dtype, layout)
    index = pattern.index(q, k)
    assert_attention(*attend(q, k, v, index, cut), q, k, v, index.mask())


@given(seed=SEEDS, tokens=TOKENS, slash=st.integers(1, 9), vertical=st.integers(0, 90), cut=CUTS)
@settings(max_examples=10)
def test_slashes_anywhere(seed, tokens, slash, vertical, cut):
    """Without the forced offsets the farthest tile begins anywhere, and columns are covered here and there."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [[torch.randperm(tokens, generator=generator) for _ in range(4)] for _ in range(2)]
    offsets = torch.stack([x[:slash] for x in drawn[0]])[None]
    offsets[..., 0] = 0
    columns = torch.stack([x[:vertical] for x in drawn[1]])[None].sort(dim=2).values
    q, k, v = draw_inputs(seed, (1, 2, 2), tokens, tokens, 16, torch.float32)
    index = slash_index(offsets.sort(dim=2).values, columns, tokens)
    assert_attention(*attend(q, k, v, index, cut), q, k, v, index.mask())


@given(seed=SEEDS, pattern=PATTERNS, cut=st.sampled_from([BIG, SMALL]), j=st.integers(0, 199))
@settings(max_examples=4)
def test_a_key_changes_no_row_before_its_tile(seed, pattern, cut, j):
    q, k, v = draw_inputs(seed, (1, 1, 2), 200, 200, 16, torch.float32)
    index = pattern.index(q, k)
    before = attend(q, k, v, index, cut)
    k[:, :, j], v[:, :, j] = torch.nan, 1e4
    after = attend(q, k, v, index, cut)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :, :j], y[:, :, :j])
    v[:, :, j] = torch.nan  # a weight of 0 does not hide a NaN, so it may show in its own tile
    assert torch.equal(before[0][:, :, : j // 64 * 64], attend(q, k, v, index, cut)[0][:, :, : j // 64 * 64])


@pytest.mark.parametrize("pattern", [VerticalSlash(vertical=40, slash=101), AShape(sink=9, local=9), BlockSparse()])
def test_every_element_is_written(monkeypatch, pattern):
    q, k, v = draw_inputs(2, (2, 1, 2), 137, 137, 80, torch.float32)
    index = pattern.index(q, k)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))
    out, lse = attend(q, k, v, index, SMALL)
    assert out.isfinite().all() and lse.isfinite().all()


def test_heads_with_lists_of_their_own():
    """Heads and batch entries of one call differ in everything: no list is read from a neighbour."""
    q, k, v = draw_inputs(3, (2, 2, 2), 200, 200, 16, torch.float32)
    k[1], k[:, 1] = -k[1], k[:, 1].flip(1)
    for pattern in (VerticalSlash(vertical=35, slash=102), BlockSparse(blocks=2)):
        index = pattern.index(q, k)
        together = attend(q, k, v, index, BIG)
        for batch in range(2):
            for head in range(4):
                x = (slice(batch, batch + 1), slice(head, head + 1))
                own = SparseIndex(tokens=200, **{name: getattr(index, name)[x] for name in FIELDS})
                keys = (slice(batch, batch + 1), slice(head // 2, head // 2 + 1))
                alone = attend(q[x], k[keys], v[keys], own, BIG)
                assert all(torch.equal(a, t[x]) for a, t in zip(alone, together, strict=True))


FIELDS = ("tiles", "tile_counts", "columns", "column_counts", "covered")


def test_the_backend_by_name_and_as_a_torch_operator():
    q, k, v = draw_inputs(4, (1, 1, 2), 150, 150, 16, torch.float32, "tokens_first")
    for pattern in (VerticalSlash(vertical=40, slash=101), BlockSparse(blocks=2)):
        index = pattern.index(q, k)
        out, lse = sparse_attention(q, k, v, index, backend="triton")
        assert_attention(out, lse, q, k, v, index.mask())
    lists = [getattr(index, name) for name in FIELDS]
    torch.library.opcheck(torch.ops.apb.sparse_flash.default, (q, k, v, *lists, 0.25))


def test_cuts_divide_the_tiles_of_the_index():
    assert vertical_slash.TILE == TILE
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in range(16, 257, 16):
            for capability in ((8, 0), (9, 0), (10, 0)):
                cut = choose_tiles(dtype, dim, capability, tma=True)
                assert all(x >= 16 and TILE % x == 0 for x in cut[:2])
                assert not (cut.tma and capability[0] < 9)
