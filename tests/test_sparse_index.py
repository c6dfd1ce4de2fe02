"""What a sparse index lists, against sets and loops in plain Python that share nothing with the builders."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.attend import AShape, BlockSparse, VerticalSlash, sparse_attention
from apb.attend.patterns import block_scores, vertical_slash_scores
from apb.attend.sparse_index import block_index, slash_index, top_indices
from apb.context import Context, Trace
from apb.methods.minference import MInference
from apb.reference import attention
from apb.testing.strategies import SEEDS, peaked
from apb.testing.tolerance import assert_attention

TOKENS = st.sampled_from([1, 2, 63, 64, 65, 127, 130, 200, 333])
HEADS = st.sampled_from([(1, 1), (4, 2), (3, 1)])


def draw_lists(seed, tokens, slash, vertical, heads=2):
    """Draw offsets with 0 among them and columns, both ascending, for each of `heads` heads."""
    generator = torch.Generator().manual_seed(seed)
    slash, vertical = min(slash, tokens), min(vertical, tokens)
    offsets, columns = [], []
    for _ in range(heads):
        offsets.append([0, *sorted((1 + torch.randperm(tokens - 1, generator=generator)[: slash - 1]).tolist())])
        columns.append(sorted(torch.randperm(tokens, generator=generator)[:vertical].tolist()))
    return offsets, columns


def greedy_cover(offsets):
    """Distances at which tiles begin: the nearest needed one that no tile covers, again and again."""
    left = {w for s in offsets for w in range(s - 63, s + 1)}
    tiles = []
    while left:
        tiles.append(min(left))
        left -= set(range(tiles[-1], tiles[-1] + 64))
    return tiles


def seen_by(row, tiles, columns):
    """Columns that a row sees."""
    first = row // 64 * 64
    seen = {first - w for start in tiles for w in range(start, start + 64)}
    return {c for c in seen if 0 <= c <= row} | {c for c in columns if c < first}


@given(seed=SEEDS, tokens=TOKENS, slash=st.integers(1, 400), vertical=st.sampled_from([0, 1, 5, 40, 400]))
def test_slashes_are_covered_greedily(seed, tokens, slash, vertical):
    offsets, columns = draw_lists(seed, tokens, slash, vertical)
    index = slash_index(torch.tensor(offsets)[None], torch.tensor(columns, dtype=torch.int64)[None], tokens)
    mask = index.mask()
    assert index.columns[0].tolist() == columns
    for head in range(2):
        tiles = greedy_cover(offsets[head])
        farthest = 64 * ((tokens - 1) // 64)
        reachable = [w for w in tiles if w <= farthest]
        assert index.tiles[0, head, 0, : len(reachable)].tolist() == reachable
        table = {w for start in tiles for w in range(start, start + 64)}
        assert index.covered[0, head].tolist() == [int(w in table) for w in range(1, farthest + 1)]
        for tile in range(index.tile_counts.shape[2]):
            assert index.tile_counts[0, head, tile] == sum(w <= 64 * tile for w in tiles)
            assert index.column_counts[0, head, tile] == sum(c < 64 * tile for c in columns[head])
        for row in range(tokens):
            assert set(mask[0, head, row].nonzero()[:, 0].tolist()) == seen_by(row, tiles, columns[head])
            assert all(mask[0, head, row, row - s] for s in offsets[head] if s <= row)


@given(seed=SEEDS, tokens=TOKENS, slash=st.integers(1, 400), vertical=st.sampled_from([0, 1, 5, 40, 400]))
def test_every_pair_is_computed_once(seed, tokens, slash, vertical):
    """What the kernel takes up — tiles, then columns that the table does not cover — is the mask, without repeats."""
    offsets, columns = draw_lists(seed, tokens, slash, vertical, heads=1)
    index = slash_index(torch.tensor(offsets)[None], torch.tensor(columns, dtype=torch.int64)[None], tokens)
    mask = index.mask()[0, 0]
    for row in range(tokens):
        tile, first = row // 64, row // 64 * 64
        listed = index.tiles[0, 0, 0, : index.tile_counts[0, 0, tile]].tolist()
        taken = [c for w in listed for c in range(first - w - 63, first - w + 1) if 0 <= c <= row]
        gathered = index.columns[0, 0, : index.column_counts[0, 0, tile]].tolist()
        taken += [c for c in gathered if not index.covered[0, 0, first - c - 1]]
        assert sorted(taken) == mask[row].nonzero()[:, 0].tolist()


@given(seed=SEEDS, tokens=TOKENS, heads=HEADS, batch=st.sampled_from([1, 2]), vertical=st.integers(1, 400),
       slash=st.integers(1, 400), blocks=st.integers(1, 8), local=st.integers(1, 400))  # fmt: skip
def test_pairs_are_the_masks(seed, tokens, heads, batch, vertical, slash, blocks, local):
    q, k, _ = peaked(seed, tokens, heads=heads, batch=batch)
    patterns = (
        VerticalSlash(vertical=vertical, slash=slash),
        AShape(sink=vertical, local=local),
        BlockSparse(blocks=blocks),
    )
    for pattern in patterns:
        index = pattern.index(q.float(), k.float())
        mask = index.mask()
        assert mask.shape == (batch, heads[0], tokens, tokens)
        assert mask.diagonal(dim1=2, dim2=3).all() and not mask.triu(1).any()  # no empty row, none sees ahead
        assert torch.equal(index.pairs(), mask.sum(dim=(2, 3)))
        expected = [int(n) / (tokens * (tokens + 1) / 2) for n in mask.sum(dim=(2, 3)).flatten()]
        assert index.density().flatten().tolist() == pytest.approx(expected, rel=1e-12)
        start = 64 * (tokens // 128)
        assert torch.equal(index.mask(start, tokens), mask[:, :, start:])


@given(seed=SEEDS, tokens=TOKENS, heads=HEADS, scale=st.sampled_from([None, 0.3]))
@settings(max_examples=12)
def test_scores_by_column_and_diagonal(seed, tokens, heads, scale):
    q, k, _ = peaked(seed, tokens, heads=heads)
    vertical, slash = vertical_slash_scores(q.float(), k.float(), scale)
    size = 1 / math.sqrt(16) if scale is None else scale
    for head in range(heads[0]):
        columns, offsets = [0.0] * tokens, [0.0] * tokens
        for row in range(max(0, tokens - 64), tokens):
            keys = k[0, head * heads[1] // heads[0], : row + 1]
            for column, share in enumerate(torch.softmax(size * keys @ q[0, head, row], dim=0).tolist()):
                columns[column] += share
                offsets[row - column] += share
        assert vertical[0, head].tolist() == pytest.approx(columns, abs=1e-3)
        assert slash[0, head].tolist() == pytest.approx(offsets, abs=1e-3)


@given(seed=SEEDS, tokens=TOKENS, vertical=st.integers(1, 400), slash=st.integers(1, 400))
def test_the_heaviest_are_chosen_and_the_forced_ones(seed, tokens, vertical, slash):
    q, k, _ = (x.float() for x in peaked(seed, tokens))
    index = VerticalSlash(vertical=vertical, slash=slash).index(q, k)
    column_scores, offset_scores = vertical_slash_scores(q, k)
    mask = index.mask()
    for head in range(4):
        for scores, budget, forced in ((column_scores, vertical, 30), (offset_scores, slash, 100)):
            ranked = sorted(range(tokens), key=lambda i: (i >= forced, -float(scores[0, head, i]) * (i >= forced), i))
            chosen = sorted(ranked[: min(budget, tokens)])
            if scores is column_scores:
                assert index.columns[0, head].tolist() == chosen
            else:
                last = mask[0, head, -1]
                assert all(last[tokens - 1 - offset] for offset in chosen)
                assert greedy_cover(chosen)[: index.tile_counts[0, head, -1]] == (
                    index.tiles[0, head, 0, : index.tile_counts[0, head, -1]].tolist()
                )


@given(seed=SEEDS, tokens=TOKENS, heads=HEADS, blocks=st.integers(1, 8))
def test_blocks_are_those_with_the_best_means(seed, tokens, heads, blocks):
    q, k, _ = (x.float() for x in peaked(seed, tokens, heads=heads))
    index, scores = BlockSparse(blocks=blocks).index(q, k), block_scores(q, k)
    mask = index.mask()
    for head in range(heads[0]):
        for tile in range(-(-tokens // 64)):
            means = [k[0, head * heads[1] // heads[0], 64 * j : 64 * (j + 1)].mean(0) for j in range(tile + 1)]
            query = q[0, head, 64 * tile : 64 * (tile + 1)].mean(0)
            expected = [float(query @ mean) / 4 for mean in means]
            assert scores[0, head, tile, : tile + 1].tolist() == pytest.approx(expected, abs=1e-4)
            found = scores[0, head, tile, :tile].tolist()
            chosen = {tile, *sorted(range(tile), key=lambda j: (-found[j], j))[: blocks - 1]}
            row = mask[0, head, min(64 * tile + 63, tokens - 1)]
            assert {int(c) // 64 for c in row.nonzero()[:, 0]} == chosen


@given(seed=SEEDS, tokens=TOKENS, heads=HEADS, extra=st.sampled_from([0, 1, 1000]))
def test_all_selected_is_causal_attention(seed, tokens, heads, extra):
    q, k, v = peaked(seed, tokens, heads=heads)
    budget, causal = tokens + extra, torch.ones(tokens, tokens, dtype=torch.bool).tril()
    truth = attention(q, k, v, causal)
    for pattern in (
        VerticalSlash(vertical=1, slash=budget),
        VerticalSlash(vertical=budget, slash=1),
        AShape(sink=budget, local=1),
        AShape(sink=1, local=budget),
        BlockSparse(blocks=budget),
    ):
        index = pattern.index(q.float(), k.float())
        assert (index.density() == 1).all()
        out, lse = sparse_attention(q, k, v, index, backend="reference")
        torch.testing.assert_close(out, truth[0])
        torch.testing.assert_close(lse, truth[1].float())


@given(seed=SEEDS, size=st.integers(1, 50), keep=st.integers(1, 50))
def test_ties_go_to_the_lowest_place(seed, size, keep):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (3, size), generator=generator).float()
    scores[0, ::3], scores[1, ::4], scores[2, ::5] = torch.inf, -torch.inf, -0.0
    keep = min(keep, size)
    found = top_indices(scores, keep).tolist()
    for row, chosen in zip(scores.tolist(), found, strict=True):
        assert chosen == sorted(sorted(range(size), key=lambda i: (-row[i], i))[:keep])


@given(seed=SEEDS, tokens=TOKENS, heads=HEADS, dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       bound=st.sampled_from([1, 2**24]))  # fmt: skip
@settings(max_examples=15)
def test_the_cpu_backend(seed, tokens, heads, dtype, bound):
    q, k, v = peaked(seed, tokens, heads=heads, dtype=dtype)
    for pattern in (VerticalSlash(vertical=20, slash=90), AShape(sink=3, local=70), BlockSparse(blocks=2)):
        index = pattern.index(q, k)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("apb.attend.sparse._MASK_ELEMENTS", bound)
            out, lse = sparse_attention(q, k, v, index, backend="sdpa")
        # PyTorch's quick CPU exponential.
        assert_attention(out, lse, q, k, v, index.mask(), lse_atol=1e-4 if dtype == torch.bfloat16 else 2e-5)


def test_block_lists_in_any_order():
    index = block_index(torch.tensor([[[[0, 1], [1, 0], [2, 0]]]]), 150)
    assert index.tiles[0, 0].tolist()[1:] == [[-63, 1], [-63, 65]]
    assert index.tile_counts.tolist() == [[[1, 2, 2]]]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VerticalSlash(vertical=0), "vertical: VerticalSlash takes an integer ≥ 1, got 0"),
        (lambda: AShape(local=2.5), "local: AShape takes an integer ≥ 1, got 2.5"),
        (lambda: BlockSparse(blocks=True), "blocks: BlockSparse takes an integer ≥ 1, got True"),
        (lambda: MInference(pattern="a-shape"), "pattern: expected a Pattern"),
        (lambda: MInference(dense_below=-1), "dense_below: expected an integer ≥ 0, got -1"),
        (lambda: MInference().plan(tokens=9, hosts=2), "hosts: MInference runs on one host, got 2"),
    ],
)
def test_errors_of_settings(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_errors_of_an_index_for_other_tensors():
    q, k, v = peaked(0, 70, dtype=torch.float32)
    index = AShape().index(q[:, :2], k)
    with pytest.raises(ValueError, match=r"made for batch, query heads, rows and columns \[1, 2, 70, 70\]; q and k"):
        sparse_attention(q, k, v, index)
    with pytest.raises(ValueError, match="backend must be one of auto, reference, sdpa, triton; got 'flex'"):
        sparse_attention(q, k, v, index, backend="flex")


def attend(method, q, k, v, layer=0):
    """Run one layer of a method on one host; return its output and its trace."""
    trace = Trace(counted=True, keep_indices=True)
    plan, host = method.plan(tokens=q.shape[2], hosts=1), SimpleNamespace(rank=0, world_size=1)
    context = Context(plan, host, layer=layer, trace=trace)
    return method.attend(q, k, v, context), trace


@pytest.mark.parametrize("other", [VerticalSlash(vertical=40, slash=100), BlockSparse(blocks=2)])
def test_the_method_groups_heads_by_pattern_and_counts(other):
    q, k, v = peaked(1, 200)
    one, two = AShape(sink=2, local=3), other
    method = MInference(pattern=((one,) * 4, (one, two, one, two)), dense_below=0)
    out, trace = attend(method, q, k, v, layer=1)
    masks = [p.index(q, k).mask()[:, [head]] for head, p in enumerate(method.pattern[1])]
    torch.testing.assert_close(out, attention(q, k, v, torch.cat(masks, dim=1))[0])
    assert trace.pairs == {1: int(sum(mask.sum() for mask in masks))}
    assert torch.equal(trace.indices[1].mask(), torch.cat(masks, dim=1))
    whole, _ = attend(MInference(pattern=two, dense_below=0), q, k, v)
    torch.testing.assert_close(whole[:, 1], out[:, 1])
    with pytest.raises(ValueError, match=r"layer 2 has 4 query heads; patterns are given for \[4, 4\]"):
        attend(method, q, k, v, layer=2)


def test_the_method_is_exact_on_short_documents():
    q, k, v = peaked(2, 200)
    out, trace = attend(MInference(pattern=AShape(sink=1, local=1), dense_below=201), q, k, v)
    torch.testing.assert_close(out, attention(q, k, v, torch.ones(200, 200, dtype=torch.bool).tril())[0])
    assert trace.pairs == {0: 4 * 200 * 201 // 2} and not trace.indices


def test_an_entry_is_what_one_batch_entry_attends_to():
    drawn = [draw_lists(seed, 200, slash=4, vertical=9) for seed in range(3)]
    index = slash_index(*(torch.tensor(lists) for lists in zip(*drawn, strict=True)), 200)
    for batch in range(3):
        entry = index.entry(batch)
        assert entry.tiles.shape[0] == entry.covered.shape[0] == 1
        assert torch.equal(entry.mask(), index.mask()[batch : batch + 1])
        assert torch.equal(entry.pairs(), index.pairs()[batch : batch + 1])
