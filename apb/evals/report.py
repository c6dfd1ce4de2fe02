"""From records to a table: for each model, length and number of hosts, how well the methods answered.

Scores of a task that full attention itself cannot do say nothing about a method, so such tasks are shown, marked and
left out of the mean score. Their likelihoods do say something: NLLs are averaged over all tasks. Unfinished runs are
reported too, and said to be unfinished.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from apb.evals.record import FULL, Record
from apb.evals.statistics import Interval, mean_interval, paired_difference
from apb.methods import METHODS, split_method

__all__ = ["Line", "Report", "Section", "make_report", "split_label"]

_ENDS = (0.0, 1.0)  # of a score


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method in a section.

    Attributes:
        label: what the reader knows it by.
        method: its text.
        hosts: H; 1 for methods of one host, whatever the section's is.
        scores: by task, in [0, 1]; of the samples that were answered.
        samples: by task, how many were.
        mean: score over the section's averaged tasks; None if one of them has no answer yet.
        difference: of that from full attention, on the questions that both have answered; None for itself.
        nll, nll_difference: the same of the likelihoods over all tasks, in nats a token; less is better.
    """

    label: str
    method: str
    hosts: int
    scores: dict[str, Interval]
    samples: dict[str, int]
    mean: Interval | None
    difference: Interval | None
    nll: Interval | None
    nll_difference: Interval | None


@dataclass(frozen=True, kw_only=True)
class Section:
    """Everything about one model, length and number of hosts.

    Attributes:
        tasks: in the order of their columns.
        left_out: those of them that full attention cannot do.
        lines: full attention first.
        notes: what a reader must know besides, such as what is unfinished.
    """

    model: str
    length: int
    hosts: int
    tasks: tuple[str, ...]
    left_out: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def averaged(self) -> tuple[str, ...]:
        """The tasks that mean scores are of."""
        return tuple(task for task in self.tasks if task not in self.left_out)

    @property
    def title(self) -> str:
        """Model, length and hosts in words."""
        return f"{self.model}, {self.length:,} tokens, {self.hosts} host{'s' * (self.hosts > 1)}"

    def head(self) -> tuple[str, ...]:
        """Name the table's columns."""
        tasks = (f"{task}*" if task in self.left_out else task for task in self.tasks)
        return ("method", *tasks, "mean", "vs full", "NLL", "NLL vs full")

    def rows(self) -> list[tuple[str, ...]]:
        """Lay out the table's cells, a row a method; – is what is not known."""
        return [
            (
                line.label,
                *(f"{100 * line.scores[task].value:.1f}" if task in line.scores else "–" for task in self.tasks),
                _figure(line.mean, "{:.1f}", 100),
                _with_interval(line.difference, "{:+.1f}", 100),
                _figure(line.nll, "{:.3f}", 1),
                _with_interval(line.nll_difference, "{:+.3f}", 1),
            )
            for line in self.lines
        ]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All sections.

    Attributes:
        threshold: a task that full attention scores below this, in [0, 1], is left out of mean scores.
    """

    sections: tuple[Section, ...]
    threshold: float

    def markdown(self) -> str:
        """Lay the report out as Markdown."""
        parts = []
        for section in self.sections:
            head = section.head()
            places = [":--" if name == "method" else "--:" for name in head]
            rows = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (head, places, *section.rows())]
            parts += [f"**{section.title}**\n", *(f"| {row} |" for row in rows), "", " ".join(section.notes), ""]
        return "\n".join([*parts, self.legend()])

    def json(self, **more: Any) -> str:
        """Return everything as JSON, and `more` with it; what is undefined is null."""
        return json.dumps(_finite(more | asdict(self)), indent=2, ensure_ascii=False)

    def legend(self) -> str:
        """Say what the columns mean."""
        star = " but those with a *" if any(section.left_out for section in self.sections) else ""
        return (
            f"Scores in %; mean is over all tasks{star}. NLL: of the right answer, in nats a token, over all tasks; "
            f"less is better. vs full: the difference from full attention on the same questions [its 95 % interval]. "
            f"Intervals are from drawing the questions anew; those of scores allow for one more that goes as far up or "
            f"down as can be, so that no change in any of n questions is [−3.7 / n, +3.7 / n], not [0, 0]."
        )


def make_report(
    records: Iterable[Record],
    *,
    labels: Mapping[str, str] | None = None,
    threshold: float = 0.5,
    resamples: int = 10_000,
) -> Report:
    """Make the report of an evaluation, finished or not.

    Args:
        records: of any models, methods, lengths and hosts. Methods of one host are held against those of any.
        labels: what to call methods, by their text; lines come in this order, then in that of the records.
        threshold: tasks that full attention scores below it are left out of mean scores.
        resamples: how often samples are drawn anew for the intervals.

    Raises:
        ValueError: no records, or a threshold that is no share.
    """
    records, labels = list(records), dict(labels or {})
    if not records:
        raise ValueError("records: there are none to report; run the evaluation first")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a share in [0, 1], got {threshold}")
    methods = list(dict.fromkeys([FULL, *labels, *(record.method for record in records)]))
    sections = []
    for model in dict.fromkeys(record.model for record in records):
        for length in sorted({record.length for record in records if record.model == model}):
            here = [record for record in records if (record.model, record.length) == (model, length)]
            several = sorted({record.hosts for record in here if not _alone(record.method)})
            for hosts in several or [1]:
                seen = [record for record in here if record.hosts == hosts or _alone(record.method)]
                by_method = {method: [r for r in seen if r.method == method] for method in methods}
                sections.append(_section(model, length, hosts, by_method, labels, threshold, resamples))
    return Report(sections=tuple(sections), threshold=threshold)


def split_label(text: str) -> tuple[str, str]:
    """Split "LABEL@METHOD" into the method and what to call it; without a label a method is called by its text.

    What begins with a method's name, at its end or before a colon, is a method; else the first @ ends the label.

    >>> split_label("APB, nothing passed@apb:passing=0")
    ('apb:passing=0', 'APB, nothing passed')
    >>> split_label("apb:heads=heads@3000.pt")
    ('apb:heads=heads@3000.pt', 'apb:heads=heads@3000.pt')
    """
    if split_method(text)[0] in METHODS or "@" not in text:
        return text, text
    label, _, method = text.partition("@")
    if not label.strip():
        raise ValueError(f"methods: expected a label before the @, got {text!r}; write 'LABEL@METHOD', or METHOD alone")
    return method, label.strip()


def _alone(method: str) -> bool:
    """Say whether a method is one of one host."""
    name = split_method(method)[0]
    return name in METHODS and METHODS[name].one_host


def _section(
    model: str,
    length: int,
    hosts: int,
    by_method: Mapping[str, list[Record]],
    labels: Mapping[str, str],
    threshold: float,
    resamples: int,
) -> Section:
    tasks = tuple(dict.fromkeys(record.task for records in by_method.values() for record in records))
    asked = {task: {r.seed for records in by_method.values() for r in records if r.task == task} for task in tasks}
    full = by_method[FULL]
    scored = {task: [r.score for r in full if r.task == task] for task in tasks}
    left_out = tuple(task for task, scores in scored.items() if scores and sum(scores) / len(scores) < threshold)
    averaged = [task for task in tasks if task not in left_out]
    lines, notes = [], []
    for method, records in by_method.items():
        if not records:
            continue
        label = labels.get(method, method)
        label = "full attention" if label == FULL else label
        lines.append(_line(label, records, full, tasks, averaged, resamples))
        short = [f"{task} {n} of {len(asked[task])}" for task, n in lines[-1].samples.items() if n < len(asked[task])]
        if short:
            notes.append(f"{label}: unfinished ({', '.join(short)}); vs full is of the questions that both answered.")
    if not full:
        notes.append("Full attention has not been run, so there are no differences and no task is left out.")
    if left_out:
        notes.append(
            f"Left out of mean scores: {', '.join(left_out)}, which full attention scores below {threshold:.0%}."
        )
    if not averaged:
        notes.append("There is no mean score: full attention can do none of the tasks.")
    if any(len(seeds) < 2 for seeds in asked.values()):
        notes.append("Intervals are undefined where a task has one sample.")
    sizes = sorted({len(seeds) for seeds in asked.values()})
    notes.insert(0, f"{'–'.join(map(str, sizes[:: max(1, len(sizes) - 1)]))} samples a task.")
    return Section(
        model=model, length=length, hosts=hosts, tasks=tasks, left_out=left_out, lines=tuple(lines), notes=tuple(notes)
    )


def _line(
    label: str, records: list[Record], full: list[Record], tasks: Sequence[str], averaged: list[str], resamples: int
) -> Line:
    by_task = {task: [record for record in records if record.task == task] for task in tasks}
    others = [] if records[0].method == FULL else full
    return Line(
        label=label,
        method=records[0].method,
        hosts=records[0].hosts,
        scores={
            task: mean_interval({task: [record.score for record in answered]}, ends=_ENDS, resamples=resamples)
            for task, answered in by_task.items()
            if answered
        },
        samples={task: len(answered) for task, answered in by_task.items()},
        mean=_mean(by_task, averaged, "score", resamples),
        difference=_difference(records, others, averaged, "score", resamples),
        nll=_mean(by_task, tasks, "nll", resamples),
        nll_difference=_difference(records, others, tasks, "nll", resamples),
    )


def _mean(
    by_task: Mapping[str, list[Record]], tasks: Sequence[str], value: Literal["score", "nll"], resamples: int
) -> Interval | None:
    """Return the mean over `tasks`; None if there are none, or one has no answer."""
    if not tasks or not all(by_task[task] for task in tasks):
        return None
    values = {task: [getattr(record, value) for record in by_task[task]] for task in tasks}
    return mean_interval(values, ends=_ENDS if value == "score" else None, resamples=resamples)


def _difference(
    ours: list[Record], theirs: list[Record], tasks: Sequence[str], value: Literal["score", "nll"], resamples: int
) -> Interval | None:
    """Return the difference over `tasks` on what both have answered; None if there are none, or that is none of one."""
    both = {(r.task, r.seed) for r in ours} & {(r.task, r.seed) for r in theirs}
    if not tasks or not {task for task, _ in both} >= set(tasks):
        return None
    a, b = ([r for r in records if r.task in tasks and (r.task, r.seed) in both] for records in (ours, theirs))
    return paired_difference(a, b, value, resamples=resamples)


def _figure(interval: Interval | None, form: str, factor: float) -> str:
    return "–" if interval is None or math.isnan(interval.value) else form.format(factor * interval.value)


def _with_interval(interval: Interval | None, form: str, factor: float) -> str:
    value = _figure(interval, form, factor)
    if interval is None or value == "–":
        return value
    if math.isnan(interval.low):
        return f"{value} [undefined]"
    return f"{value} [{form.format(factor * interval.low)}, {form.format(factor * interval.high)}]"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
