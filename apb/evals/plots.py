"""Pictures of a report: the methods' scores with their intervals, and score against budget."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from apb.evals.record import FULL
from apb.evals.report import Line, Report, Section
from apb.evals.statistics import Interval
from apb.methods import split_method
from apb.viz import check_picture

__all__ = ["Budget", "budget_curve", "dots", "has_curve"]

Budget = Literal["passing", "anchor"]

_COLOURS = ("#4878a8", "#e8a33d", "#4f9d69", "#b0578d", "#7a6a58", "#3b3b98")
_MARKS = ("o", "s", "^", "D", "v", "P")


def dots(report: Report, path: str | Path) -> Path:
    """Draw each method's mean score as a dot and its 95 % interval as a whisker, a panel a length and number of hosts.

    Args:
        report: what to draw.
        path: where to; ends in .svg, .png or .pdf.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another ending, or no such folder.
    """
    path = check_picture(path)
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((section.model, section.length) for section in report.sections))
    columns = sorted({section.hosts for section in report.sections})
    heights = [0.9 + 0.28 * max(len(s.lines) for s in report.sections if (s.model, s.length) == row) for row in rows]
    figure = Figure(figsize=(2.2 + 4.4 * len(columns), 0.6 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, height_ratios=heights)
    for panel in grid.flat:
        panel.set_visible(False)
    for section in report.sections:
        row, column = rows.index((section.model, section.length)), columns.index(section.hosts)
        _dots(grid[row, column], section, names=column == 0)
    models = " / ".join(dict.fromkeys(section.model.rstrip("/").rpartition("/")[2] for section in report.sections))
    figure.suptitle(models, x=0.01, ha="left")
    figure.supxlabel("mean score over tasks, % (whisker: 95 % interval; dashed: full attention)", fontsize=9)
    figure.savefig(path)
    return path


def has_curve(report: Report, budget: Budget) -> bool:
    """Say whether any method was run with two budgets or more, all tokens or all fractions of a block."""
    return any(len(points) > 1 for section in report.sections for points in _families(section, budget).values())


def budget_curve(report: Report, path: str | Path, *, budget: Budget = "passing") -> Path:
    """Draw score and NLL against a budget, for methods that were run with several, a line a length and method.

    Args:
        report: what to draw.
        path: where to; ends in .svg, .png or .pdf.
        budget: which setting in the methods' texts, tokens ("apb:passing=64") or fractions of a block ("1/8").

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no method with two budgets, tokens beside fractions, another ending, or no such folder.
    """
    path = check_picture(path)
    from matplotlib.figure import Figure

    curves = [
        (section, family, points)
        for section in report.sections
        for family, points in _families(section, budget).items()
        if len(points) > 1
    ]
    unit = _unit(curves, budget)
    columns = sorted({section.hosts for section, _, _ in curves})
    lengths = sorted({section.length for section, _, _ in curves})
    families = list(dict.fromkeys(family for _, family, _ in curves))
    figure = Figure(figsize=(2 + 4.4 * len(columns), 6), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False, sharex="col", sharey="row")
    for section, family, points in curves:
        name = f"{section.length:,} tokens" + (f", {family}" if len(families) > 1 else "")
        colour = _COLOURS[lengths.index(section.length) % len(_COLOURS)]
        mark = _MARKS[families.index(family) % len(_MARKS)]
        _draw(list(grid[:, columns.index(section.hosts)]), section, points, label=name, color=colour, marker=mark)
    for hosts, (top, bottom) in zip(columns, grid.T, strict=True):
        top.set_title(f"{hosts} hosts" if hosts > 1 else "1 host", fontsize=10)
        bottom.set_xlabel(f"{budget}, {unit}")
        for panel in (top, bottom):
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(alpha=0.3)
    grid[0, 0].set_ylabel("mean score over tasks, %")
    grid[1, 0].set_ylabel("NLL of the right answer, nats a token")
    grid[0, 0].legend(frameon=False, fontsize=8)
    title = families[0] if len(families) == 1 else "Methods"
    figure.suptitle(f"{title} against {budget} (95 % intervals; dashed: full attention)", x=0.01, ha="left")
    figure.savefig(path)
    return path


def _unit(curves: Sequence[tuple[Section, str, Mapping[str, Line]]], budget: Budget) -> str:
    """Return what the budgets are in; raise if there are none, or some are in the one and some in the other."""
    if not curves:
        raise ValueError(f"budget: expected a method with two values of {budget}, such as apb:{budget}=32 and =64")
    fractions = {"/" in text for _, _, points in curves for text in points if text != "0"}
    if len(fractions) > 1:
        raise ValueError(f"budget: expected {budget} in tokens or in fractions of a block, got both; draw them apart")
    return "fraction of a block" if fractions == {True} else "tokens a block"


def _draw(panels: Sequence[Any], section: Section, points: Mapping[str, Line], *, label: str, **style: Any) -> None:
    """Draw one method's curves, of score above and NLL below, and full attention's values across."""
    top, bottom = panels
    texts = sorted(points, key=Fraction)
    places = [float(Fraction(text)) for text in texts]
    _curve(top, places, [points[text].mean for text in texts], 100, label=label, **style)
    _curve(bottom, places, [points[text].nll for text in texts], 1, **style)
    for line in section.lines:
        if line.method == FULL and line.mean and line.nll:
            top.axhline(100 * line.mean.value, color=style["color"], linestyle="--", linewidth=1)
            bottom.axhline(line.nll.value, color=style["color"], linestyle="--", linewidth=1)


def _dots(panel: Any, section: Section, *, names: bool) -> None:
    panel.set_visible(True)
    for place, line in enumerate(section.lines):
        if line.mean is None:
            why = "unfinished" if section.averaged else "no task that full attention can do"
            panel.text(0.02, place, why, fontsize=8, va="center", transform=panel.get_yaxis_transform())
            continue
        whisker = _whisker([line.mean], 100)
        colour = _COLOURS[1] if line.method == FULL else _COLOURS[0]
        panel.errorbar(100 * line.mean.value, place, xerr=whisker, fmt="o", color=colour, capsize=3)
        if line.method == FULL:
            panel.axvline(100 * line.mean.value, color=colour, linestyle="--", linewidth=1, zorder=0)
    panel.set_yticks(range(len(section.lines)), [line.label for line in section.lines] if names else [])
    panel.set_ylim(len(section.lines) - 0.4, -0.6)
    panel.set_title(f"{section.length:,} tokens, {section.hosts} host{'s' * (section.hosts > 1)}", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="x", alpha=0.3)
    panel.tick_params(labelbottom=True)


def _families(section: Section, budget: Budget) -> dict[str, dict[str, Line]]:
    """Group a section's methods by their text without the budget; in each, the lines by the budget's text."""
    found: dict[str, dict[str, Line]] = {}
    for line in section.lines:
        name, settings = split_method(line.method)
        value = settings.pop(budget, None)
        if value is None or line.mean is None or line.nll is None:
            continue
        others = ",".join(f"{key}={text}" for key, text in settings.items())
        found.setdefault(f"{name}:{others}" if others else name, {})[value] = line
    return found


def _curve(panel: Any, places: list[float], intervals: Sequence[Interval | None], factor: float, **style: Any) -> None:
    known = [interval for interval in intervals if interval is not None]
    values = [factor * interval.value for interval in known]
    panel.errorbar(places, values, yerr=_whisker(known, factor), capsize=2, markersize=4, **style)


def _whisker(intervals: Sequence[Interval], factor: float) -> list[list[float]]:
    """Return how far the intervals reach down and up from their values; 0 where they are undefined."""
    ends = [(i.value - i.low, i.high - i.value) for i in intervals]
    return [[0.0 if math.isnan(end[side]) else factor * max(0.0, end[side]) for end in ends] for side in (0, 1)]
