"""How sure a score is: bootstrap intervals for means over tasks, and for differences on the same questions.

The figure of interest is the mean over tasks of the mean over samples, m = 1/T · Σ_t 1/n_t · Σ_i x_ti. Samples are
drawn anew within each task, since tasks are fixed and samples are not. n_t − 1 of them are drawn each time, with
replacement: then the variance of the resampled mean is the usual unbiased s²/n_t also where n_t is small (Rao and Wu,
1988).

Drawing anew knows only values that were seen: of 20 right answers it makes an interval of no width, though the truth
may be 85 %. A score has ends, and so a worst case: one answer more, not seen, at the end of the range. The T tasks
share it: a resampled mean m_t of each moves by u_t · (end − m_t), u_t ~ Beta(1/T, n_t), down to the lower end for the
interval's low, up to the upper end for its high. For one task without spread that is the exact bound of Clopper and
Pearson (1934), 1 − (α/2)^(1/n), about 3.7 / n (the "rule of three": Hanley and Lippman-Hand, 1983); for T of them it is
about 3.7 / Σ_t n_t; and where values spread, that spread soon exceeds it by far. The further point at the end of the
range is from Gaffke's (2005) bound for the mean of a bounded variable. Likelihoods have no ends: the draws alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from apb.evals.record import Record

__all__ = ["Interval", "mean_interval", "paired_difference"]

Value = Literal["score", "nll"]

_DRAWS = 1 << 21  # at once, which bounds the memory


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure and where it would lie with other samples.

    Attributes:
        value: the figure.
        low, high: ends of the interval; NaN where one sample or none makes it undefined.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; an undefined interval excludes nothing."""
        return self.low > 0 or self.high < 0


def mean_interval(
    values_by_task: Mapping[Any, Sequence[float]],
    *,
    ends: tuple[float, float] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over tasks of the mean over samples, with its interval.

    Twenty right answers of twenty say that at least 83 % are right:

    >>> found = mean_interval({"a": [1.0] * 20}, ends=(0, 1))
    >>> f"{found.value} [{found.low:.2f}, {found.high}]"
    '1.0 [0.83, 1.0]'

    Args:
        values_by_task: the samples' scores or likelihoods; at least one of each task.
        ends: least and greatest value that a sample can have, such as (0, 1) for scores; with them an interval has a
            width also where all values are equal. Without them (likelihoods) it has none there.
        level: share of such intervals that hold the true mean.
        resamples: how often to draw samples anew.
        seed: of the draws.

    Returns:
        The mean and its interval, undefined (NaN) if a task has one sample only.

    Raises:
        ValueError: no task, a task without samples, or a value beyond the ends.
    """
    if not values_by_task:
        raise ValueError("values_by_task: expected at least one task, got none")
    empty = [str(task) for task, values in values_by_task.items() if not len(values)]
    if empty:
        raise ValueError(f"values_by_task: expected at least one sample of each task, got none of {', '.join(empty)}")
    tasks = [np.asarray(values, dtype=np.float64) for values in values_by_task.values()]
    least, greatest = ends or (0.0, 0.0)
    beyond = [value for values in tasks for value in values if value < least or value > greatest]
    if ends and beyond:
        raise ValueError(
            f"values_by_task: expected values between the ends, {least:g} and {greatest:g}, got {beyond[0]:g}"
        )
    mean = float(np.mean([values.mean() for values in tasks]))
    if math.isnan(mean) or min(map(len, tasks)) < 2:
        return Interval(value=mean, low=math.nan, high=math.nan)
    random = np.random.default_rng(seed)
    lows, highs = np.zeros(resamples), np.zeros(resamples)
    for values in tasks:
        means = _resampled_means(values, resamples, random)
        unseen = random.beta(1 / len(tasks), len(values), size=resamples) if ends else 0.0
        lows += means - unseen * (means - least)
        highs += means + unseen * (greatest - means)
    low, high = np.quantile(lows / len(tasks), (1 - level) / 2), np.quantile(highs / len(tasks), (1 + level) / 2)
    return Interval(value=mean, low=float(low), high=float(high))


def paired_difference(
    a: Iterable[Record],
    b: Iterable[Record],
    value: Value = "score",
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return how much `a` exceeds `b` on the same questions, with its interval.

    Both answer the same samples, so what makes a sample hard cancels out; samples are drawn anew as pairs. A difference
    of scores has the ends −1 and 1: no change in any of n pairs gives about ±3.7 / n (one task), not [0, 0].

    Args:
        a, b: records of one method each, for the same (length, task, seed).
        value: which figure of them.
        level, resamples, seed: as in `mean_interval`; each (length, task) counts as a task.

    Raises:
        ValueError: a question that only one of them has, or that one has twice.
    """
    first, second = _by_question(a, "a"), _by_question(b, "b")
    for name, missing in (("a", second.keys() - first.keys()), ("b", first.keys() - second.keys())):
        if missing:
            questions = "; ".join(f"length {n}, {task}, seed {seed}" for n, task, seed in sorted(missing)[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"{name}: expected the same questions as the other has, but it lacks {questions}{more}")
    differences: dict[tuple[int, str], list[float]] = {}
    for question, record in first.items():
        difference = getattr(record, value) - getattr(second[question], value)
        differences.setdefault(question[:2], []).append(difference)
    ends = (-1.0, 1.0) if value == "score" else None
    return mean_interval(differences, ends=ends, level=level, resamples=resamples, seed=seed)


def _by_question(records: Iterable[Record], name: str) -> dict[tuple[int, str, int], Record]:
    found: dict[tuple[int, str, int], Record] = {}
    for record in records:
        question = record.length, record.task, record.seed
        if question in found:
            raise ValueError(
                f"{name}: expected one method's records, but length {question[0]}, {question[1]}, seed {question[2]} "
                f"comes twice ({found[question].method} on {found[question].hosts}, {record.method} on {record.hosts})"
            )
        found[question] = record
    return found


def _resampled_means(
    values: Float[np.ndarray, " samples"], resamples: int, random: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    """Return the means of `resamples` draws of n − 1 of the n values, with replacement."""
    n = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) == 1:
        return np.full(resamples, values[0])
    if len(distinct) <= 16:  # scores: how often each value is drawn says it all
        return random.multinomial(n - 1, counts / n, size=resamples) @ distinct / (n - 1)
    means = np.empty(resamples)
    step = max(1, _DRAWS // n)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = random.integers(0, n, size=(size, n - 1), dtype=np.uint16 if n < 1 << 16 else np.int64)
        means[start : start + size] = values[drawn].mean(axis=1)
    return means
