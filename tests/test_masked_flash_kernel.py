"""The Triton kernel under the interpreter: every tile shape, both ways of loading, ragged everything."""

import pytest
import torch
from attention_cases import HEADS, LAYOUTS, LENGTHS, SEEDS, assert_attention, draw_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from apb.attend import decode_attention, masked_attention
from apb.reference import apb_mask

pytest.importorskip("triton")
from apb.kernels.masked_flash import Tiles, choose_tiles, launch, tile_capability, tma_can_read

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")

TILES = st.builds(
    Tiles,
    st.sampled_from([16, 32, 64]),
    st.sampled_from([16, 32, 64]),
    st.just(4),
    st.just(2),
    st.just(1),
    st.booleans(),
)


@given(seed=SEEDS, heads=HEADS, lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS), missing=LENGTHS, tiles=TILES,
       dim=st.sampled_from([16, 64, 80]), dtype=st.sampled_from([torch.float32, torch.float16]),
       layout=LAYOUTS)  # fmt: skip
def test_equals_the_oracle(seed, heads, lengths, missing, tiles, dim, dtype, layout):
    anchor, passing, block = lengths
    rows = anchor + block - missing
    if rows <= 0:
        return
    q, k, v = draw_inputs(seed, heads, rows, sum(lengths), dim, dtype, layout)
    tiles = tiles._replace(tma=tiles.tma and tma_can_read(k) and tma_can_read(v))
    out, lse = launch(q, k, v, anchor, passing, dim**-0.5, tiles)
    assert_attention(out, lse, q, k, v, apb_mask(rows, sum(lengths), anchor, passing))


@given(seed=SEEDS, heads=HEADS, rows=LENGTHS, columns=LENGTHS, tiles=TILES, dim=st.sampled_from([16, 80]),
       layout=LAYOUTS)  # fmt: skip
def test_a_rectangle_that_every_row_sees(seed, heads, rows, columns, tiles, dim, layout):
    if rows == 0 or columns == 0:
        return
    q, k, v = draw_inputs(seed, heads, rows, columns, dim, torch.float32, layout)
    tiles = tiles._replace(tma=tiles.tma and tma_can_read(k) and tma_can_read(v))
    out, lse = launch(q, k, v, 0, 0, dim**-0.5, tiles, causal=False)
    assert_attention(out, lse, q, k, v, torch.ones(rows, columns, dtype=torch.bool))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(17, 9), (17, 17), (40, 90)])
def test_many_rows_against_a_cache(monkeypatch, rows, columns, causal):
    monkeypatch.setattr("apb.attend._FEW_ROWS", 16)
    q, k, v = draw_inputs(rows, (1, 1, 2), rows, columns, 16, torch.float32)
    out, lse = decode_attention(q, k, v, causal=causal, backend="triton")
    mask = apb_mask(rows, columns, 0, 0) if causal else torch.ones(rows, columns, dtype=torch.bool)
    assert_attention(out, lse, q, k, v, mask)


@given(seed=SEEDS, lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS), j=st.integers(0, 200), tma=st.booleans())
@settings(max_examples=8)
def test_a_key_changes_no_row_before_it(seed, lengths, j, tma):
    anchor, passing, block = lengths
    if anchor + block == 0:
        return
    q, k, v = draw_inputs(seed, (1, 1, 1), anchor + block, sum(lengths), 16, torch.float32)
    j = min(j, sum(lengths) - 1)
    blind = ~apb_mask(anchor + block, sum(lengths), anchor, passing)[:, j]
    before = launch(q, k, v, anchor, passing, 0.25, Tiles(16, 16, 4, 2, 1, tma))
    k[:, :, j] = torch.nan
    v[:, :, j] = 1e4
    after = launch(q, k, v, anchor, passing, 0.25, Tiles(16, 16, 4, 2, 1, tma))
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[:, :, blind], y[:, :, blind])


def test_a_nan_value_stays_within_its_tile():
    q, k, v = draw_inputs(0, (1, 1, 1), 48, 64, 16, torch.float32)
    before, _ = launch(q, k, v, 16, 16, 0.25, Tiles(16, 16, 4, 2, 1))
    v[:, :, 48:] = torch.nan
    after, _ = launch(q, k, v, 16, 16, 0.25, Tiles(16, 16, 4, 2, 1))
    assert torch.equal(before[:, :, :32], after[:, :, :32])


def test_expanded_heads_need_no_copy():
    q, k, v = draw_inputs(1, (1, 1, 4), 33, 40, 64, torch.float32)
    one = launch(q, k, v, 10, 7, 0.125, Tiles(16, 32, 4, 2, 1, True))
    expanded = [x.expand(-1, 4, -1, -1) for x in (k, v)]
    assert tma_can_read(k) and not tma_can_read(expanded[0])
    four = launch(q, *expanded, 10, 7, 0.125, Tiles(16, 32, 4, 2, 1))
    assert all(torch.equal(x, y) for x, y in zip(one, four, strict=True))


def test_every_element_is_written(monkeypatch):
    q, k, v = draw_inputs(2, (2, 1, 2), 37, 50, 80, torch.float32)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))
    out, lse = launch(q, k, v, 20, 13, 0.1, Tiles(32, 16, 4, 2, 1))
    assert out.isfinite().all() and lse.isfinite().all()


def test_as_a_torch_operator():
    q, k, v = draw_inputs(3, (1, 1, 2), 9, 12, 16, torch.float32, "tokens_first")
    torch.library.opcheck(torch.ops.apb.masked_flash.default, (q, k, v, 4, 3, 0.25))
    torch.library.opcheck(torch.ops.apb.masked_flash.default, (q, k, v, 0, 0, 0.25, False))


def test_the_backend_by_name():
    q, k, v = draw_inputs(4, (1, 1, 2), 9, 12, 16, torch.float32)
    out, lse = masked_attention(q, k, v, anchor_tokens=4, passing_tokens=3, backend="triton")
    assert_attention(out, lse, q, k, v, apb_mask(9, 12, 4, 3))
    with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
        masked_attention(*(x.bfloat16() for x in (q, k, v)), anchor_tokens=4, passing_tokens=3, backend="triton")


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a knob once set no longer follows the environment
    q, k, v = draw_inputs(4, (1, 1, 2), 9, 12, 16, torch.float32)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu; use backend='sdpa'"):
        masked_attention(q, k, v, anchor_tokens=4, passing_tokens=3, backend="triton")


def test_tiles_are_powers_of_two():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in range(16, 257, 16):
            for capability in ((8, 0), (9, 0), (10, 0)):
                tiles = choose_tiles(dtype, dim, capability, tma=True)
                assert all(x & (x - 1) == 0 and x >= 16 for x in tiles[:2])


def test_consumer_gpus_take_the_tiles_that_fit_them(monkeypatch):
    x = torch.empty(1)
    assert tile_capability(x) == (0, 0)
    with FakeTensorMode():
        x = torch.empty(1, device="cuda")
        for capability, tiles in (((12, 0), (8, 6)), ((9, 0), (9, 0)), ((8, 9), (8, 9)), ((10, 0), (10, 0))):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
            assert tile_capability(x) == tiles
