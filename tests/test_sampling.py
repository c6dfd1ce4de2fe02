"""Draws depend on seed, step and logits alone, and follow the distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.sampling import Sampling
from apb.testing.strategies import SEEDS


def draw(seed, rows=3, vocab=11, values=None):
    generator = torch.Generator().manual_seed(seed)
    if values:  # few different ones: ties
        return torch.randint(values, (rows, vocab), generator=generator).float()
    return 3 * torch.randn(rows, vocab, generator=generator)


def allowed(logits, temperature, top_k, top_p):
    """Return the tokens that may be drawn and their probabilities, by plain arithmetic on lists."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    best = max(logits)
    mass = [2.718281828459045 ** ((logits[i] - best) / temperature) for i in order]
    total, kept, upto = sum(mass), [], 0.0
    for i, m in zip(order, mass, strict=True):
        if upto >= (2 if top_p is None else top_p):
            break
        kept.append((i, m / total))
        upto += m / total
    whole = sum(m for _, m in kept)
    return {i: m / whole for i, m in kept}


@given(
    seed=SEEDS,
    step=st.integers(0, 500),
    temperature=st.sampled_from([1e-3, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    top_p=st.sampled_from([None, 0.1, 0.7, 1.0]),
    values=st.sampled_from([None, 2]),
)
def test_only_allowed_tokens_are_drawn_and_a_row_does_not_know_its_batch(seed, step, temperature, top_k, top_p, values):
    logits = draw(seed, values=values)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    chosen = sampling.choose(logits, step)
    assert torch.equal(chosen, sampling.choose(logits, step))
    for row, token in zip(logits, chosen.tolist(), strict=True):
        assert sampling.choose(row[None], step).item() == token
        assert token in allowed(row.tolist(), temperature, top_k, top_p)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 4, "top_p": 0.9}])
def test_draws_follow_the_distribution(settings):
    logits = draw(5, rows=1, vocab=6) / 3
    sampling, count = Sampling(temperature=0.8, seed=7, **settings), 4000
    found = (
        torch.bincount(torch.cat([sampling.choose(logits, step) for step in range(count)]), minlength=6).double()
        / count
    )
    expected = torch.zeros(6, dtype=torch.float64)
    for token, p in allowed(logits[0].tolist(), 0.8, settings.get("top_k"), settings.get("top_p")).items():
        expected[token] = p
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard deviations
    assert torch.equal(found > 0, expected > 0)


@given(seed=SEEDS, values=st.sampled_from([None, 2]))
def test_greedy_is_the_limit(seed, values):
    logits = draw(seed, values=values)
    greedy = Sampling().choose(logits, 0)
    assert torch.equal(greedy, logits.argmax(dim=-1))
    for settings in ({"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-9}):
        assert torch.equal(Sampling(**settings).choose(logits, 3), logits.argmax(dim=-1))
    if values is None:
        assert torch.equal(Sampling(temperature=1e-9).choose(logits, 3), greedy)


def test_seeds_and_steps_differ():
    logits = torch.zeros(1, 1000)
    assert len({Sampling(temperature=1.0, seed=s).choose(logits, 0).item() for s in range(20)}) > 15
    assert len({Sampling(temperature=1.0).choose(logits, step).item() for step in range(20)}) > 15


@given(seed=SEEDS, step=st.integers(0, 500))
def test_rows_share_one_seed_or_have_their_own(seed, step):
    row = draw(seed, rows=1, vocab=200)
    rows = row.expand(8, -1)
    assert len(set(Sampling(temperature=3.0, seed=seed).choose(rows, step).tolist())) == 1
    seeds = tuple(range(seed, seed + 8))
    own = Sampling(temperature=3.0, seed=seeds)
    chosen = own.choose(rows, step)
    assert len(set(chosen.tolist())) > 1
    assert chosen.tolist() == [Sampling(temperature=3.0, seed=s).choose(row, step).item() for s in seeds]
    assert torch.equal(own.for_rows([6, 1]).choose(rows[:2], step), chosen[[6, 1]])


def test_another_number_of_seeds_than_rows_is_refused():
    with pytest.raises(ValueError, match="seed: expected one, or one for each of the 3 rows, got 2"):
        Sampling(temperature=1.0, seed=(1, 2)).choose(draw(0), 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -1}, "temperature: expected a number ≥ 0, got -1"),
        ({"temperature": float("nan")}, "temperature: expected a number ≥ 0, got nan"),
        ({"temperature": float("inf")}, "temperature: expected a number ≥ 0, got inf"),
        ({"temperature": "warm"}, "temperature: expected a number ≥ 0, got 'warm'"),
        ({"temperature": 1, "top_k": 0}, "top_k: expected an integer ≥ 1, got 0"),
        ({"temperature": 1, "top_k": 2.0}, "top_k: expected an integer ≥ 1, got 2.0"),
        ({"temperature": 1, "top_p": 0}, "top_p: expected a number > 0 and ≤ 1, got 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p: expected a number > 0 and ≤ 1, got 1.5"),
        ({"top_p": 0.5}, "top_p: 0.5 changes nothing at temperature 0"),
        ({"top_k": 5}, "top_k: 5 changes nothing at temperature 0"),
        ({"seed": 0.5}, "seed: expected an integer, or a tuple of one for each row, got 0.5"),
    ],
)
def test_settings_that_cannot_be_say_why(settings, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**settings)
