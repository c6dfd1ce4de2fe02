"""Star Attention and APE: each equals its mask, its formula, and its relatives at their limits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.compress import KeyNorm
from apb.context import Context
from apb.costs import LLAMA_3_1_8B
from apb.methods import APB, APE, Star
from apb.parallel import run_threads
from apb.reference import apb_mask, ape_mask, ape_mix, attention, causal_mask, star_mask
from apb.testing.strategies import (
    ODD_HEADS,
    SEEDS,
    held_rows,
    lse_rounding,
    method_plans,
    peaked,
    prefill_document,
)

EXACT = {"atol": 1e-9, "rtol": 0}
SHAPE = LLAMA_3_1_8B


def as_rows(text):
    return [[cell == "#" for cell in line] for line in text.split()]


def test_the_masks_are_these():
    star = "#..... ##.... ###... ##.#.. ##.##. ##.###"
    assert star_mask(6, 2, 2).tolist() == as_rows(star)
    ape = "#..... ##.... ###... #..#.. #..##. #....#"
    assert ape_mask(6, 3, 1).tolist() == as_rows(ape)
    assert causal_mask(3).tolist() == as_rows("#.. ##. ###")


@given(tokens=st.integers(1, 30), hosts=st.integers(1, 8), data=st.data())
def test_masks_at_their_limits(tokens, hosts, data):
    anchor = data.draw(st.integers(0, -(-tokens // hosts)))
    assert torch.equal(causal_mask(tokens), apb_mask(tokens, tokens, 0, 0))
    assert torch.equal(star_mask(tokens, 1, anchor), causal_mask(tokens))
    assert torch.equal(star_mask(tokens, hosts, 0), ape_mask(tokens, hosts, 0))
    assert torch.equal(ape_mask(tokens, 1, anchor), causal_mask(tokens))
    assert torch.equal(ape_mask(tokens, hosts, tokens), causal_mask(tokens))


# Star.


@given(case=method_plans(("star",)), seed=SEEDS, heads=ODD_HEADS)
def test_star_equals_its_mask(case, seed, heads):
    method, plan = case
    rows = peaked(seed, plan.tokens, heads=heads, batch=2)
    anchor = -(-plan.tokens // plan.hosts) if method.anchor is None else method.anchor
    truth, _ = attention(*rows, star_mask(plan.tokens, plan.hosts, anchor))
    out, anchors, counted = prefill_document(method, plan, rows)
    torch.testing.assert_close(out, truth, **EXACT)
    for mine in anchors:
        torch.testing.assert_close(mine, truth[:, :, :anchor], **EXACT)
    assert all(not sent and not messages for _, sent, messages in counted)


@given(tokens=st.integers(1, 40), seed=SEEDS)
def test_star_on_one_host_is_exact_and_without_an_anchor_block_local(tokens, seed):
    rows = peaked(seed, tokens)
    out, _, _ = prefill_document(Star(), Star().plan(tokens=tokens, hosts=1), rows)
    torch.testing.assert_close(out, attention(*rows, causal_mask(tokens))[0], **EXACT)
    local = Star(anchor=0)
    out, anchors, _ = prefill_document(local, local.plan(tokens=tokens, hosts=3), rows)
    assert not anchors
    size = -(-tokens // 3)
    for start in range(0, tokens, size):
        block = [x[:, :, start : start + size] for x in rows]
        torch.testing.assert_close(
            out[:, :, start : start + size], attention(*block, causal_mask(block[0].shape[2]))[0], **EXACT
        )


@given(case=method_plans(("star",)), seed=SEEDS, query_in=st.sampled_from(["after", "anchor"]))
def test_apb_with_nothing_passed_and_no_question_inside_is_star(case, seed, query_in):
    """The same plan but for what it says of the question, the same rows, the same bits."""
    star, plan = case
    asked = 0 if query_in == "anchor" else plan.query
    apb = APB(anchor=plan.anchor, passing=0, compressor=KeyNorm(), query_in=query_in)
    other = apb.plan(tokens=plan.tokens, hosts=plan.hosts, query=asked)
    assert replace(other, query_in="after", query=plan.query) == plan
    rows = peaked(seed, plan.tokens, batch=2)
    mine, theirs = prefill_document(star, plan, rows), prefill_document(apb, other, rows)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert [star.cost(plan, r, SHAPE) for r in range(plan.hosts)] == [
        apb.cost(other, r, SHAPE) for r in range(plan.hosts)
    ]


# APE.


@given(case=method_plans(("ape",)), seed=SEEDS, heads=ODD_HEADS)
def test_ape_equals_its_mask(case, seed, heads):
    method, plan = case
    rows = peaked(seed, plan.tokens, heads=heads, batch=2)
    truth, _ = attention(*rows, ape_mask(plan.tokens, plan.hosts, method.prefix))
    out, anchors, counted = prefill_document(method, plan, rows)
    torch.testing.assert_close(out, truth, **EXACT)
    for mine in anchors:
        torch.testing.assert_close(mine, truth[:, :, : method.prefix], **EXACT)
    assert all(not sent and not messages for _, sent, messages in counted)


def ask(method, hosts, document, new):
    """Let new rows attend to a document that these many hosts hold."""
    plan = method.plan(tokens=document[0].shape[2], hosts=hosts)

    def body(host):
        k, v = (held_rows(plan, host.rank, document[i]) for i in (1, 2))
        if host.rank == hosts - 1:
            k, v = (torch.cat((x, new[i]), dim=2) for i, x in ((1, k), (2, v)))
        return method.decode(new[0], k, v, Context(plan, host, scale=0.3))

    return run_threads(hosts, body)


@settings(max_examples=20)
@given(tokens=st.integers(1, 30), rows=st.integers(1, 4), seed=SEEDS, data=st.data())
def test_the_power_applies_once_however_the_contexts_are_spread(tokens, rows, seed, data):
    """One host, four, and more than there are tokens give the formula, with the scale of the context."""
    factors = st.sampled_from([0.2, 0.9, 1.0, 2.5])
    method = APE(prefix=data.draw(st.integers(0, tokens)), temperature=data.draw(factors), scale=data.draw(factors))
    drawn = peaked(seed, tokens + rows, heads=(6, 2), batch=2)
    document, new = (tuple(x[:, :, part] for x in drawn) for part in (slice(tokens), slice(tokens, None)))
    contexts = tuple(x[:, :, method.prefix :] for x in document[1:])
    other = tuple(torch.cat((document[i][:, :, : method.prefix], new[i]), dim=2) for i in (1, 2))
    settings_ = {"temperature": method.temperature, "scale": method.scale, "softmax_scale": 0.3}
    truth = ape_mix(new[0], contexts, other, **settings_)
    everything = torch.ones(rows, tokens - method.prefix, dtype=torch.bool)
    _, sharp = attention(new[0], *contexts, everything, 0.3 / method.temperature)
    _, plain = attention(new[0], *other, causal_mask(other[0].shape[2])[-rows:], 0.3)
    lse = torch.cat((max(1.0, method.scale * method.temperature) * sharp, plain))
    for hosts in (1, 4, 7):
        for out in ask(method, hosts, document, new):
            torch.testing.assert_close(out, truth, **lse_rounding(lse, drawn[2], hosts + 1))


@given(tokens=st.integers(1, 30), hosts=st.integers(1, 5), rows=st.integers(1, 3), seed=SEEDS, data=st.data())
def test_without_temperature_and_scale_ape_asks_all_keys_exactly(tokens, hosts, rows, seed, data):
    method = APE(prefix=data.draw(st.integers(0, tokens)), temperature=1, scale=1.0)
    drawn = peaked(seed, tokens + rows, batch=2)
    document, new = (tuple(x[:, :, part] for x in drawn) for part in (slice(tokens), slice(tokens, None)))
    truth, lse = attention(new[0], *drawn[1:], causal_mask(tokens + rows)[tokens:], 0.3)
    for out in ask(method, hosts, document, new):
        torch.testing.assert_close(out, truth, **lse_rounding(lse, drawn[2], hosts + 1))


@pytest.mark.parametrize(("temperature", "scale"), [(0.5, 1.0), (1.0, 0.5)])
def test_temperature_sharpens_and_scale_turns_down(temperature, scale):
    """By hand: two context keys with scores 2 and 0, one other key with score 1; values are unit vectors."""
    q, eye = torch.zeros(1, 1, 1, 16, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    q[..., 0] = 1
    k = torch.zeros(1, 1, 3, 16, dtype=torch.float64)
    k[0, 0, :, 0] = torch.tensor([2.0, 0.0, 1.0])
    v = eye[None, None, :3]
    got = ape_mix(q, (k[:, :, :2], v[:, :, :2]), (k[:, :, 2:], v[:, :, 2:]), temperature=temperature, scale=scale,
                  softmax_scale=1.0)[0, 0, 0, :3]  # fmt: skip
    sharp = torch.tensor([2.0, 0.0], dtype=torch.float64).div(temperature).exp()
    weight, other = sharp.sum() ** (scale * temperature), torch.e**1.0
    expected = [*(weight / (weight + other) * sharp / sharp.sum()), other / (weight + other)]
    torch.testing.assert_close(got, torch.stack([torch.as_tensor(x) for x in expected]), **EXACT)


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"temperature": 0}, "temperature: expected a number > 0, got 0"),
        ({"temperature": float("nan")}, "temperature: expected a number > 0, got nan"),
        ({"scale": -1.0}, "scale: expected a number > 0, got -1.0; 1 changes nothing"),
        ({"scale": True}, "scale: expected a number > 0, got True"),
        ({"prefix": -1}, "prefix: expected an integer ≥ 0, got -1"),
        ({"prefix": 2.0}, "prefix: expected an integer ≥ 0, got 2.0"),
        ({"prefix": 31}, "prefix: 31 tokens, expected at most the document's 30"),
    ],
)
def test_what_ape_cannot_be_is_refused(settings_, says):
    with pytest.raises(ValueError, match=says):
        APE(**settings_).plan(tokens=30, hosts=2)
