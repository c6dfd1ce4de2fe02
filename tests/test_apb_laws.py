"""APB on raw tensors and real hosts: what it must equal in its limits, and what must never depend on what."""

from dataclasses import replace

import pytest
import torch
from apb_cases import also_rich, attend, causal, methods_and_plans, naive_score, run
from hypothesis import assume, given
from hypothesis import strategies as st

from apb.compress import TRAINING_FREE, KeyNorm, QueryAware, Random
from apb.methods import APB, Flash, Spava
from apb.parallel import run_processes, run_simulated, run_threads
from apb.plan import plan_context
from apb.reference import apb_mask, attention
from apb.testing import oracle
from apb.testing.strategies import HEADS, SEEDS, peaked, plans, stream_rows
from apb.testing.tolerance import assert_rows_close, eager_attention

EXACT = {"atol": 1e-9, "rtol": 0}
MERGED = {"atol": 2e-6, "rtol": 0}  # partial results travel in float32


@also_rich(spava=True, heads=(4, 2))
@given(case=methods_and_plans(spava=True), seed=SEEDS, heads=HEADS)
def test_every_stream_equals_the_naive_formula(case, seed, heads):
    method, plan = case
    streams = stream_rows(plan, seed, heads=heads, batch=2)
    truth = oracle.layer(plan, streams.anchor, streams.document, streams.query, naive_score(method))
    document, anchors, queries = run(method, plan, streams)
    blocks = [truth.anchor, *truth.blocks] if plan.shared_prefix else truth.blocks
    torch.testing.assert_close(document, torch.cat(blocks, dim=2), **EXACT)
    for rank, anchor in enumerate(anchors):
        torch.testing.assert_close(anchor, truth.anchor[:, :, oracle.anchor_rows_of(plan, rank)], **EXACT)
    if plan.query_in == "prefill":
        for query in queries:
            torch.testing.assert_close(query, truth.query, **MERGED)


@also_rich(spava=True)
@given(case=methods_and_plans(spava=True), seed=SEEDS)
def test_the_trace_says_which_document_tokens_were_passed(case, seed):
    method, plan = case
    streams = stream_rows(plan, seed)
    truth = oracle.layer(plan, streams.anchor, streams.document, streams.query, naive_score(method))
    kept = {}
    for _, mine in run_threads(plan.hosts, attend, method, plan, streams, True):
        kept |= mine
    assert sorted(kept) == [(0, i) for i in range(len(plan.blocks))]
    assert all(torch.equal(kept[0, i], expected) for i, expected in enumerate(truth.kept))


@given(tokens=st.integers(1, 40), anchor=st.integers(0, 9), passing=st.integers(0, 9), seed=SEEDS)
def test_one_host_is_full_attention(tokens, anchor, passing, seed):
    method = APB(anchor=min(anchor, tokens), passing=passing)
    plan = method.plan(tokens=tokens, hosts=1, query=3)
    streams = stream_rows(plan, seed)
    torch.testing.assert_close(run(method, plan, streams)[0], causal(*streams.document), **EXACT)
    flash = Flash()
    exact = run(flash, flash.plan(tokens=tokens, hosts=1, query=3), replace(streams, anchor=streams.query))[0]
    torch.testing.assert_close(exact, causal(*streams.document), **EXACT)


@given(case=methods_and_plans(max_hosts=6, min_query=0), seed=SEEDS, heads=HEADS)
def test_master_law_a_full_budget_and_no_anchor_is_full_attention(case, seed, heads):
    """In both layouts, with uneven blocks, with more hosts than tokens, and for a query that runs along."""
    _, plan = case
    plan = replace(plan, anchor=0, passing=plan.block_tokens, query_offset=0)
    method = APB(anchor=0, passing=plan.passing, compressor=KeyNorm(), query_in=plan.query_in, layout=plan.layout)
    streams = stream_rows(plan, seed, heads=heads)
    document, _, queries = run(method, plan, streams)
    torch.testing.assert_close(document, causal(*streams.document), **EXACT)
    if plan.query_in == "prefill":
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(streams.document, streams.query, strict=True))
        expected = causal(q, k, v)[:, :, plan.tokens :]
        for query in queries:
            torch.testing.assert_close(query, expected, **MERGED)


@also_rich(spava=True)
@given(case=methods_and_plans(spava=True), seed=SEEDS)
def test_splitting_the_anchor_changes_no_row(case, seed):
    """Each host runs a share of the anchor or all of it: the same mathematics, whatever is compressed by what."""
    method, plan = case
    streams, found = stream_rows(plan, seed), []
    for split in (False, True):
        mine = replace(plan, split_anchor=split)
        found.append((mine, *run(replace(method, split_anchor=split), mine, streams)))
    (plain, document, anchors, queries), (shared, same_document, shares, same_queries) = found
    torch.testing.assert_close(document, same_document, **EXACT)
    torch.testing.assert_close(queries, same_queries, **EXACT)
    whole = next((anchor for anchor in anchors if anchor.shape[2]), None)
    assert (whole is None) == (not any(share.shape[2] for share in shares))
    for rank, share in enumerate(shares if whole is not None else []):
        torch.testing.assert_close(share, whole[:, :, oracle.anchor_rows_of(shared, rank)], **EXACT)
    ran = sum(host.anchor_rows for host in plain.host_plans), sum(host.anchor_rows for host in shared.host_plans)
    assert ran[1] == (plan.anchor_rows if ran[0] else 0)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@given(seed=SEEDS, layout=st.sampled_from(["contiguous", "zigzag"]), tokens=st.integers(3, 40))
def test_master_law_in_float32(backend, seed, layout, tokens):
    plan = plan_context(tokens=tokens, hosts=3, passing=tokens, layout=layout)
    streams = stream_rows(plan, seed, dtype=torch.float32)
    method = APB(anchor=0, passing=tokens, compressor=KeyNorm(), layout=layout, backend=backend)
    out, _, _ = run(method, plan, streams)
    q, k, v = streams.document
    eager = eager_attention(q, k, v, apb_mask(tokens, tokens, 0, 0))
    size = float(v.abs().max()) * (1 + 0.25 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max()))  # scores are rounded
    assert_rows_close(out, causal(q, k, v), eager=eager, value_scale=size)


@given(plan=plans(query_ins=("anchor",)), seed=SEEDS)
def test_nothing_passed_and_no_anchor_is_block_local_attention(plan, seed):
    plan = replace(plan, anchor=0, passing=0, query_offset=0)
    streams = stream_rows(plan, seed)
    document, _, _ = run(APB(anchor=0, passing=0, layout=plan.layout), plan, streams)
    for _, start, stop in oracle.blocks_of(plan):
        local = causal(*(x[:, :, start:stop] for x in streams.document))
        torch.testing.assert_close(document[:, :, start:stop], local, **EXACT)


@given(plan=plans(query_ins=("anchor",), max_query=0, layouts=("contiguous",)), seed=SEEDS)
def test_nothing_passed_and_no_query_in_the_anchor_is_star_attention(plan, seed):
    """Star: every block but the first runs [first a tokens, block] with plain causal attention."""
    plan = replace(plan, passing=0)
    streams = stream_rows(plan, seed)
    first = tuple(x[:, :, : plan.anchor] for x in streams.document)
    document, _, _ = run(APB(anchor=plan.anchor, passing=0), plan, replace(streams, anchor=first))
    for rank, start, stop in oracle.blocks_of(plan):
        prefix = plan.anchor if rank else 0
        rows = [torch.cat((x[:, :, :prefix], x[:, :, start:stop]), dim=2) for x in streams.document]
        torch.testing.assert_close(document[:, :, start:stop], causal(*rows)[:, :, prefix:], **EXACT)


@also_rich()
@given(case=methods_and_plans(compressor=KeyNorm()), seed=SEEDS)
def test_the_scale_is_the_contexts(case, seed):
    method, plan = case
    streams = stream_rows(plan, seed)
    scaled = replace(streams, **{
        name: (getattr(streams, name)[0] * 2.0, *getattr(streams, name)[1:]) for name in ("anchor", "document", "query")
    })  # fmt: skip
    (document, _, queries), (expected, _, expected_queries) = (
        run(method, plan, streams, scale=0.5),  # 2 / √16
        run(method, plan, scaled),
    )
    torch.testing.assert_close(document, expected, **EXACT)
    torch.testing.assert_close(queries, expected_queries, **MERGED)


def spoil(streams, tokens, value):
    document = tuple(x.clone() for x in streams.document)
    for x in document:
        x[:, :, tokens] = value
    return replace(streams, document=document)


@given(case=methods_and_plans(query_ins=("anchor",)), seed=SEEDS, data=st.data())
def test_a_token_changes_nothing_before_it_on_any_rank(case, seed, data):
    method, plan = case
    j = data.draw(st.integers(0, plan.tokens - 1))
    streams = stream_rows(plan, seed)
    before, anchors, _ = run(method, plan, streams)
    after, same_anchors, _ = run(method, plan, spoil(streams, slice(j, j + 1), 1e3))
    assert torch.equal(before[:, :, :j], after[:, :, :j])
    assert not torch.equal(before[:, :, j:], after[:, :, j:])
    assert all(torch.equal(x, y) for x, y in zip(anchors, same_anchors, strict=True))


@given(case=methods_and_plans(query_ins=("anchor",), min_hosts=2), seed=SEEDS, data=st.data())
def test_a_block_depends_on_no_later_block_even_if_that_is_nan(case, seed, data):
    method, plan = case
    method = replace(method, passing=plan.passing if plan.passing == 0 else plan.tokens)  # NaN cannot be scored
    plan = replace(plan, passing=method.passing)
    cut = plan.blocks[data.draw(st.integers(1, len(plan.blocks) - 1))].start
    streams = stream_rows(plan, seed)
    before, after = run(method, plan, streams)[0], run(method, plan, spoil(streams, slice(cut, None), torch.nan))[0]
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert after[:, :, cut:].isnan().all()


@given(case=methods_and_plans(query_ins=("anchor",), min_hosts=2), seed=SEEDS, data=st.data())
def test_what_a_block_passes_depends_on_that_block_and_the_question_alone(case, seed, data):
    method, plan = case
    chosen = data.draw(st.sampled_from(plan.blocks))
    streams = stream_rows(plan, seed)
    others = [t for t in range(plan.tokens) if not chosen.start <= t < chosen.stop]
    kept = []
    for version in (streams, spoil(streams, others, 1e3)):
        results = run_threads(plan.hosts, attend, method, plan, version, True)
        kept.append(next(mine[0, chosen.index] for _, mine in results if (0, chosen.index) in mine))
    assert torch.equal(*kept)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@given(seed=SEEDS, block=st.integers(0, 5), hosts=st.integers(2, 4))
def test_a_running_query_sees_the_end_of_any_block_from_its_first_row(layout, seed, block, hosts):
    """The query's attention is causal only among itself: hosts that do not own it must show their whole blocks."""
    method = APB(anchor=2, passing=2, query_in="prefill", layout=layout)
    plan = method.plan(tokens=47, hosts=hosts, query=4)
    streams = stream_rows(plan, seed)
    end = plan.blocks[block % len(plan.blocks)].stop - 1
    q, k, v = (x.clone() for x in streams.document)
    k[:, :, end] = 4 * streams.query[0][:, ::2, 0]  # a key that the first query row cannot overlook
    v[:, :, end] += 1e3
    queries = run(method, plan, replace(streams, document=(q, k, v)))[2]
    assert all((query[:, ::2, 0] > 500).all() for query in queries)


@given(case=methods_and_plans(spava=True), seed=SEEDS)
def test_a_second_run_and_simulated_hosts_give_the_same_bits(case, seed):
    method, plan = case
    streams = stream_rows(plan, seed)
    first = run(method, plan, streams)
    for other in (run(method, plan, streams), run(method, plan, streams, run_simulated)):
        assert torch.equal(first[0], other[0])
        assert all(torch.equal(x, y) for i in (1, 2) for x, y in zip(first[i], other[i], strict=True))


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("query_in", ["anchor", "prefill"])
@pytest.mark.parametrize(("layout", "split"), [("contiguous", True), ("zigzag", False)])
def test_gloo_processes_equal_threads(hosts, query_in, layout, split):
    method = APB(anchor=3, passing=4, query_in=query_in, layout=layout, split_anchor=split)
    plan = method.plan(tokens=51, hosts=hosts, query=2, query_offset=1)
    streams = stream_rows(plan, hosts, batch=2)
    processes, threads = run(method, plan, streams, run_processes), run(method, plan, streams)
    torch.testing.assert_close(processes, threads, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", TRAINING_FREE)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "spava"])
def test_any_compressor_runs_on_any_layout(name, layout):
    """With its own kept set, the output is the masked attention over it."""
    settings = {"anchor": 2, "passing": 3, "compressor": TRAINING_FREE[name]()}
    method = Spava(**settings, split_anchor=True) if layout == "spava" else APB(**settings, layout=layout)
    plan = method.plan(tokens=37, hosts=3, query=2)
    streams = stream_rows(plan, 5, batch=2)
    kept = {}
    for _, mine in run_threads(3, attend, method, plan, streams, True):
        kept |= mine
    found = iter([kept[0, block.index] - block.start - block.skipped for block in plan.blocks if block.kept_tokens])

    def score(k, question):
        return torch.zeros(k.shape[:3]).scatter(2, next(found), 1.0)

    truth = oracle.layer(plan, streams.anchor, streams.document, streams.query, score)
    rows = [truth.anchor, *truth.blocks] if plan.shared_prefix else truth.blocks
    torch.testing.assert_close(run(method, plan, streams)[0], torch.cat(rows, dim=2), **EXACT)


@given(seed=SEEDS)
def test_random_and_best_tokens_are_not_the_same(seed):
    """The inputs are peaked enough for the choice to matter."""
    plan = plan_context(tokens=40, hosts=2, anchor=2, passing=4, query=2)
    assume(plan.blocks[1].passing_tokens == 4)
    streams = stream_rows(replace(plan, anchor_on_first=True), seed)
    plan = replace(plan, anchor_on_first=True)
    best, other = (
        run(APB(anchor=2, passing=4, compressor=c), plan, streams)[0] for c in (QueryAware(), Random(seed=seed))
    )
    assert (best - other).abs().max() > 0.1


def test_peaked_inputs_are_peaked():
    q, k, v = peaked(0, 60)
    _, lse = attention(q, k, v, torch.ones(60, 60, dtype=torch.bool))
    assert lse.mean() > 10
