"""Compressors: what they keep is exact, sorted, nested and fair to every head; how they score is their formula."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb import reference
from apb.compress import (
    TRAINING_FREE,
    Candidates,
    Compressor,
    Document,
    KeyNorm,
    MaxPool,
    MeanPool,
    Oracle,
    Projections,
    Random,
    RetainingHead,
    SnapKV,
    no_pool,
    select,
)
from apb.testing.strategies import HEADS, SEEDS, peaked

DIM, ASKED, SCALE = 16, 3, 0.3
ALL = [*TRAINING_FREE, "snapkv-query", "retaining-head"]
TOKENS = st.integers(1, 24)


def make(name, heads, pool=None):
    pooled = {} if pool is None else {"pool": pool}
    if name == "retaining-head":
        generator = torch.Generator().manual_seed(7)
        wide, layers = (heads[0] + 2 * heads[1]) * DIM, 2
        draw = [
            [torch.randn(*shape, generator=generator) for _ in range(layers)] for shape in ((8, wide), (heads[1], 8))
        ]
        return RetainingHead(fc1=tuple(draw[0]), fc2=tuple(draw[1]), **pooled)
    if name.startswith("snapkv"):
        return SnapKV(window=4, voters="query" if name.endswith("query") else "block", **pooled)
    return TRAINING_FREE[name](**pooled)


def candidates(seed, tokens, heads, batch=2):
    """Offer tokens 2 … 2 + tokens of a document whose later blocks hold five more."""
    sizes = {"heads": heads, "dim": DIM, "batch": batch, "dtype": torch.float32}
    q, k, v = peaked(seed, 2 + tokens + 5, **sizes)
    p = peaked(seed + 1, tokens, **sizes)
    mine = slice(2, 2 + tokens)
    return Candidates(
        q=q[:, :, mine],
        k=k[:, :, mine],
        v=v[:, :, mine],
        layer=1,
        block=2,
        scale=SCALE,
        query=peaked(seed + 2, ASKED, **sizes)[0],
        projections=Projections(q=p[0], k=p[1], v=p[2]),
        document=Document(q=q, k=k, start=2, later=2 + tokens),
    )


def map_tensors(c, change):
    """Apply `change(tensor)` to every tensor that the compressor may read."""
    return Candidates(
        q=change(c.q),
        k=change(c.k),
        v=change(c.v),
        layer=c.layer,
        block=c.block,
        scale=c.scale,
        query=change(c.query),
        projections=Projections(q=change(c.projections.q), k=change(c.projections.k), v=change(c.projections.v)),
        document=Document(
            q=change(c.document.q), k=change(c.document.k), start=c.document.start, later=c.document.later
        ),
    )


@pytest.mark.parametrize("name", ALL)
@given(seed=SEEDS, tokens=TOKENS, heads=HEADS, data=st.data())
def test_kept_are_the_best_scores_sorted_by_position_and_gathered(name, seed, tokens, heads, data):
    keep = data.draw(st.integers(0, tokens))
    c, compressor = candidates(seed, tokens, heads), make(name, heads)
    kept = compressor.compress(c, keep)
    scores = compressor.pool(compressor.score(c).float())
    assert kept.indices.shape == (2, heads[1], keep) and kept.k.shape == kept.v.shape == (2, heads[1], keep, DIM)
    assert torch.equal(kept.indices, reference.kept_indices(scores, keep))
    assert (kept.indices.diff(dim=-1) > 0).all()  # sorted and unique
    assert ((kept.indices >= 0) & (kept.indices < tokens)).all()
    for b in range(2):
        for h in range(heads[1]):
            assert torch.equal(kept.k[b, h], c.k[b, h, kept.indices[b, h]])
            assert torch.equal(kept.v[b, h], c.v[b, h, kept.indices[b, h]])


@pytest.mark.parametrize("name", ALL)
@given(seed=SEEDS, tokens=TOKENS, heads=HEADS, data=st.data())
def test_a_larger_budget_keeps_all_that_a_smaller_one_kept(name, seed, tokens, heads, data):
    small = data.draw(st.integers(0, tokens - 1))
    c, compressor = candidates(seed, tokens, heads, batch=1), make(name, heads)
    few, more = (compressor.compress(c, keep).indices for keep in (small, data.draw(st.integers(small + 1, tokens))))
    for h in range(heads[1]):
        assert set(few[0, h].tolist()) < set(more[0, h].tolist())


@given(values=st.lists(st.integers(0, 2), min_size=1, max_size=300), data=st.data())
def test_ties_go_to_the_lowest_position(values, data):
    keep = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep])
    assert select(scores, keep).tolist() == expected
    assert select(torch.stack((scores, -scores)), keep)[0].tolist() == expected


@pytest.mark.parametrize("name", [name for name in ALL if name != "random"])
@given(seed=SEEDS, tokens=TOKENS, heads=HEADS)
def test_batch_items_are_scored_alone(name, seed, tokens, heads):
    c, compressor = candidates(seed, tokens, heads), make(name, heads)
    alone = [compressor.score(map_tensors(c, lambda x, i=i: x[i : i + 1])) for i in range(2)]
    together = compressor.score(c)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5 * float(together.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("random", "retaining-head")])
@given(seed=SEEDS, tokens=TOKENS)
def test_kv_heads_are_scored_alone_with_their_own_query_heads(name, seed, tokens):
    """Other tensors in all other KV heads, and in their query heads, leave a KV head's scores as they were."""
    c, other, compressor = candidates(seed, tokens, (6, 3)), candidates(seed + 9, tokens, (6, 3)), make(name, (6, 3))
    scores = compressor.score(c)
    for h in range(3):
        alike = compressor.score(with_head(c, other, h, kv_heads=3))[:, h]
        torch.testing.assert_close(alike, scores[:, h], atol=1e-5 * float(scores.abs().max()), rtol=1e-5)


def with_head(c, other, h, kv_heads):
    """Return `other` with KV head h of `c` in its place, and that head's query heads."""
    theirs = []
    map_tensors(other, lambda x: theirs.append(x.clone()) or x)
    left = iter(theirs)

    def change(x):
        mixed, group = next(left), x.shape[1] // kv_heads
        mixed[:, h * group : (h + 1) * group] = x[:, h * group : (h + 1) * group]
        return mixed

    return map_tensors(c, change)


def naive_query_aware(c, b, h, t, group):
    question = c.query[b, h * group : (h + 1) * group].double().reshape(-1, DIM).mean(dim=0)
    return float(question @ c.k[b, h, t].double())


def naive_key_norm(c, b, h, t, group):
    return -math.sqrt(sum(float(x) ** 2 for x in c.k[b, h, t]))


def naive_votes(c, b, h, t, group, voters, rows):
    """Sum over voters and the group's heads of softmax; voter i sees the candidates up to `rows[i]`."""
    total = 0.0
    for head in range(h * group, (h + 1) * group):
        for i, last in enumerate(rows):
            logits = [SCALE * float(voters[b, head, i].double() @ k.double()) for k in c.k[b, h, : last + 1]]
            top = max(logits)
            if t <= last:
                total += math.exp(logits[t] - top) / sum(math.exp(x - top) for x in logits)
    return total


def naive_snapkv(c, b, h, t, group):
    tokens = c.k.shape[2]
    return naive_votes(c, b, h, t, group, c.q[:, :, -4:], range(max(0, tokens - 4), tokens))


def naive_snapkv_query(c, b, h, t, group):
    return naive_votes(c, b, h, t, group, c.query, [c.k.shape[2] - 1] * ASKED)


def naive_retaining_head(c, b, h, t, group):
    head = make("retaining-head", (c.q.shape[1], c.k.shape[1]))
    p = c.projections
    x = [float(value) for part in (p.q, p.k, p.v) for heads in part[b, :, t] for value in heads]
    hidden = [sum(w * y for w, y in zip(row, x, strict=True)) for row in head.fc1[c.layer].tolist()]
    hidden = [y / (1 + math.exp(-y)) if y > -700 else 0.0 for y in hidden]
    return sum(w * y for w, y in zip(head.fc2[c.layer][h].tolist(), hidden, strict=True))


def naive_oracle(c, b, h, t, group):
    """True attention mass: exact causal attention of every later row of the document on the candidate."""
    d, total = c.document, 0.0
    for head in range(h * group, (h + 1) * group):
        for i in range(d.later, d.k.shape[2]):
            logits = SCALE * (d.k[b, h, : i + 1].double() @ d.q[b, head, i].double())
            total += float(logits.softmax(dim=0)[d.start + t])
    return total


NAIVE = {
    "query-aware": naive_query_aware,
    "key-norm": naive_key_norm,
    "snapkv": naive_snapkv,
    "snapkv-query": naive_snapkv_query,
    "retaining-head": naive_retaining_head,
    "recency": lambda c, b, h, t, group: float(t),
    "oracle": naive_oracle,
}


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize(("heads", "tokens"), [((4, 2), 7), ((2, 1), 3), ((2, 2), 5)])
def test_scores_are_the_formula(name, heads, tokens):
    c = candidates(11 * tokens, tokens, heads)
    scores = make(name, heads).score(c)
    group = heads[0] // heads[1]
    expected = [[[NAIVE[name](c, b, h, t, group) for t in range(tokens)] for h in range(heads[1])] for b in range(2)]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=2e-5)


def test_scales_and_chunks_have_defaults():
    c = candidates(3, 9, (4, 2))
    assert c.softmax_scale == SCALE and Candidates(q=c.q, k=c.k, v=c.v).softmax_scale == 0.25
    torch.testing.assert_close(Oracle(chunk=2).score(c), Oracle().score(c), atol=1e-6, rtol=1e-6)


@given(seed=SEEDS, layer=st.integers(0, 3), block=st.integers(0, 3))
def test_random_is_the_same_on_every_call_and_differs_elsewhere(seed, layer, block):
    k = torch.zeros(1, 2, 40, DIM)
    here, again, elsewhere = (
        Random(seed=seed).score(Candidates(q=k, k=k, v=k, layer=i, block=block)) for i in (layer, layer, layer + 1)
    )
    assert torch.equal(here, again) and not torch.equal(here, elsewhere)
    other = [Random(seed=seed + 1).score(Candidates(q=k, k=k, v=k, layer=layer, block=block)),
             Random(seed=seed).score(Candidates(q=k, k=k, v=k, layer=layer, block=block + 1))]  # fmt: skip
    assert not any(torch.equal(here, x) for x in other)


@given(seed=SEEDS, tokens=TOKENS, kernel=st.sampled_from([1, 3, 5, 7]))
def test_pooling_looks_half_a_kernel_each_way_and_stops_at_the_edges(seed, tokens, kernel):
    scores = torch.randn(2, 3, tokens, generator=torch.Generator().manual_seed(seed)) - 100  # padding would show
    half = kernel // 2
    windows = [scores[..., max(0, t - half) : t + half + 1] for t in range(tokens)]
    highest, mean = (
        torch.stack([pick(w) for w in windows], dim=-1) for pick in (lambda w: w.amax(-1), lambda w: w.mean(-1))
    )
    assert torch.equal(MaxPool(kernel=kernel)(scores), highest)
    torch.testing.assert_close(MeanPool(kernel=kernel)(scores), mean)
    assert torch.equal(no_pool(scores), scores)


def test_a_kept_token_brings_its_neighbours_along():
    c = candidates(5, 20, (1, 1), batch=1)
    k = torch.full_like(c.k, 10.0)
    k[:, :, 12], c = 0.1, Candidates(q=c.q, k=k, v=c.v)
    assert KeyNorm().compress(c, 5).indices.tolist() == [[[10, 11, 12, 13, 14]]]
    assert KeyNorm(pool=no_pool).compress(c, 2).indices.tolist() == [[[0, 12]]]


@pytest.mark.parametrize("name", ALL)
@given(seed=SEEDS, tokens=st.integers(2, 24), data=st.data())
def test_the_output_moves_by_at_most_twice_the_dropped_mass(name, seed, tokens, data):
    """‖o − õ‖ ≤ 2 · δ · max ‖v‖ with δ the attention mass of the dropped keys."""
    keep = data.draw(st.integers(1, tokens))
    c = candidates(seed, tokens, (2, 1), batch=1)
    q, k, v = c.query.double() / 4, c.k.double(), c.v.double()
    kept = make(name, (2, 1)).compress(c, keep)
    everything = torch.ones(ASKED, tokens, dtype=torch.bool)
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[kept.indices[0, 0]] = True
    whole, lse = reference.attention(q, k, v, everything)
    part, part_lse = reference.attention(q, kept.k.double(), kept.v.double(), everything[:, :keep])
    torch.testing.assert_close(part, reference.attention(q, k, v, everything & mask)[0], atol=1e-9, rtol=0)
    dropped = 1 - torch.exp(part_lse - lse)
    assert ((whole - part).norm(dim=-1) <= 2 * dropped * v.norm(dim=-1).max() + 1e-9).all()


@dataclass(frozen=True, kw_only=True)
class Given(Compressor):
    """A subclass that somebody else wrote: only `score`."""

    scores: torch.Tensor

    def score(self, candidates):
        return self.scores


def test_a_subclass_needs_only_a_score():
    k = torch.randn(1, 1, 4, DIM)
    kept = Given(scores=torch.tensor([[[1.0, 3.0, 2.0, 4.0]]]), pool=no_pool).compress(Candidates(q=k, k=k, v=k), 2)
    assert kept.indices.tolist() == [[[1, 3]]] and torch.equal(kept.k, k[:, :, [1, 3]])
