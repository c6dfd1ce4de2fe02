"""The compressor's kernels under the interpreter: selections exactly the reference's, scores close to float64's."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import LAYOUTS, SEEDS, lay_out
from hypothesis import given, settings
from hypothesis import strategies as st

from apb import reference
from apb.compress import Candidates, KeyNorm, MaxPool, MeanPool, NanWatch, Projections, no_pool
from apb.compress.query_aware import mean_logits
from apb.compress.retaining_head import head_scores
from apb.compress.select import gather, pool_and_select, select
from apb.testing.tolerance import assert_rows_close

pytest.importorskip("triton")
from apb.kernels import retaining_head
from apb.kernels.masked_flash import tma_can_read
from apb.kernels.retaining_head import Tiles, retaining_head_scores
from apb.kernels.score import score_keys
from apb.kernels.select import Cut, choose_cut, gather_kept, launch, select_kept

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")

POOLS = st.sampled_from([no_pool, MaxPool(kernel=5), MaxPool(kernel=3), MeanPool(kernel=5), MaxPool(kernel=11)])
DTYPES = st.sampled_from([torch.float32, torch.float16])


def draw_scores(seed, tokens, distinct, rows=(1, 1)):
    """Draw scores with few distinct values, or hardly two alike."""
    scores = torch.randn(*rows, tokens, generator=torch.Generator().manual_seed(seed))
    return (scores * distinct / 3).round() if distinct else scores * 1e3


@given(seed=SEEDS, tokens=st.sampled_from([2, 5, 130, 512, 700]), distinct=st.sampled_from([0, 1, 5]), pool=POOLS,
       dtype=DTYPES, data=st.data())  # fmt: skip
@settings(max_examples=12)
def test_selects_as_the_reference(seed, tokens, distinct, pool, dtype, data):
    """Also where a score has NaN beside it in memory."""
    keep = data.draw(st.integers(1, tokens))
    scores = lay_out(draw_scores(seed, tokens, distinct)[..., None].to(dtype), "nan_around")[..., 0]
    indices, nan = pool_and_select(scores, keep, pool, backend="triton")
    assert indices.dtype == torch.int64 and not nan.any()
    assert torch.equal(indices, reference.kept_indices(pool(scores.float()), keep))


@given(seed=SEEDS, tokens=st.sampled_from([3, 64, 300]), distinct=st.sampled_from([0, 2]),
       width=st.sampled_from([1, 5]), parts=st.sampled_from([1, 2, 8]), data=st.data())  # fmt: skip
@settings(max_examples=8)
def test_selects_as_the_reference_in_many_sweeps_and_parts(seed, tokens, distinct, width, parts, data):
    """Windows and ties go on over the edges; the last parts may have few tokens or none."""
    scores, keep = draw_scores(seed, tokens, distinct), data.draw(st.integers(1, tokens))
    pooled = MaxPool(kernel=width)(scores)
    assert torch.equal(launch(scores, keep, width, False, Cut(64, 2, parts))[0], reference.kept_indices(pooled, keep))


def test_whatever_memory_held_before(monkeypatch):
    """A part finds its own keys and histograms; NaN in any part is the head's."""
    scores = draw_scores(0, 130, 0, rows=(1, 3))
    scores[0, 1, 0], scores[0, 2, 129] = torch.nan, torch.nan
    truth = select(scores, 33)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(2**30 + 1))
    indices, nans = launch(scores, 33, 1, False, Cut(32, 1, 4))
    assert torch.equal(indices, truth) and nans.tolist() == [[False, True, True]]


def test_counts_the_most_tokens():
    """Half of them are higher than the others, and of these all but the last one are kept."""
    scores = (torch.arange(2**21 - 1) % 2).float()[None, None]
    found = launch(scores, 2**21 - 2, 1, False, Cut(16384, 4, 16))[0]
    assert torch.equal(found[0, 0], torch.arange(2**21 - 2))


def test_a_full_sweep_of_ties_fills_its_fields():
    """All of 16384 tokens are equal, and the tie goes on in the next sweep or part."""
    scores = torch.zeros(1, 1, 16384 + 40)
    scores[..., 3] = 1
    for keep, parts in ((16384, 1), (16390, 2)):
        assert torch.equal(launch(scores, keep, 1, False, Cut(16384, 4, parts))[0], select(scores, keep))


def test_how_a_cut_grows():
    cuts = {tokens: choose_cut(tokens).parts for tokens in (1, 1024, 1025, 4096, 5000, 65536, 2**21 - 1)}
    assert cuts == {1: 1, 1024: 1, 1025: 2, 4096: 4, 5000: 8, 65536: 16, 2**21 - 1: 16}


def test_special_values_have_their_order():
    tiny, huge = 2.0**-149, 3.4e38
    values = [0.0, -0.0, tiny, -tiny, torch.inf, -torch.inf, huge, -huge, -0.0, 0.0, 1.0, torch.nan, -torch.nan, -1.0]
    scores = torch.tensor([[values, values[::-1]]])
    for keep in range(1, len(values) + 1, 2):
        indices, nan = pool_and_select(scores, keep, no_pool, backend="triton")
        assert torch.equal(indices, select(scores, keep)) and nan.all()
    assert pool_and_select(scores[..., :11], 1, no_pool, backend="triton")[1].tolist() == [[False, True]]


@given(seed=SEEDS, layout=LAYOUTS, keep=st.integers(0, 33), dims=st.sampled_from([(16, 16), (80, 24), (1, 64)]),
       dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))  # fmt: skip
@settings(max_examples=12)
def test_gathers_exactly(seed, layout, keep, dims, dtype):
    generator = torch.Generator().manual_seed(seed)
    k, v = (lay_out(torch.randn(2, 3, 33, dim, generator=generator).to(dtype), layout) for dim in dims)
    indices = torch.randint(0, 33, (2, 3, keep), generator=generator)
    # Rows are only moved, so their bits may be moved as another type, where the interpreter has no bfloat16.
    bits = [x.view(torch.float16) if dtype == torch.bfloat16 else x for x in (k, v)]
    assert torch.equal(gather(*bits, indices, backend="triton"), gather(*bits, indices, backend="torch"))


@given(seed=SEEDS, layouts=st.tuples(LAYOUTS, LAYOUTS), sizes=st.sampled_from([(1, 1), (3, 33), (5, 200), (100, 33)]),
       dim=st.sampled_from([16, 80, 128]), dtypes=st.tuples(DTYPES, DTYPES))  # fmt: skip
@settings(max_examples=12)
def test_query_aware_scores_equal_the_formula(seed, layouts, sizes, dim, dtypes):
    """Also where the question's vectors, or the keys, have NaN beside them in memory."""
    generator = torch.Generator().manual_seed(seed)
    query, k = (
        torch.randn(2, heads, n, dim, generator=generator).to(dtype)
        for heads, n, dtype in zip((6, 2), sizes, dtypes, strict=True)
    )
    found = mean_logits(lay_out(query, layouts[0]), lay_out(k, layouts[1]), backend="triton")
    mean = query.double().unflatten(1, (2, 3)).mean(dim=(2, 3))
    truth = (k.double() @ mean[..., None]).squeeze(-1)
    eager = mean_logits(query, k, backend="torch")
    assert found.dtype == torch.float32
    size = float(k.double().norm(dim=-1).max() * mean.norm(dim=-1).max())
    assert_rows_close(found[..., None], truth[..., None], eager=eager[..., None], value_scale=size)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(1, 5, 3, 16), (1, 4, 3, 8), (2, 4, 3, 16), (4, 3, 16)])
def test_query_aware_scores_refuse_what_does_not_belong_together(backend, shape):
    with pytest.raises(ValueError, match=r"query, k: expected .* got \[.*\] and \[1, 2, 9, 16\]"):
        mean_logits(torch.randn(shape), torch.randn(1, 2, 9, 16), backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_query_aware_scores_of_nothing(backend):
    query, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 9, 16)
    assert mean_logits(query, k[:, :, :0], backend=backend).shape == (1, 2, 0)
    assert mean_logits(query[:0], k[:0], backend=backend).shape == (0, 2, 9)
    assert mean_logits(query[:, :, :0], k, backend=backend).isnan().all()  # no question has no mean


def head_case(seed, heads, tokens, dim, width, dtype, layout="tokens_first"):
    """Draw projections and a layer's weights; compute the truth, the eager scores, and the size of what they sum."""
    (q_heads, kv_heads), generator = heads, torch.Generator().manual_seed(seed)
    inputs = (q_heads + 2 * kv_heads) * dim
    parts = [torch.randn(2, h, tokens, dim, generator=generator).to(dtype) for h in (q_heads, kv_heads, kv_heads)]
    fc1 = (3 * torch.randn(width, inputs, generator=generator) / inputs**0.5).to(dtype)
    fc2 = (torch.randn(kv_heads, width, generator=generator) / width**0.5).to(dtype)
    q, k, v = (lay_out(part, layout) for part in parts)
    x = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=-1)
    hidden = F.silu(F.linear(x.double(), fc1.double()))
    truth, eager = F.linear(hidden, fc2.double()).mT, F.linear(F.silu(F.linear(x, fc1)), fc2).mT
    size = float(hidden.norm(dim=-1).max() * fc2.double().norm(dim=-1).max())
    return (q, k, v, fc1, fc2), truth, eager, size


def assert_scores(found, truth, eager, size):
    """Compare token by token: a row is one token's scores for all heads."""
    rows = [x.transpose(1, 2) for x in (found.to(eager.dtype), truth, eager)]
    assert_rows_close(rows[0], rows[1], eager=rows[2], value_scale=size)


@given(seed=SEEDS, heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]), tokens=st.sampled_from([1, 64, 70]),
       dim=st.sampled_from([16, 64, 80]), width=st.sampled_from([8, 64, 100]), dtype=DTYPES, layout=LAYOUTS,
       tma=st.booleans())  # fmt: skip
@settings(max_examples=8)
def test_a_retaining_head_equals_the_formula(seed, heads, tokens, dim, width, dtype, layout, tma):
    inputs, truth, eager, size = head_case(seed, heads, tokens, dim, width, dtype, layout)
    tma = tma and all(map(tma_can_read, inputs[:4]))
    found = retaining_head.launch(*inputs, Tiles(64, 64, 64, 4, 2, tma))
    assert found.dtype == torch.float32 and found.shape == truth.shape
    assert_scores(found, truth, eager, size)


def test_a_retaining_head_by_either_backend():
    inputs, truth, eager, size = head_case(0, (4, 2), 37, 16, 40, torch.float32)
    q, k, v, fc1, fc2 = inputs
    projections = Projections(q=q, k=k, v=v)
    found, plain = (head_scores(projections, fc1, fc2, backend=backend) for backend in ("triton", "torch"))
    assert_scores(found, truth, eager, size)
    assert torch.equal(plain, eager)
    assert head_scores(Projections(q=q[:, :, :0], k=k[:, :, :0], v=v[:, :, :0]), fc1, fc2).shape == (2, 2, 0)


def test_a_watch_says_later_which_layer_gave_nan_first():
    k = torch.randn(1, 2, 9, 16)
    bad = k.clone()
    bad[0, 1, 4] = torch.nan
    watch = NanWatch()
    for layer, keys in enumerate((k, bad, k, bad, k)):
        kept = KeyNorm().compress(Candidates(q=k, k=keys, v=k, layer=layer, block=3), 4, watch=watch)
        assert kept.indices.shape == (1, 2, 4)
    with pytest.raises(ValueError, match="scores: KeyNorm gave NaN in layer 1, block 3; look for NaN or infinite"):
        watch.check()
    watch.check()  # it forgets what it has said
    KeyNorm().compress(Candidates(q=k, k=k, v=k), 4, watch=watch)
    watch.check()


def test_a_watch_takes_notes_of_any_shape():
    shapes = [(1, 2), (1, 2), (1, 2)], [(1, 2), (1, 4), (3,)], [(), (), ()], [(0, 2)] * 3
    for some in shapes:
        watch = NanWatch()
        for number, shape in enumerate(some):
            watch.note(f"layer {number}", torch.full(shape, number > 0))
        if torch.Size(some[0]).numel():
            with pytest.raises(ValueError, match="scores: layer 1; look"):
                watch.check()
        watch.check()


def test_a_message_is_both_side_by_side():
    k, v = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 24)
    kept = KeyNorm().compress(Candidates(q=k, k=k, v=v), 4)
    assert torch.equal(torch.cat((kept.k, kept.v), dim=-1), kept.message)
    assert kept.k.shape[-1] == 16 and kept.v.shape[-1] == 24


def test_nothing_to_select():
    for shape, keep in (((1, 2, 5), 0), ((0, 2, 5), 3)):
        indices, nan = pool_and_select(torch.zeros(shape), keep, no_pool, backend="triton")
        assert indices.shape == (*shape[:2], keep) and nan.shape == shape[:2]


def test_custom_ops_are_well_formed():
    k, indices = torch.randn(1, 2, 16, 20).mT, torch.zeros(1, 2, 3, dtype=torch.int64)
    torch.library.opcheck(select_kept, (k[..., 0], 3, 5, False))
    torch.library.opcheck(gather_kept, (k, k, indices))
    torch.library.opcheck(score_keys, (k, torch.randn(1, 3, 4, 16).transpose(1, 2)))
    torch.library.opcheck(retaining_head_scores, (k, k, k, torch.randn(8, 96), torch.randn(2, 8)))


def test_errors():
    scores = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="keep: expected 0 to 8, the number of scores, got 9"):
        pool_and_select(scores, 9, no_pool)
    with pytest.raises(ValueError, match="backend must be auto, torch or triton, got 'cuda'"):
        pool_and_select(scores, 3, no_pool, backend="cuda")
    with pytest.raises(
        ValueError, match=r"takes float16, bfloat16 and float32, got torch.float64; use backend='torch'"
    ):
        pool_and_select(scores.double(), 3, no_pool, backend="triton")
    with pytest.raises(ValueError, match=r"floats \[batch, heads, tokens\], got torch.float32 \[5\]"):
        pool_and_select(scores[0, 0, :5], 3, no_pool)
    with pytest.raises(ValueError, match=r"keep: expected 0 to .* got 2.5"):
        pool_and_select(scores, 2.5, no_pool)
    assert pool_and_select(scores[..., :0], 0, MaxPool())[0].shape == (*scores.shape[:2], 0)
    with pytest.raises(ValueError, match="has no backward pass"):
        pool_and_select(scores.clone().requires_grad_(), 3, no_pool, backend="triton")
    with pytest.raises(ValueError, match="bfloat16 wrongly under TRITON_INTERPRET=1"):
        pool_and_select(scores.bfloat16(), 3, no_pool, backend="triton")
    with pytest.raises(ValueError, match="takes up to 2097151 tokens, got 2097152"):
        pool_and_select(torch.zeros(1, 1, 2**21), 3, no_pool, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_cannot_be_gathered(backend):
    k, v = torch.zeros(1, 2, 9, 16), torch.zeros(1, 2, 9, 24)
    indices = torch.zeros(1, 2, 3, dtype=torch.int64)
    for arguments, says in [
        ((k, v.half(), indices), r"k, v: expected one dtype, got torch.float32 and torch.float16; convert"),
        ((k, v[:, :, :8], indices), r"as many tokens, got \[1, 2, 9, 16\] and \[1, 2, 8, 24\]"),
        ((k[0], v[0], indices), r"k, v: expected \[batch, heads, tokens, dim\]"),
        ((k, v, indices.int()), r"indices: expected int64 \[batch 1, heads 2, kept\], got torch.int32 \[1, 2, 3\]"),
        ((k, v, indices[:, :1]), r"got torch.int64 \[1, 1, 3\]; take those that select returns"),
        ((k, v, indices.expand(2, 2, 3)), r"got torch.int64 \[2, 2, 3\]"),
        ((k, v, indices[0]), r"got torch.int64 \[2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            gather(*arguments, backend=backend)
