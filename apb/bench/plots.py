"""Pictures of a benchmark, drawn from the ledger alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from apb.bench import Row, read_rows
from apb.viz import check_picture

__all__ = ["bars", "newest_run", "read_ledger"]

Rate = Literal["tflops", "gbytes"]

_CEILINGS = {"cublas": "tflops", "cuda": "gbytes"}  # whose product, copy or sum is the most that a rate can be
_UNITS: dict[Rate, str] = {"tflops": "TFLOP/s", "gbytes": "GB/s"}
_COLOURS = ("#4878a8", "#e8a33d", "#4f9d69", "#b0578d", "#7a6a58", "#3b3b98")


def read_ledger(path: Path) -> list[Row]:
    """Read the rows of `benchmarks/ledger.csv` or a file like it, as `apb.bench.read_rows` does."""
    return read_rows(path, Row)


def newest_run(rows: Sequence[Row], benchmark: str) -> list[Row]:
    """Return the rows of a benchmark that share date, device, versions and commit with its last one.

    What was measured twice counts as measured last.

    Raises:
        ValueError: no row is of that benchmark.
    """

    def run(row: Row) -> tuple[str, ...]:
        return row.date, row.device, row.torch, row.triton, row.commit

    found = [row for row in rows if row.benchmark == benchmark]
    if not found:
        known = ", ".join(sorted({row.benchmark for row in rows})) or "nothing"
        raise ValueError(f"benchmark: the ledger has no row of {benchmark!r}; it has {known}")
    return list({(row.case, row.backend): row for row in found if run(row) == run(found[-1])}.values())


def bars(ledger: Path, benchmark: str, path: str | Path) -> Path:
    """Draw the newest run of a benchmark: rates by case and backend, with their spread, and the ceiling as a line.

    There is a panel for TFLOP/s and one for GB/s, as the run has them. A whisker reaches to the rates that eight of
    ten repeats kept within. What could not run, and what has no rate, is said in words.

    Args:
        ledger: CSV file that `apb bench` wrote.
        benchmark: which of its benchmarks.
        path: where to; ends in .svg, .png or .pdf.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no such benchmark, one without rates, another ending, or no such folder.
    """
    path = check_picture(path)
    from matplotlib.figure import Figure

    rows = newest_run(read_ledger(ledger), benchmark)
    panels = {rate: shown for rate in _UNITS if (shown := _shown(rows, rate))}
    if not panels:
        raise ValueError(f"benchmark: {benchmark!r} has no rates to draw in its newest run")
    heights = [0.7 + 0.24 * len(shown) + 0.2 * len({row.case for row in shown}) for shown in panels.values()]
    figure = Figure(figsize=(8, 0.7 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    backends = list(dict.fromkeys(row.backend for row in rows))
    for panel, (rate, shown) in zip(grid, panels.items(), strict=True):
        _draw(panel, shown, rate, _ceiling(rows, rate), backends)
    first = rows[0]
    versions = f"torch {first.torch}, triton {first.triton}, {first.commit}, {first.date}"
    figure.suptitle(f"{benchmark}: {first.device}\n{versions}", x=0.01, ha="left", fontsize=10)
    figure.savefig(path)
    return path


def _shown(rows: Sequence[Row], rate: Rate) -> list[Row]:
    """Return the rows of the cases that have such a rate, but not what measures the ceiling; cases together."""
    rows = [row for row in rows if row.backend not in _CEILINGS]
    cases = dict.fromkeys(row.case for row in rows if math.isfinite(getattr(row, rate)))
    return [row for case in cases for row in rows if row.case == case]


def _ceiling(rows: Sequence[Row], rate: Rate) -> float:
    """Return the greatest rate of the run's large products, or copies and sums; NaN if it measured none."""
    found = [getattr(row, rate) for row in rows if _CEILINGS.get(row.backend) == rate]
    return max(filter(math.isfinite, found), default=math.nan)


def _draw(panel: Any, rows: Sequence[Row], rate: Rate, ceiling: float, backends: Sequence[str]) -> None:
    """Draw a bar for each row, a gap between cases."""
    places, labels, place, case = [], [], 0.0, rows[0].case
    for row in rows:
        place += 1.8 if row.case != case else 1
        case = row.case
        places.append(place)
        labels.append(f"{case}  {row.backend}")
        value = getattr(row, rate)
        if math.isnan(value):
            why = shorten(row.notes, 80, placeholder=" …") or "no rate"
            panel.text(0.01, place, why, fontsize=7, va="center", transform=panel.get_yaxis_transform())
            continue
        panel.barh(place, value, color=_COLOURS[backends.index(row.backend) % len(_COLOURS)])
        if math.isfinite(row.low_ms) and math.isfinite(row.high_ms):
            slow, fast = (value * row.ms / ms for ms in (row.high_ms, row.low_ms))
            whisker = [[max(0.0, value - slow)], [max(0.0, fast - value)]]
            panel.errorbar(value, place, xerr=whisker, color="black", capsize=2, linewidth=1)
    if math.isfinite(ceiling):
        panel.axvline(ceiling, color="black", linestyle="--", linewidth=1)
    panel.set_yticks(places, labels, fontsize=8)
    panel.set_ylim(places[-1] + 0.7, places[0] - 0.7)
    panel.set_xlim(left=0)
    dashed = " (dashed: the ceiling measured in the same run)" if math.isfinite(ceiling) else ""
    panel.set_xlabel(_UNITS[rate] + dashed, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
