"""What every method must obey: who holds what, nothing sees what comes later, decoding is exact, hosts are alike."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from apb.compress import KeyNorm
from apb.context import Context, Trace
from apb.methods import APB, APE, Flash, Ring, Star, Ulysses
from apb.parallel import run_processes, run_simulated, run_threads
from apb.reference import ape_mix, attention, causal_mask
from apb.testing.strategies import (
    METHOD_NAMES,
    ODD_HEADS,
    SEEDS,
    document_rows,
    held_rows,
    lse_rounding,
    method_plans,
    peaked,
    prefill_document,
)

SCALE = 0.3  # of the questions' softmax; by itself it would be 1/√16
LEADING = st.sampled_from([(), (3,), (2, 1, 4)])
METHODS = {
    "flash": Flash(),
    "ring": Ring(),
    "ring-zigzag": Ring(layout="zigzag"),
    "ulysses": Ulysses(),
    "star": Star(anchor=5),
    "ape": APE(prefix=3, temperature=0.7, scale=1.2),
    "apb": APB(anchor=4, passing=3, compressor=KeyNorm(), query_in="after"),
    "apb-zigzag": APB(anchor=3, passing=2, compressor=KeyNorm(), query_in="after", layout="zigzag"),
}


# Who holds what.


@settings(max_examples=100)
@given(case=method_plans(), leading=LEADING)
def test_join_undoes_split_and_every_token_is_held_once(case, leading):
    _, plan = case
    x = torch.arange(torch.Size((*leading, plan.tokens)).numel()).reshape(*leading, plan.tokens)
    parts = plan.split(x)
    assert torch.equal(plan.join(parts), x)
    flat = torch.arange(plan.tokens)
    assert sorted(int(t) for part in plan.split(flat) for t in part) == list(range(plan.tokens))
    for rank, (part, host) in enumerate(zip(plan.split(flat), plan.host_plans, strict=True)):
        assert torch.equal(part, held_rows(plan, rank, flat.reshape(1, 1, -1, 1)).flatten())
        assert len(part) == host.held_rows
        rows = plan.host_rows(rank, flat, torch.zeros(plan.query, dtype=torch.int64))
        assert torch.equal(torch.cat([rows[span] for span in host.held_spans]), part)


@settings(max_examples=100)
@given(case=method_plans())
def test_positions_are_true_or_in_ape_begin_anew_behind_the_prefix(case):
    method, plan = case
    prefix = plan.anchor if isinstance(method, APE) else 0
    chunk = max(1, -(-(plan.tokens - prefix) // plan.hosts))

    def place(token):
        return token if token < prefix or not isinstance(method, APE) else prefix + (token - prefix) % chunk

    places = []
    for rank in range(plan.hosts):
        tokens = plan.host_rows(rank, torch.arange(plan.tokens), torch.zeros(plan.query, dtype=torch.int64)).tolist()
        assert plan.positions(rank).tolist() == [place(token) for token in tokens]
        places += [place(token) for token in tokens]
    assert plan.next_position == (max(places) + 1 if isinstance(method, APE) else plan.tokens)


@pytest.mark.parametrize("name", METHODS)
def test_plans_hold_for_as_many_hosts_as_were_asked(name):
    method = METHODS[name]
    hosts = 1 if name == "flash" else 3
    plan = method.plan(tokens=40, hosts=hosts, query=2, query_offset=1)
    assert (plan.tokens, plan.hosts, plan.query, plan.query_in) == (40, hosts, 2, "after")
    assert plan.owner == (0 if plan.layout == "zigzag" else hosts - 1)
    assert all(host.query_rows == 0 for host in plan.host_plans)


# What a row sees.


@pytest.mark.parametrize("name", METHOD_NAMES)
@settings(max_examples=10)
@given(seed=SEEDS, data=st.data())
def test_a_token_changes_nothing_before_it_even_if_it_is_nan(name, seed, data):
    """A value that is NaN would spread through 0 · NaN in any masked product, so that is large instead."""
    method, plan = data.draw(method_plans((name,)))
    # NaN cannot be scored, so APB passes all or nothing.
    assume(all(block.kept_tokens in (0, block.tokens - block.skipped) for block in plan.blocks[:-1]))
    j = data.draw(st.integers(0, plan.tokens - 1))
    q, k, v = peaked(seed, plan.tokens, batch=2)
    spoilt = tuple(x.clone() for x in (q, k, v))
    spoilt[0][:, :, j], spoilt[1][:, :, j], spoilt[2][:, :, j] = torch.nan, torch.nan, 1e30
    before, _, _ = prefill_document(method, plan, (q, k, v))
    after, _, _ = prefill_document(method, plan, spoilt)
    assert torch.equal(before[:, :, :j], after[:, :, :j])
    assert after[:, :, j].isnan().all()


@settings(max_examples=60)
@given(case=method_plans(), seed=SEEDS)
def test_the_mask_that_is_drawn_is_the_mask_that_is_attended_with(case, seed):
    """With what was really passed; one KV head, since every head keeps its own."""
    method, plan = case
    q, k, v = peaked(seed, plan.tokens, heads=(3, 1))

    def body(host):
        trace = Trace(keep_indices=True)
        out = method.attend(*(document_rows(plan, host.rank, x) for x in (q, k, v)), Context(plan, host, trace=trace))
        held = torch.cat([out[:, :, span] for span in plan.host(host.rank).held_spans], dim=2)
        return held, {block: where[0, 0] for (_, block), where in trace.kept.items()}

    results = run_threads(plan.hosts, body)
    kept = {block: where for _, mine in results for block, where in mine.items()}
    truth, lse = attention(q, k, v, method.mask(plan, torch.arange(plan.tokens), kept))
    out = plan.join([held for held, _ in results], dim=2)
    torch.testing.assert_close(out, truth, **lse_rounding(lse, v, plan.hosts))


# What comes after the document.


def decode_truth(method, plan, document, new):
    """Attend from all new rows at once; return the LSEs too, which say what may be rounded away."""
    q = new[0]
    keys, values = (torch.cat((document[i], new[i]), dim=2) for i in (1, 2))
    rows = causal_mask(keys.shape[2])[-q.shape[2] :]
    out, lse = attention(q, keys, values, rows, SCALE)
    if isinstance(method, APE):
        prefix, power = plan.anchor, max(1.0, method.scale * method.temperature)
        contexts = tuple(document[i][:, :, prefix:] for i in (1, 2))
        other = tuple(torch.cat((document[i][:, :, :prefix], new[i]), dim=2) for i in (1, 2))
        out = ape_mix(q, contexts, other, temperature=method.temperature, scale=method.scale, softmax_scale=SCALE)
        everything = torch.ones(q.shape[2], contexts[0].shape[2], dtype=torch.bool)
        _, sharp = attention(q, *contexts, everything, SCALE / method.temperature)
        lse = torch.cat((lse, power * sharp, sharp), dim=-1)
    return out, lse


def decode_on_hosts(method, plan, document, new, steps, runner=run_threads):
    """Decode the new rows in calls of these many rows each; every host returns them all."""

    def body(host):
        cache = [held_rows(plan, host.rank, document[i]) for i in (1, 2)]
        outs, done = [], 0
        for rows in steps:
            mine = slice(done, done + rows)
            if host.rank == plan.owner:
                cache = [torch.cat((x, new[i][:, :, mine]), dim=2) for i, x in zip((1, 2), cache, strict=True)]
            outs.append(method.decode(new[0][:, :, mine], *cache, Context(plan, host, scale=SCALE)))
            done += rows
        return torch.cat(outs, dim=2)

    return runner(plan.hosts, body)


@pytest.mark.parametrize("name", METHOD_NAMES)
@settings(max_examples=12)
@given(data=st.data(), seed=SEEDS, heads=ODD_HEADS, question=st.integers(1, 4))
def test_the_question_and_new_tokens_attend_to_all_that_hosts_hold(name, data, seed, heads, question):
    """Causal among themselves on the host that owns them, and not at all on the others."""
    method, plan = data.draw(method_plans((name,), max_tokens=30))
    steps = [question, 1, 1]
    rows = peaked(seed, plan.tokens + sum(steps), heads=heads, batch=2)
    document, new = (tuple(x[:, :, part] for x in rows) for part in (slice(plan.tokens), slice(plan.tokens, None)))
    truth, lse = decode_truth(method, plan, document, new)
    outs = decode_on_hosts(method, plan, document, new, steps)
    for out in outs:
        torch.testing.assert_close(out, truth, **lse_rounding(lse, rows[2], plan.hosts + 1))
        assert torch.equal(out, outs[0])


# On whatever hosts.


def everything(host_runner, method, plan):
    rows = peaked(3, plan.tokens + 3, heads=(9, 3), batch=2)
    document, new = (tuple(x[:, :, part] for x in rows) for part in (slice(plan.tokens), slice(plan.tokens, None)))
    out, anchors, counted = prefill_document(method, plan, document, host_runner)
    return out, anchors, counted, decode_on_hosts(method, plan, document, new, [2, 1], host_runner)


@pytest.mark.parametrize("name", METHOD_NAMES)
@settings(max_examples=6)
@given(data=st.data(), seed=SEEDS)
def test_simulated_hosts_give_the_same_bits_and_counts_as_threads(name, data, seed):
    method, plan = data.draw(method_plans((name,), max_tokens=25))
    rows = peaked(seed, plan.tokens, batch=2)
    threads, simulated = (prefill_document(method, plan, rows, runner) for runner in (run_threads, run_simulated))
    assert torch.equal(threads[0], simulated[0])
    assert all(torch.equal(x, y) for x, y in zip(threads[1], simulated[1], strict=True))
    assert threads[2] == simulated[2]


@pytest.mark.parametrize(
    ("name", "hosts", "tokens"),
    [
        *((name, hosts, 51) for name in METHODS if name != "flash" for hosts in (2, 4)),
        *((name, 4, 9) for name in ("ring", "ring-zigzag", "ulysses")),  # a host has no rows
    ],
)
def test_gloo_processes_give_the_same_as_threads(name, hosts, tokens):
    method = METHODS[name]
    plan = method.plan(tokens=tokens, hosts=hosts, query=2)
    for got, wanted in zip(everything(run_processes, method, plan), everything(run_threads, method, plan), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
