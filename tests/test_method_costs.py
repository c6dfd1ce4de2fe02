"""What methods say they cost: what running them counts, what their masks let through, and the closed formulas."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.compress import KeyNorm
from apb.context import Context
from apb.costs import LLAMA_3_1_8B, ModelShape
from apb.methods import APB, APE, Flash, Ring, Star, Ulysses
from apb.parallel import run_simulated, run_threads
from apb.reference import ape_mask, causal_mask, star_mask
from apb.testing.strategies import METHOD_NAMES, ODD_HEADS, held_rows, method_plans, peaked, prefill_document

SHAPE = ModelShape(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=3, bytes_per_value=8)
N, H = 131072, 8


@pytest.mark.parametrize("name", METHOD_NAMES)
@settings(max_examples=12)
@given(data=st.data(), heads=ODD_HEADS, batch=st.integers(1, 2), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_what_is_counted_is_what_the_method_says_it_costs(name, data, heads, batch, dtype):
    """Pairs of one batch entry, and the bytes of all; on every rank, for uneven blocks and idle hosts too."""
    method, plan = data.draw(method_plans((name,)))
    shape = replace(SHAPE, heads=heads[0], kv_heads=heads[1], bytes_per_value=dtype.itemsize)
    rows = peaked(0, plan.tokens, heads=heads, batch=batch, dtype=dtype)
    for rank, (pairs, sent, messages) in enumerate(prefill_document(method, plan, rows)[2]):
        cost = method.cost(plan, rank, shape)
        assert pairs == cost.pairs
        assert sum(sent.values()) == batch * cost.sent_bytes
        assert sum(messages.values()) == cost.messages
        assert cost.rows == plan.host(rank).rows
        assert cost.attention_flops == 4 * pairs * 16
        assert cost.linear_flops == cost.rows * shape.linear_flops_per_token
        assert cost.cache_bytes == plan.host(rank).held_rows * shape.kv_bytes


@settings(max_examples=100)
@given(case=method_plans(METHOD_NAMES[:-2]), heads=ODD_HEADS)
def test_hosts_together_score_what_the_mask_lets_through(case, heads):
    """And each host that runs a replicated anchor scores that again."""
    method, plan = case
    mask = causal_mask(plan.tokens)
    if isinstance(method, Star):
        mask = star_mask(plan.tokens, plan.hosts, plan.anchor)
    if isinstance(method, APE):
        mask = ape_mask(plan.tokens, plan.hosts, plan.anchor)
    seen = int(mask.sum())
    a = plan.anchor
    if isinstance(method, (Star, APE)):
        copies = sum(host.anchor_rows > 0 for host in plan.host_plans) - isinstance(method, APE)
        seen += max(0, copies) * a * (a + 1) // 2
    shape = replace(SHAPE, heads=heads[0], kv_heads=heads[1])
    costs = [method.cost(plan, rank, shape) for rank in range(plan.hosts)]
    assert sum(cost.pairs for cost in costs) == heads[0] * seen
    held = sum(cost.cache_bytes for cost in costs)
    assert held == plan.tokens * shape.kv_bytes


@pytest.mark.parametrize("hosts", [2, 4, 8])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 2), (16, 8), (8, 1)])
def test_where_lengths_divide_costs_are_the_closed_formulas(hosts, q_heads, kv_heads):
    b, a, p, d, itemsize = 24, 10, 7, 16, 2
    n = b * hosts
    shape = ModelShape(hidden=64, heads=q_heads, kv_heads=kv_heads, head_dim=d, ffn=96, layers=1)

    def costs(method, tokens=n):
        plan = method.plan(tokens=tokens, hosts=hosts)
        return [(c.pairs, c.sent_bytes, c.messages) for c in (method.cost(plan, r, shape) for r in range(hosts))]

    round_ = (hosts - 1) * b * kv_heads * 2 * d * itemsize, hosts - 1
    assert costs(Ring()) == [(q_heads * (b * (b + 1) // 2 + r * b * b), *round_) for r in range(hosts)]
    assert costs(Ring(layout="zigzag")) == [(q_heads * n * (n + 1) // (2 * hosts), *round_)] * hosts
    if q_heads % hosts == 0:
        share = max(kv_heads, hosts) // hosts  # a KV head that several hosts read goes to each of them
        out = (hosts - 1) * b * (q_heads // hosts + 2 * share) * d * itemsize
        back = (hosts - 1) * b * (q_heads // hosts) * d * itemsize
        assert costs(Ulysses()) == [(q_heads // hosts * n * (n + 1) // 2, out + back, 2)] * hosts
    first, later = b * (b + 1) // 2, a * (a + 1) // 2 + a * b + b * (b + 1) // 2
    assert costs(Star(anchor=a)) == [(q_heads * (later if r else first), 0, 0) for r in range(hosts)]
    prefix = p * (p + 1) // 2 + p * b + b * (b + 1) // 2
    assert costs(APE(prefix=p), tokens=n + p) == [(q_heads * prefix, 0, 0)] * hosts
    apb = APB(anchor=a, passing=p, compressor=KeyNorm(), query_in="after")
    gathered = (hosts - 1) * p * kv_heads * 2 * d * itemsize
    assert costs(apb) == [(q_heads * ((later if r else first) + r * p * b), gathered, 1) for r in range(hosts)]


def test_flash_scores_every_pair_and_sends_nothing():
    cost = Flash().cost(Flash().plan(tokens=100, hosts=1), 0, SHAPE)
    assert (cost.pairs, cost.sent_bytes, cost.messages) == (4 * 100 * 101 // 2, 0, 0)
    for method in (Ring(), Ring(layout="zigzag"), Star()):
        assert method.cost(method.plan(tokens=100, hosts=1), 0, SHAPE) == cost
    assert Ulysses().cost(Ulysses().plan(tokens=100, hosts=1), 0, SHAPE) == replace(cost, messages=2)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_only_the_contiguous_ring_makes_the_last_host_wait_for_itself(layout):
    """The slowest host works 2 − 1/H times the mean, or with zigzag as much as all."""
    method = Ring(layout=layout)
    plan = method.plan(tokens=1600, hosts=H)
    pairs = [method.cost(plan, rank, SHAPE).pairs for rank in range(H)]
    assert max(pairs) * H / sum(pairs) == pytest.approx(2 - 1 / H if layout == "contiguous" else 1, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "hosts", "tflop"),
    [
        (Flash(), 1, 198),
        (Ring(), H, 40),
        (Ring(layout="zigzag"), H, 24.7),
        (Ulysses(), H, 24.7),
        (Star(), H, 23.1),  # anchor = block
        (APE(prefix=128), H, 9.425),
        (APE(prefix=0), H, 9.346),
    ],
)
def test_published_sizes_of_llama_3_1_8b_at_128k(method, hosts, tflop):
    """TFLOP per layer on the slowest host, attention and linear."""
    plan = method.plan(tokens=N, hosts=hosts)
    worst = max(method.cost(plan, rank, LLAMA_3_1_8B).flops for rank in range(hosts)) / 1e12
    assert worst == pytest.approx(tflop, abs=0.5 if tflop > 30 else 0.05 if tflop > 20 else 0.005)


@pytest.mark.parametrize("runner", [run_threads, run_simulated])
@pytest.mark.parametrize("name", ["ring", "ulysses", "star", "ape", "apb"])
def test_decoding_sends_partial_outputs_and_their_lses_in_float32(name, runner):
    """(H − 1) · batch · Hq · rows · (d + 1) values a layer; APE sends two of each: contexts and the rest."""
    methods = {"ring": Ring(), "ulysses": Ulysses(), "star": Star(), "ape": APE(prefix=2), "apb": APB()}
    method, hosts, rows = methods[name], 3, 5
    plan = method.plan(tokens=20, hosts=hosts, query=rows)
    q, k, v = peaked(1, 20 + rows, heads=(6, 2), batch=2, dtype=torch.float32)

    def body(host):
        cache = [held_rows(plan, host.rank, x[:, :, :20]) for x in (k, v)]
        if host.rank == plan.owner:
            cache = [torch.cat((x, y[:, :, 20:]), dim=2) for x, y in zip(cache, (k, v), strict=True)]
        method.decode(q[:, :, 20:], *cache, Context(plan, host))
        return host.counters

    parts = 2 if name == "ape" else 1
    for counters in runner(hosts, body):
        assert counters.sent_bytes == {"merge": parts * (hosts - 1) * 2 * 6 * rows * (16 + 1) * 4}
        assert counters.messages == {"merge": 1}
