"""The backward pass under the interpreter: gradients of q, k and v through output and LSE, against float64."""

from functools import partial

import pytest
import torch
from attention_cases import HEADS, LAYOUTS, LENGTHS, SEEDS, draw_inputs, lay_out
from gradient_cases import assert_gradients, draw_grads
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apb.attend import decode_attention, masked_attention
from apb.merge import merge
from apb.reference import apb_mask, attention

pytest.importorskip("triton")
from apb.kernels import masked_flash
from apb.kernels.masked_flash import Tiles
from apb.kernels.masked_flash_backward import choose_tiles, launch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")

SIZES = st.sampled_from([32, 64])
TILES = st.builds(Tiles, SIZES, SIZES, st.just(4), st.just(2), st.just(1), st.booleans())
FORWARD = Tiles(32, 32, 4, 2, 1)


def backward(q, k, v, grads, anchor, passing, key_tiles, query_tiles, causal=True):
    """Go forward and backward with the given tiles; TMA where it can read the tensors."""
    scale = q.shape[-1] ** -0.5
    saved = masked_flash.launch(q, k, v, anchor, passing, scale, FORWARD, causal)
    can_read = masked_flash.tma_can_read
    key_tiles = key_tiles._replace(tma=key_tiles.tma and can_read(q) and can_read(grads[0]))
    query_tiles = query_tiles._replace(tma=query_tiles.tma and can_read(k) and can_read(v))
    return launch(grads, q, k, v, *saved, anchor, passing, scale, key_tiles, query_tiles, causal)


@example(seed=0, heads=(1, 2, 2), lengths=(33, 16, 70), missing=2, key_tiles=Tiles(32, 64, 4, 2, 1, True),
         query_tiles=Tiles(64, 32, 4, 2, 1, True), dim=16, dtype=torch.float32, layout="dense")  # fmt: skip
@given(seed=SEEDS, heads=HEADS, lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS), missing=LENGTHS, key_tiles=TILES,
       query_tiles=TILES, dim=st.sampled_from([16, 64, 80]), dtype=st.sampled_from([torch.float32, torch.float16]),
       layout=LAYOUTS)  # fmt: skip
@settings(max_examples=10)
def test_gradients_equal_the_oracles(seed, heads, lengths, missing, key_tiles, query_tiles, dim, dtype, layout):
    anchor, passing, block = lengths
    rows = anchor + block - missing
    if rows <= 0:
        return
    q, k, v = draw_inputs(seed, heads, rows, sum(lengths), dim, dtype, layout)
    grads = draw_grads(seed, q, layout)
    found = backward(q, k, v, grads, anchor, passing, key_tiles, query_tiles)
    assert_gradients(found, q, k, v, apb_mask(rows, sum(lengths), anchor, passing), *grads)


@given(seed=SEEDS, heads=HEADS, rows=LENGTHS, columns=LENGTHS, key_tiles=TILES, query_tiles=TILES, layout=LAYOUTS)
@settings(max_examples=6)
def test_a_rectangle_that_every_row_sees(seed, heads, rows, columns, key_tiles, query_tiles, layout):
    if rows == 0 or columns == 0:
        return
    q, k, v = draw_inputs(seed, heads, rows, columns, 16, torch.float32, layout)
    grads = draw_grads(seed, q, layout)
    found = backward(q, k, v, grads, 0, 0, key_tiles, query_tiles, causal=False)
    assert_gradients(found, q, k, v, torch.ones(rows, columns, dtype=torch.bool), *grads)


@given(seed=SEEDS, lengths=st.tuples(LENGTHS, LENGTHS, LENGTHS), j=st.integers(0, 200))
@settings(max_examples=4)
def test_what_no_row_with_a_gradient_sees_has_none(seed, lengths, j):
    anchor, passing, block = lengths
    if anchor + block == 0:
        return
    q, k, v = draw_inputs(seed, (1, 1, 2), anchor + block, sum(lengths), 16, torch.float32)
    row = min(j, anchor + block - 1)
    grads = [torch.zeros_like(x) for x in draw_grads(seed, q)]
    grads[0][:, :, row], grads[1][:, :, row] = 1.0, 1.0
    tiles = Tiles(32, 32, 4, 2, 1)
    grad_q, grad_k, grad_v = backward(q, k, v, grads, anchor, passing, tiles, tiles)
    unseen = ~apb_mask(anchor + block, sum(lengths), anchor, passing)[row]
    assert not grad_k[:, :, unseen].any() and not grad_v[:, :, unseen].any()
    assert not grad_q[:, :, torch.arange(anchor + block) != row].any()
    assert grad_v[:, :, ~unseen].any()


def test_a_second_time_gives_the_same_bits():
    q, k, v = draw_inputs(5, (1, 1, 3), 30, 50, 16, torch.float16)
    grads, tiles = draw_grads(5, q), Tiles(16, 32, 4, 2, 1)
    once, twice = (backward(q, k, v, grads, 20, 20, tiles, tiles) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))


def test_every_element_is_written(monkeypatch):
    q, k, v = draw_inputs(2, (2, 1, 2), 37, 50, 80, torch.float32)
    grads, tiles = draw_grads(2, q), Tiles(32, 16, 4, 2, 1)
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: empty_like(*a, **kw).fill_(torch.nan))
    found = backward(q, k, v, grads, 20, 13, tiles, tiles)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("only", [0, 1])
def test_output_and_lse_have_gradients_of_their_own(only):
    q, k, v = (x.requires_grad_() for x in draw_inputs(4, (1, 1, 2), 9, 12, 16, torch.float32))
    results = masked_attention(q, k, v, anchor_tokens=4, passing_tokens=3, backend="triton")
    grads = draw_grads(4, q)
    found = torch.autograd.grad(results[only], (q, k, v), grads[only])
    alone = [x if i == only else torch.zeros_like(x) for i, x in enumerate(grads)]
    assert_gradients(found, q, k, v, apb_mask(9, 12, 4, 3), *alone)


@pytest.mark.parametrize("wants", ["qkv", "q", "kv"])
def test_the_backend_by_name(wants):
    q, k, v = draw_inputs(4, (1, 1, 2), 9, 12, 16, torch.float32)
    inputs = {"q": q, "k": k, "v": v}
    for name in wants:
        inputs[name].requires_grad_()
    out, lse = masked_attention(**inputs, anchor_tokens=4, passing_tokens=3, backend="triton")
    grads = draw_grads(4, q)
    found = torch.autograd.grad((out, lse), [inputs[name] for name in wants], grads)
    assert_gradients(found, q, k, v, apb_mask(9, 12, 4, 3), *grads, only=wants)


def test_gradients_flow_through_a_merge_of_two_parts():
    """Partial results are weighted by their LSEs, so a gradient that the LSE loses shows here."""
    q, k, v = (x.requires_grad_() for x in draw_inputs(6, (1, 1, 2), 20, 33, 16, torch.float32))
    parts = [
        masked_flash.masked_flash(
            q, k[:, :, span], v[:, :, span], anchor_tokens=0, passing_tokens=0, scale=0.25, causal=causal
        )
        for span, causal in ((slice(0, 13), False), (slice(13, 33), True))
    ]
    out, lse = merge(*(torch.stack(x) for x in zip(*parts, strict=True)))
    grads = draw_grads(6, q)
    found = torch.autograd.grad((out, lse), (q, k, v), grads)
    assert_gradients(found, q, k, v, apb_mask(20, 33, 0, 0), *grads)


def test_the_references_own_gradients():
    q, k, v = (x.double().requires_grad_() for x in draw_inputs(7, (1, 2, 2), 5, 7, 16, torch.float32))
    attend = partial(attention, mask=apb_mask(5, 7, 2, 2))
    assert torch.autograd.gradcheck(lambda *inputs: attend(*(x / 6 for x in inputs)), (q, k, v), fast_mode=True)


def test_as_torch_operators():
    q, k, v = (x.requires_grad_() for x in draw_inputs(3, (1, 1, 2), 9, 12, 16, torch.float32, "tokens_first"))
    torch.library.opcheck(torch.ops.apb.masked_flash.default, (q, k, v, 4, 3, 0.25))
    out, lse = (x.detach() for x in masked_flash.masked_flash(q, k, v, anchor_tokens=4, passing_tokens=3, scale=0.25))
    inputs = (*draw_grads(3, q), *(x.detach() for x in (q, k, v)), out, lse)
    torch.library.opcheck(torch.ops.apb.masked_flash_backward.default, (*inputs, 4, 3, 0.25, True))


def test_traced_whole_it_gives_the_same():
    def loss(q, k, v):
        out, lse = masked_flash.masked_flash(2 * q, k, v, anchor_tokens=4, passing_tokens=3, scale=0.25)
        return out.square().sum() + lse.sum()

    q, k, v = (x.requires_grad_() for x in draw_inputs(8, (1, 1, 2), 9, 12, 16, torch.float32))
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(*(torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (loss, traced)), strict=True):
        torch.testing.assert_close(x, y)


def test_few_rows_of_a_cache_have_no_gradient_and_many_have(monkeypatch):
    monkeypatch.setattr("apb.attend._FEW_ROWS", 16)
    q, k, v = (x.requires_grad_() for x in draw_inputs(9, (1, 1, 1), 60, 70, 16, torch.float32))
    with pytest.raises(RuntimeError, match=r"'triton' has no backward pass here: .* 'reference'"):
        decode_attention(q[:, :, :5], k, v, causal=True, backend="triton")
    out, lse = decode_attention(q, k, v, causal=True, backend="triton")
    grads = draw_grads(9, q)
    found = torch.autograd.grad((out, lse), (q, k, v), grads)
    assert_gradients(found, q, k, v, apb_mask(60, 70, 0, 0), *grads)


def test_no_rows_keep_the_graph():
    q, k, v = (x.requires_grad_() for x in draw_inputs(1, (1, 1, 2), 0, 7, 16, torch.float32))
    out, _ = masked_attention(q, k, v, anchor_tokens=0, passing_tokens=7, backend="triton")
    found = torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    assert out.shape == q.shape and not any(x.any() for x in found)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("lengths", [None, 0])
def test_an_empty_cache_keeps_the_graph(backend, lengths, monkeypatch):
    monkeypatch.setattr("apb.attend._FEW_ROWS", 2)
    q, k, v = draw_inputs(1, (1, 1, 2), 3, 0, 16, torch.float32)
    attend = partial(decode_attention, causal=False, backend=backend)
    if lengths is not None:
        attend = partial(attend, lengths=torch.zeros(1, dtype=torch.int32))
    expected = attend(q, k, v)
    for x in (q, k, v):
        x.requires_grad_()
    if backend == "triton" and lengths is not None:
        with pytest.raises(RuntimeError, match=r"'triton' has no backward pass"):
            attend(q, k, v)
        return
    out, lse = attend(q, k, v)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert (out == 0).all() and (lse == -torch.inf).all() and lse.dtype == torch.float32
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)] and not any(x.any() for x in found)


def test_hopper_says_which_rows_it_takes():
    q, k, v = draw_inputs(1, (1, 1, 1), 300, 290, 64, torch.float16)
    lengths = torch.tensor([290], dtype=torch.int32)
    says = "'hopper' takes more than 256 rows, no lengths, and causal no more rows than keys; got "
    for rows, causal, given_lengths, got in [
        (5, False, None, "5 rows, 290 keys and no lengths"),
        (300, False, lengths, "300 rows, 290 keys and lengths"),
        (300, True, None, "300 rows, 290 keys and no lengths"),
    ]:
        with pytest.raises(ValueError, match=f"{says}{got}: use backend='auto'"):
            decode_attention(q[:, :, :rows], k, v, causal=causal, lengths=given_lengths, backend="hopper")
    with pytest.raises(ValueError, match="'hopper' needs a Hopper GPU"):
        decode_attention(q, k, v, causal=False, backend="hopper")


def test_tiles_are_powers_of_two():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in (16, 64, 80, 128, 192, 256):
            for major in (0, 8, 9, 10):
                for gradient in ("keys", "queries"):
                    tiles = choose_tiles(gradient, dtype, dim, (major, 0), tma=True)
                    assert all(x & (x - 1) == 0 and x >= 16 for x in tiles[:2])
                    assert tiles.tma == (major >= 9 and dtype != torch.float32)


def test_a_gradient_in_any_layout():
    q, k, v = (x.requires_grad_() for x in draw_inputs(10, (1, 1, 2), 9, 12, 16, torch.float32))
    out, _ = masked_attention(q, k, v, anchor_tokens=4, passing_tokens=3, backend="triton")
    ones = torch.ones_like(out)
    by_sum = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)  # an expanded scalar
    for grad in (ones, lay_out(ones, "step_2"), lay_out(ones, "nan_around")):
        for x, y in zip(torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), by_sum, strict=True):
            torch.testing.assert_close(x, y)
