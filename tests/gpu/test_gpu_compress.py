"""The compressor's kernels on a GPU: selections equal to the sort's, at every size; scores against float64."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import lay_out

from apb.compress import Candidates, KeyNorm, MaxPool, MeanPool, NanWatch, Projections, QueryAware, no_pool
from apb.compress.query_aware import mean_logits
from apb.compress.retaining_head import head_scores
from apb.compress.select import gather, pool_and_select, select
from apb.testing.tolerance import assert_rows_close

pytest.importorskip("triton")
from apb.kernels.retaining_head import retaining_head_scores
from apb.kernels.score import score_keys
from apb.kernels.select import Cut, gather_kept, launch, select_kept

pytestmark = pytest.mark.gpu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = ("dense", "tokens_first", "step_2", "nan_around")
POOLS = (no_pool, MaxPool(), MeanPool(), MaxPool(kernel=3), MeanPool(kernel=3), MaxPool(kernel=11))


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def assert_selected(scores, keep, pool):
    found, nan = pool_and_select(scores, keep, pool, backend="triton")
    truth, also = pool_and_select(scores.cpu(), keep, pool)
    assert torch.equal(found.cpu(), truth), (tuple(scores.shape), keep, pool)
    assert torch.equal(nan.cpu(), also)


@pytest.mark.parametrize("pool", POOLS, ids=["none", "max5", "mean5", "max3", "mean3", "max11"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selects_as_the_sort(pool, dtype):
    for seed, tokens in enumerate((1, 2, 33, 511, 512, 513, 4095, 4097, 16384, 40000)):
        for scores in (
            draw(2, 3, tokens, dtype=dtype, seed=seed),
            (2 * draw(2, 3, tokens, seed=seed)).round().to(dtype),
        ):
            for keep in {1, (tokens + 7) // 8, tokens}:
                assert_selected(scores, keep, pool)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selects_from_any_layout(layout):
    for tokens in (500, 9001):
        assert_selected(lay_out(draw(2, 3, tokens, 1), layout)[..., 0], tokens // 3, MaxPool())
        assert_selected(draw(2, tokens, 3).mT, tokens // 3, MeanPool())


def test_selects_from_a_million_tokens():
    scores = draw(1, 2, 2**20 + 3)
    for x in (scores, scores.round(), torch.zeros_like(scores)):
        for keep in (1, 131072, 2**20):
            assert_selected(x, keep, MaxPool())


@pytest.mark.parametrize("cut", [Cut(128, 4, 2), Cut(512, 4, 32), Cut(1024, 8, 1), Cut(2048, 8, 8)])
def test_selects_with_any_cut(cut):
    for tokens in (5, 3000, 40000):
        scores = (20 * draw(2, 3, tokens)).round()
        for keep in (1, (tokens + 7) // 8, tokens):
            assert torch.equal(launch(scores, keep, 1, False, cut)[0], select(scores, keep)), (tokens, keep)


def test_selects_of_many_heads():
    """More than a launch takes in any but its first dimension."""
    scores = draw(2, 40000, 7)
    assert torch.equal(pool_and_select(scores, 3, no_pool, backend="triton")[0], select(scores, 3))


def test_special_values_have_their_order():
    values = [0.0, -0.0, 2.0**-149, -(2.0**-149), torch.inf, -torch.inf, 3.4e38, -3.4e38, torch.nan, -torch.nan, -1.0]
    scores = torch.tensor(values, device="cuda")[torch.randint(0, 11, (2, 3, 9000), device="cuda")]
    for keep in (1, 1000, 4000, 8999):
        assert_selected(scores, keep, no_pool)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathers_exactly(dtype, layout):
    for tokens, dims, keep in ((33, (16, 16), 5), (1000, (128, 128), 999), (300, (80, 24), 77), (300, (1, 256), 1)):
        k, v = (lay_out(draw(2, 3, tokens, dim, dtype=dtype), layout) for dim in dims)
        indices = torch.randint(0, tokens, (2, 3, keep), device="cuda")
        assert torch.equal(*(gather(k, v, indices, backend=backend) for backend in ("triton", "torch")))


def test_huge_tensors():
    """The last rows lie beyond 2³¹ elements."""
    k = torch.zeros(1, 9, 2**21 - 1, 128, dtype=torch.float16, device="cuda")
    k[0, 8, -3:] = 1
    query = torch.ones(1, 9, 1, 128, dtype=torch.float16, device="cuda")
    scores = mean_logits(query, k, backend="triton")
    indices, _ = pool_and_select(scores, 3, no_pool, backend="triton")
    assert indices[0, 8].tolist() == [2**21 - 4, 2**21 - 3, 2**21 - 2] and indices[0, 7].tolist() == [0, 1, 2]
    assert (gather(k, k, indices, backend="triton")[0, 8] == 1).all()


def assert_query_aware(query, k, layout="dense"):
    found, eager = (mean_logits(*(lay_out(x, layout) for x in (query, k)), backend=b) for b in ("triton", "torch"))
    mean = query.double().unflatten(1, (k.shape[1], -1)).mean(dim=(2, 3))
    truth = (k.double() @ mean[..., None]).squeeze(-1)
    size = float(k.double().norm(dim=-1).max() * mean.norm(dim=-1).max())
    assert_rows_close(found[..., None], truth[..., None], eager=eager[..., None], value_scale=size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_query_aware_scores_equal_the_formula(dtype, layout):
    for query, tokens, dim in ((1, 1, 16), (5, 63, 128), (90, 1000, 80), (64, 16384, 128), (5, 129, 256)):
        drawn = draw(2, 6, query, dim, dtype=dtype), draw(2, 2, tokens, dim, dtype=dtype, seed=1)
        assert_query_aware(*drawn, layout)


def test_query_aware_scores_wait_for_their_mean():
    """A long question and few keys, again and again: a mean that came too late would be the one before it."""
    questions = [draw(1, 32, 3000, 128, dtype=torch.bfloat16, seed=i) for i in range(20)]
    k = draw(1, 8, 100, 128, dtype=torch.bfloat16)
    wanted = [mean_logits(query, k, backend="torch") for query in questions]
    graph, given = torch.cuda.CUDAGraph(), questions[0].clone()
    mean_logits(given, k, backend="triton")
    with torch.cuda.graph(graph):
        replayed = mean_logits(given, k, backend="triton")
    found = [mean_logits(query, k, backend="triton") for query in questions]
    for query, scores, truth in zip(questions, found, wanted, strict=True):
        given.copy_(query)
        graph.replay()
        assert torch.equal(scores, replayed)
        torch.testing.assert_close(scores, truth, atol=1e-5, rtol=1e-5)


def test_query_aware_scores_of_many_heads():
    """More than a launch takes in any but its first dimension."""
    assert_query_aware(draw(2, 40000, 2, 16), draw(2, 40000, 7, 16, seed=1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_retaining_head_equals_the_formula(dtype, layout):
    for heads, tokens, dim, width in (((1, 1), 1, 16, 8), ((9, 3), 333, 64, 100), ((4, 2), 1000, 80, 256),
                                      ((32, 8), 300, 128, 1024), ((6, 2), 129, 256, 512)):  # fmt: skip
        inputs = (heads[0] + 2 * heads[1]) * dim
        parts = [draw(2, h, tokens, dim, dtype=dtype, seed=i) for i, h in enumerate((heads[0], heads[1], heads[1]))]
        fc1, fc2 = (3 * draw(width, inputs) / inputs**0.5).to(dtype), (draw(heads[1], width) / width**0.5).to(dtype)
        q, k, v = (lay_out(part, layout) for part in parts)
        found, eager = (head_scores(Projections(q=q, k=k, v=v), fc1, fc2, backend=b) for b in ("triton", "torch"))
        x = torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=-1).double()
        hidden = F.silu(F.linear(x, fc1.double()))
        size = float(hidden.norm(dim=-1).max() * fc2.double().norm(dim=-1).max())
        truth = F.linear(hidden, fc2.double())
        found, eager = (scores.to(dtype).mT for scores in (found, eager))
        assert_rows_close(found, truth, eager=eager, value_scale=size)


def test_the_same_scores_every_time():
    """Shares are added in a fixed order."""
    q, k, v = (draw(1, heads, 2000, 128, dtype=torch.bfloat16, seed=heads) for heads in (32, 8, 8))
    fc1, fc2 = draw(1024, 6144, dtype=torch.bfloat16), draw(8, 1024, dtype=torch.bfloat16)
    found = [head_scores(Projections(q=q, k=k, v=v), fc1, fc2) for _ in range(5)]
    assert all(torch.equal(found[0], again) for again in found[1:])


def test_compress_waits_for_nothing_with_a_watch():
    k = draw(1, 2, 5000, 64, dtype=torch.bfloat16)
    query = draw(1, 8, 3, 64, dtype=torch.bfloat16)
    given = {"q": draw(1, 8, 5000, 64, dtype=torch.bfloat16), "v": k, "query": query}
    watch, bad = NanWatch(), k.clone()
    bad[0, 1, 77, 5] = torch.nan
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = [QueryAware().compress(Candidates(k=keys, layer=layer, **given), 700, watch=watch)
                for layer, keys in enumerate((k, bad, k))]  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(kept[0].indices, kept[2].indices) and kept[1].indices.max() < 5000
    with pytest.raises(ValueError, match="QueryAware gave NaN in layer 1, block 0"):
        watch.check()
    with pytest.raises(ValueError, match="KeyNorm gave NaN in layer 0, block 0"):
        KeyNorm().compress(Candidates(k=bad, **given), 700)


def test_the_path_runs_in_a_graph():
    k, query = draw(1, 8, 16384, 128, dtype=torch.bfloat16), draw(1, 32, 3, 128, dtype=torch.bfloat16)

    def path():
        indices, _ = pool_and_select(mean_logits(query, k), 2048, MaxPool())
        return gather(k, k, indices)

    truth = path()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = path()
    graph.replay()
    assert torch.equal(found, truth)


def test_custom_ops_are_well_formed():
    k, indices = draw(1, 2, 16, 20).mT, torch.zeros(1, 2, 3, dtype=torch.int64, device="cuda")
    torch.library.opcheck(select_kept, (k[..., 0], 3, 5, False))
    torch.library.opcheck(gather_kept, (k, k, indices))
    torch.library.opcheck(score_keys, (k, draw(1, 3, 4, 16).transpose(1, 2)))
    torch.library.opcheck(retaining_head_scores, (k, k, k, draw(8, 96), draw(2, 8)))
