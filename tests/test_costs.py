"""Costs: counted from the plan, and equal to the masks, to the closed formulas and to what real hosts send."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from apb.compress import KeyNorm, QueryAware
from apb.context import Context
from apb.costs import LLAMA_3_1_8B, ModelShape, attention_pairs, host_cost
from apb.methods import APB
from apb.parallel import run_threads
from apb.plan import plan_context
from apb.reference import apb_mask
from apb.testing.oracle import anchor_rows_of
from apb.testing.strategies import SEEDS, host_rows, plans, stream_rows

SHAPE = ModelShape(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=3, bytes_per_value=8)
N = 131072


@given(plan=plans())
def test_pairs_are_what_the_masks_let_through(plan):
    for rank, host in enumerate(plan.host_plans):
        counted = int(apb_mask(plan.anchor_rows, plan.anchor_rows, 0, 0)[anchor_rows_of(plan, rank)].sum())
        for block in host.blocks:
            anchor = plan.anchor_rows if block.sees_anchor else 0
            columns = anchor + block.passing_tokens + block.tokens
            counted += int(apb_mask(block.tokens, columns, anchor, block.passing_tokens).sum())
        own = host.query_rows if rank == plan.owner else 0
        for row in range(host.query_rows):
            counted += host.block_rows + (row + 1 if own else 0)
        assert attention_pairs(plan, rank) == counted


@pytest.mark.parametrize("hosts", [2, 3, 8])
def test_an_inner_host_costs_the_papers_formulas(hosts):
    b, a, q, p = 40, 8, 3, 5
    plan = plan_context(tokens=b * hosts, hosts=hosts, anchor=a, passing=p, query=q)
    for rank in range(hosts):
        cost = host_cost(plan, rank, SHAPE)
        rows = a + q if rank else 0
        pairs = rows * (rows + 1) // 2 + b * (rows + rank * p) + b * (b + 1) // 2
        assert (cost.rows, cost.pairs) == (rows + b, SHAPE.heads * pairs)
        assert cost.attention_flops == 4 * pairs * SHAPE.head_dim * SHAPE.heads
        weights = 64 * (4 + 2 + 2) * 16 + 4 * 16 * 64 + 3 * 64 * 96
        assert cost.linear_flops == 2 * cost.rows * weights
        assert cost.flops == cost.attention_flops + cost.linear_flops
        assert cost.sent_bytes == (hosts - 1) * p * 2 * 2 * 16 * 8  # (H − 1) · l_p · Hkv · 2d · itemsize
        assert cost.messages == 1
        assert cost.cache_bytes == b * 2 * 2 * 16 * 8


@given(plan=plans(layouts=("contiguous",), query_ins=("anchor",)))
def test_passing_costs_every_host_the_longest_share(plan):
    shares = [len(anchor_rows_of(plan, rank)) * plan.split_anchor for rank in range(plan.hosts)]
    longest = max(block.kept_tokens + share for block, share in zip(plan.blocks, shares, strict=True))
    assert plan.message_tokens(0) == longest
    for rank in range(plan.hosts):
        cost = host_cost(plan, rank, SHAPE)
        assert cost.sent_bytes == (plan.hosts - 1) * longest * 2 * 2 * 16 * 8
        assert cost.messages == (1 if longest else 0)


def test_published_sizes_of_llama_3_1_8b_at_128k():
    """TFLOP per layer on the slowest host: full attention 198, Star with a = b 23.1, and APB less than Star."""

    def worst(**settings):
        plan = plan_context(tokens=N, **settings)
        return max(host_cost(plan, rank, LLAMA_3_1_8B).flops for rank in range(plan.hosts)) / 1e12

    assert worst(hosts=1) == pytest.approx(198, abs=0.5)
    assert worst(hosts=8, anchor=N // 8) == pytest.approx(23.1, abs=0.05)
    assert worst(hosts=8, anchor=4096, passing=2048) < 23.1


def test_a_split_anchor_and_zigzag_blocks_cost_every_host_the_same():
    """Rows l_b + (l_a + l_q)/H, and pairs alike; only the first has less, whose first block sees no anchor."""
    settings = {"tokens": N, "hosts": 8, "anchor": 4096, "passing": 1024, "query": 64, "layout": "zigzag"}
    plan = plan_context(**settings, split_anchor=True)
    costs = [host_cost(plan, rank, LLAMA_3_1_8B) for rank in range(8)]
    assert {cost.rows for cost in costs} == {16384 + (4096 + 64) // 8}
    pairs = [cost.pairs for cost in costs]
    assert max(pairs) - min(pairs[1:]) <= 1e-3 * max(pairs)
    assert pairs[1] - pairs[0] == pytest.approx(LLAMA_3_1_8B.heads * 8192 * (4096 + 64), rel=1e-3)
    plain = [host_cost(plan_context(**settings), rank, LLAMA_3_1_8B) for rank in range(8)]
    assert max(cost.flops for cost in costs) < 0.88 * max(cost.flops for cost in plain)
    more = (4096 + 64) // 8 * 7 * LLAMA_3_1_8B.kv_bytes
    assert all(a.sent_bytes == b.sent_bytes + more for a, b in zip(costs, plain, strict=True))


def test_zigzag_balances_the_pairs():
    flat, zigzag = (plan_context(tokens=320, hosts=4, passing=6, layout=layout) for layout in ("contiguous", "zigzag"))
    uneven, even = ([attention_pairs(plan, rank) for rank in range(4)] for plan in (flat, zigzag))
    assert len(set(uneven)) == 4 and len(set(even)) == 1


@settings(max_examples=30)
@given(plan=plans(min_query=1), seed=SEEDS)
def test_hosts_send_what_the_plan_says(plan, seed):
    layers = 2
    plan = replace(plan, anchor_on_first=True)  # so that every host has the question's vectors
    asks = plan.query_in == "prefill" or plan.anchor > 0
    method = APB(anchor=plan.anchor, passing=plan.passing, compressor=QueryAware() if asks else KeyNorm())
    streams, shape = stream_rows(plan, seed, dtype=torch.float32), replace(SHAPE, bytes_per_value=4)

    def body(host):
        q, k, v = (host_rows(plan, host.rank, streams, i) for i in range(3))
        for layer in range(layers):
            method.attend(q, k, v, Context(plan, host, layer))
        return host.counters

    for rank, counters in enumerate(run_threads(plan.hosts, body)):
        cost = method.cost(plan, rank, shape)
        assert sum(counters.sent_bytes.values()) == layers * cost.sent_bytes
        assert sum(counters.messages.values()) == layers * cost.messages
        assert set(counters.sent_bytes) <= {"passing", "merge", "query"}
