"""Ring, zigzag ring and Ulysses: exact attention, however the document and the heads are spread."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apb.context import Context
from apb.merge import merge_into
from apb.methods import Ring, Ulysses
from apb.methods.ulysses import split_heads
from apb.parallel import run_threads
from apb.reference import attention, causal_mask
from apb.testing.strategies import (
    ODD_HEADS,
    SEEDS,
    document_rows,
    lse_rounding,
    method_plans,
    peaked,
    prefill_document,
)
from apb.testing.tolerance import assert_rows_close, eager_attention

EXACT = {"atol": 1e-9, "rtol": 0}
BY_NAME = {"ring": Ring(), "ring-zigzag": Ring(layout="zigzag"), "ulysses": Ulysses()}
SPREAD = tuple(BY_NAME)


@pytest.mark.parametrize("name", SPREAD)
@settings(max_examples=20)
@example(tokens=37, hosts=4, seed=1, heads=(9, 3))
@example(tokens=3, hosts=5, seed=1, heads=(6, 1))
@given(tokens=st.integers(1, 40), hosts=st.integers(1, 6), seed=SEEDS, heads=ODD_HEADS)
def test_exact_methods_equal_exact_attention(name, tokens, hosts, seed, heads):
    """Ulysses merges nothing, nor does one host; a ring merges with float32 LSEs."""
    method = BY_NAME[name]
    plan = method.plan(tokens=tokens, hosts=hosts, query=2)
    q, k, v = peaked(seed, plan.tokens, heads=heads, batch=2)
    truth, lse = attention(q, k, v, causal_mask(plan.tokens))
    out, anchors, _ = prefill_document(method, plan, (q, k, v))
    merges = isinstance(method, Ring) and plan.hosts > 1
    torch.testing.assert_close(out, truth, **(lse_rounding(lse, v, plan.hosts) if merges else EXACT))
    assert not anchors


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=12)
@given(seed=SEEDS, tokens=st.integers(2, 50), hosts=st.integers(2, 4), heads=ODD_HEADS)
def test_exact_methods_keep_the_tolerance_of_the_working_dtype(name, dtype, seed, tokens, hosts, heads):
    """Row by row, on the fused CPU kernels; partial outputs are added up in float32."""
    method = BY_NAME[name]
    q, k, v = (x.to(dtype) for x in peaked(seed, tokens, heads=heads, batch=2, dtype=torch.float32))
    out, _, _ = prefill_document(method, method.plan(tokens=tokens, hosts=hosts), (q, k, v))
    assert out.dtype == dtype
    mask = causal_mask(tokens)
    size = float(v.abs().max())
    if dtype == torch.float32:  # scores are rounded, too, as in `assert_attention`
        size *= 1 + 0.25 * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    assert_rows_close(out, attention(q, k, v, mask)[0], eager=eager_attention(q, k, v, mask), value_scale=size)


@given(case=method_plans(SPREAD, max_tokens=20), seed=SEEDS)
def test_the_scale_is_the_contexts(case, seed):
    method, plan = case
    q, k, v = peaked(seed, plan.tokens)
    truth, lse = attention(q, k, v, causal_mask(plan.tokens), 0.5)
    out, _, _ = prefill_document(method, plan, (q, k, v), scale=0.5)
    torch.testing.assert_close(out, truth, **lse_rounding(lse, v, plan.hosts))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_ring_sends_on_what_it_is_about_to_attend_to(layout, hosts):
    """The exchange of step t + 1 is started before the attention of step t, and waited for after it."""
    plan = Ring(layout=layout).plan(tokens=8 * hosts, hosts=hosts)
    rows = peaked(1, plan.tokens)

    def body(host):
        events, sizes = [], []

        class Spy(Ring):
            def masked(self, q, k, v, context, **lengths):
                events.append("a")
                return super().masked(q, k, v, context, **lengths)

            def full(self, q, k, v, context):
                events.append("a")
                sizes.append(q.shape[2] * k.shape[2])
                return super().full(q, k, v, context)

        exchange = host.exchange

        def spied(x, **where):
            events.append("s")
            handle = exchange(x, **where)
            wait = handle.wait
            handle.wait = lambda: events.append("w") or wait()
            return handle

        host.exchange = spied
        Spy(layout=layout).attend(*(document_rows(plan, host.rank, x) for x in rows), Context(plan, host))
        return "".join(events), sizes

    for rank, (events, sizes) in enumerate(run_threads(hosts, body)):
        assert re.fullmatch(rf"(sa*w){{{hosts - 1}}}a*", events), events
        if layout == "zigzag":  # 4 rows a chunk: every step is one rectangle of the same size
            assert sizes == [2 * 4 * 4] * (hosts - 1) and events.count("a") == hosts
        else:
            assert sizes == [8 * 8] * rank and events.startswith("sa" if hosts > 1 else "a")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_ring_adds_up_in_float32_what_it_computed_in_half(layout, monkeypatch):
    merged = []

    def spied(*parts):
        merged.append([part.dtype for part in parts[:2]])
        merge_into(*parts)

    monkeypatch.setattr("apb.methods.ring.merge_into", spied)
    method, rows = Ring(layout=layout), peaked(1, 30, dtype=torch.bfloat16)
    out, _, _ = prefill_document(method, method.plan(tokens=30, hosts=3), rows)
    assert out.dtype == torch.bfloat16
    assert merged and all(dtypes == [torch.float32, torch.float32] for dtypes in merged)


@given(heads=ODD_HEADS, hosts=st.integers(1, 12), times=st.integers(1, 3))
def test_every_query_head_has_one_host_and_the_kv_head_that_is_its_own(heads, hosts, times):
    q_heads, kv_heads = times * heads[0], heads[1]
    shares = split_heads(q_heads, kv_heads, hosts)
    assert len(shares) == hosts
    assert [head for share in shares for head in range(share.q.start, share.q.stop)] == list(range(q_heads))
    counts = [share.q_heads for share in shares]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    for share in shares:
        mine = range(share.q.start, share.q.stop)
        assert [share.kv.start + i for i in share.reads] == [head // (q_heads // kv_heads) for head in mine]
        assert set(share.reads) == set(range(share.kv_heads)) and 0 <= share.kv.start <= share.kv.stop <= kv_heads
        if share.even and share.q_heads:  # as attention pairs heads when it is given these
            assert share.q_heads % share.kv_heads == 0
            assert share.reads == tuple(i // (share.q_heads // share.kv_heads) for i in range(share.q_heads))
    if q_heads % hosts == 0 and (kv_heads % hosts == 0 or hosts % kv_heads == 0):
        assert all(share.even and share.q_heads == q_heads // hosts for share in shares)
        assert all(share.kv_heads == max(1, kv_heads // hosts) for share in shares)


@pytest.mark.parametrize(("heads", "hosts"), [((9, 3), 2), ((9, 3), 4), ((9, 3), 5), ((14, 2), 4), ((20, 4), 5)])
def test_heads_read_out_of_step_are_each_their_own(heads, hosts):
    """9 over 3 on 2 hosts read 0 0 0 1 1; 14 over 2 on 4: the second host's four read 0 0 0 1, not 0 0 1 1."""
    assert split_heads(14, 2, 4)[1].reads == (0, 0, 0, 1) and not split_heads(14, 2, 4)[1].even
    method, (q, k, v) = Ulysses(), peaked(hosts, 11, heads=heads, batch=2)
    out, _, _ = prefill_document(method, method.plan(tokens=11, hosts=hosts), (q, k, v))
    torch.testing.assert_close(out, attention(q, k, v, causal_mask(11))[0], **EXACT)


@pytest.mark.parametrize("name", SPREAD)
def test_rows_that_are_not_the_plans_are_refused(name):
    method = BY_NAME[name]
    plan = method.plan(tokens=12, hosts=1)
    q, k, v = peaked(0, 11)
    with pytest.raises(ValueError, match="q, k, v: 11, 11 and 11 rows, expected 12, the plan's rows of rank 0"):
        run_threads(1, lambda host: method.attend(q, k, v, Context(plan, host)))
    with pytest.raises(ValueError, match="layout: expected one of"):
        replace(Ring(), layout="spiral").plan(tokens=3, hosts=2)
