"""Intervals hold the truth as often as they say, pairs narrow them, and what is undefined is said to be."""

import doctest
import math

import numpy as np
import pytest

import apb.evals.statistics
from apb.evals.record import Record
from apb.evals.statistics import mean_interval, paired_difference


def records(values, method="apb", task="vt", nll=0.0, seeds=None):
    return [
        Record(model="m", method=method, hosts=4, length=512, task=task, seed=seed, score=float(value), nll=nll + value,
               prediction="", references=())
        for seed, value in zip(seeds or range(len(values)), values, strict=True)
    ]  # fmt: skip


def test_examples():
    assert doctest.testmod(apb.evals.statistics).failed == 0


def test_a_case_counted_by_hand():
    """Of 0 0 1, two are drawn: means 0, ½ and 1 with chances 4/9, 4/9 and 1/9. The task without spread halves them."""
    found = mean_interval({"a": [0, 0, 1], "b": [1, 1]})
    assert found.value == pytest.approx((1 / 3 + 1) / 2)
    assert (found.low, found.high) == (0.5, 1.0)
    assert mean_interval({"a": [0, 0, 1]}, level=0.70).high == 0.5  # 8/9 of the means are at most that
    assert mean_interval({"a": [0, 0, 1]}, level=0.85).high == 1.0


def test_tasks_count_alike_whatever_their_samples():
    found = mean_interval({"a": [1.0] * 2, "b": [0.0] * 98})
    assert found.value == found.low == found.high == 0.5


@pytest.mark.parametrize("shares", [(0.5,), (0.9, 0.6, 0.3), (0.8,) * 5])
def test_of_95_percent_intervals_92_to_98_percent_hold_the_truth(shares):
    random, held, runs = np.random.default_rng(0), 0, 600
    for run in range(runs):
        scores = {task: (random.random(50) < share).astype(float) for task, share in enumerate(shares)}
        found = mean_interval(scores, resamples=1000, seed=run)
        held += found.low <= np.mean(shares) <= found.high
    assert 0.92 <= held / runs <= 0.98


def binomial(k, n, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.97, 0.99])
def test_intervals_of_scores_hold_the_truth_near_1_and_near_0(n, p):
    """Counted, not drawn: the chance of each number of right answers, over those whose interval holds the truth."""
    held = {p: 0.0, 1 - p: 0.0}
    for right in range(n + 1):
        found = mean_interval({"t": [1.0] * right + [0.0] * (n - right)}, ends=(0, 1), resamples=2000)
        for truth in held:
            held[truth] += binomial(right, n, truth) * (found.low <= truth <= found.high)
    assert min(held.values()) >= 0.94


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize("shares", [(0.97, 0.97), (0.9, 0.97), (1.0, 0.97), (0.97, 0.999)])
def test_intervals_of_paired_scores_hold_the_truth_near_1(n, shares):
    a, b = shares
    better, worse, held, sure = a * (1 - b), b * (1 - a), 0.0, 0.0
    for up in range(n + 1):
        for down in range(n + 1 - up):
            chance = math.comb(n, up) * math.comb(n - up, down) * better**up * worse**down
            chance *= (1 - better - worse) ** (n - up - down)
            if chance < 1e-5:
                continue
            ones = records([1.0] * up + [0.0] * (n - up)), records([0.0] * up + [1.0] * down + [0.0] * (n - up - down))
            found = paired_difference(*ones, resamples=2000)
            held += chance * (found.low <= a - b <= found.high)
            sure += chance * found.excludes_zero
    assert held >= 0.94
    assert a != b or sure <= 0.05


@pytest.mark.parametrize("tasks", [1, 5])
@pytest.mark.parametrize("n", [20, 50, 400])
def test_no_change_in_any_of_n_questions_is_the_rule_of_three(tasks, n):
    found = mean_interval(dict.fromkeys(range(tasks), [0.0] * n), ends=(-1, 1))
    exact = 1 - 0.025 ** (1 / (tasks * n))  # Clopper and Pearson's, were all questions of one task
    assert found.value == 0 and not found.excludes_zero
    assert found.high == pytest.approx(exact, rel=0.1) and found.low == pytest.approx(-exact, rel=0.1)


def test_ends_hardly_widen_what_spreads():
    random = np.random.default_rng(0)
    for tasks, most in ((1, 1.1), (10, 1.04)):
        values = {task: (random.random(200) < 0.8).astype(float) for task in range(tasks)}
        alone, bounded = mean_interval(values), mean_interval(values, ends=(0, 1))
        assert alone.high - alone.low <= bounded.high - bounded.low <= most * (alone.high - alone.low)


def test_few_samples_of_many_tasks_do_not_narrow_the_interval():
    """Drawing n of n again would see 2/3 of the variance at n = 3, and hold the truth 89 times in 100."""
    random, held, runs = np.random.default_rng(0), 0, 400
    for run in range(runs):
        values = {task: random.normal(size=3) for task in range(13)}
        found = mean_interval(values, resamples=400, seed=run)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / runs <= 0.98


def test_discrete_and_continuous_draws_agree():
    values = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    jittered = values + np.linspace(0, 1e-9, 60)  # 60 distinct values
    a, b = mean_interval({"t": values}), mean_interval({"t": jittered})
    assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.02)


def test_the_same_seed_gives_the_same_interval_and_another_nearly_so():
    values = {"t": np.random.default_rng(0).random(100)}
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    other = mean_interval(values, seed=2)
    assert other != mean_interval(values, seed=1)
    assert other.low == pytest.approx(mean_interval(values, seed=1).low, abs=0.01)


def test_ten_tasks_of_500_take_less_than_a_second():
    import time

    random = np.random.default_rng(0)
    started = time.process_time()
    mean_interval({task: random.random(500) for task in range(10)})
    assert time.process_time() - started < 2  # 0.4 s; the machine may be busy


def test_pairs_are_narrower_where_the_same_questions_are_hard():
    random = np.random.default_rng(0)
    hard = random.random(200)
    a, b = (hard < 0.7).astype(float), (hard < 0.6).astype(float)
    paired = paired_difference(records(a), records(b, "flash"))
    assert paired.value == pytest.approx(a.mean() - b.mean())
    alone = [mean_interval({"vt": x}) for x in (a, b)]
    unpaired = math.hypot(*(found.high - found.low for found in alone))
    assert paired.high - paired.low < unpaired / 2
    assert paired.excludes_zero


def test_equal_answers_differ_by_nothing_but_may_on_other_questions():
    values = np.random.default_rng(0).random(50)
    found = paired_difference(records(values), records(values, "flash"))
    assert found.value == 0 and not found.excludes_zero
    assert found.low == pytest.approx(-3.7 / 50, rel=0.1) and found.high == pytest.approx(3.7 / 50, rel=0.1)
    assert paired_difference(records([0.0] * 20), records([1.0] * 20)).excludes_zero  # all of twenty changed


def test_pairs_are_of_one_question_whatever_the_order():
    values = np.random.default_rng(0).random(50)
    mine, theirs = records(values), records(values, "flash")
    assert paired_difference(mine, theirs[::-1]) == paired_difference(mine, theirs)


def test_likelihoods_differ_by_a_constant():
    values = np.full(20, 0.25)
    found = paired_difference(records(values, nll=0.5), records(values, "flash"), "nll")
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_one_sample_leaves_the_interval_undefined():
    for values in ({"t": [1.0]}, {"t": [1.0], "u": [0.0, 1.0]}):
        found = mean_interval(values)
        assert math.isnan(found.low) and math.isnan(found.high) and not math.isnan(found.value)
        assert not found.excludes_zero


def test_a_likelihood_that_is_no_number_leaves_all_undefined():
    found = mean_interval({"t": [1.0, math.nan, 0.5]})
    assert all(math.isnan(x) for x in (found.value, found.low, found.high))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mean_interval({}), "expected at least one task"),
        (lambda: mean_interval({"a": [1.0], "vt": []}), "got none of vt"),
        (lambda: mean_interval({"a": [1.0, 83.0]}, ends=(0, 1)), "between the ends, 0 and 1, got 83"),
        (lambda: paired_difference(records([1, 0]), records([1])), "b: .* lacks length 512, vt, seed 1"),
        (lambda: paired_difference(records([1]), records([1] * 6)), "a: .* seed 1; .* seed 2; .* seed 3 and 2 more"),
        (lambda: paired_difference(records([1]) * 2, records([1])), r"comes twice \(apb on 4, apb on 4\)"),
    ],
)
def test_errors_name_what_is_missing(call, said):
    with pytest.raises(ValueError, match=said):
        call()
