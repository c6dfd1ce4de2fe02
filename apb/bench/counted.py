"""Counted against measured: what the formulas say beside what the ledgers hold, as a picture and as a table."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apb.bench import Row
from apb.bench.plots import newest_run
from apb.bench.prefill.record import PrefillRow
from apb.bench.prefill.store import newest
from apb.bench.prefill.table import figure_text, length_text
from apb.viz import check_picture

__all__ = ["Point", "attention_points", "layer_points", "picture", "table"]

_HEADS, _DIM = 32, 128  # of the attention benchmark: Llama-3.1-8B's
_COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#332288", "#882255", "#999933", "#bbbbbb",
)  # fmt: skip
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
_TABLE = (
    "method", "hosts", "tokens", "counted TFLOP", "layer ms", "TFLOP/s", "sent MB", "messages ms", "formula GB",
    "peak GB",
)  # fmt: skip


class Point(NamedTuple):
    """One measurement beside its count."""

    name: str
    """Who computed."""
    tflop: float
    """Counted 10¹² operations."""
    ms: float
    """Measured milliseconds."""


def attention_points(rows: Sequence[Row]) -> tuple[list[Point], float]:
    """Return the newest run of masked attention beside 4 · pairs · d · Hq, and its matrix product's TFLOP/s or NaN.

    Raises:
        ValueError: the ledger has no such run.
    """
    run = newest_run(rows, "masked_attention")
    ceiling = next((row.tflops for row in run if row.backend == "cublas"), math.nan)
    points = []
    for row in run:
        case = re.fullmatch(r"(\d+)/(\d+)/(\d+)(, rows of the block)?", row.case)
        if case and math.isfinite(row.ms):
            a, p, b = map(int, case.groups()[:3])
            pairs = (0 if case[4] else a * (a + 1) // 2) + b * (a + p) + b * (b + 1) // 2
            points.append(Point(row.backend, 4e-12 * pairs * _DIM * _HEADS, row.ms))
    return points, ceiling


def layer_points(rows: Sequence[PrefillRow]) -> list[Point]:
    """Return each method's layer on its busiest host, as counted and as timed, of the rows that have both."""
    return [Point(row.method, row.tflop, row.layer_ms) for row in rows if math.isfinite(row.layer_ms * row.tflop)]


def timed(rows: Sequence[PrefillRow]) -> list[PrefillRow]:
    """Return the newest rows with times of the mode, device and shape that was measured last."""
    found = [row for row in newest(rows) if math.isfinite(row.ttft_ms)]
    return [row for row in found if _group(row) == _group(found[-1])]


def _group(row: PrefillRow) -> tuple[str, str, str]:
    return row.mode, row.device, row.shape


def picture(attention: Sequence[Row], prefill: Sequence[PrefillRow], path: str | Path) -> Path:
    """Draw measured times against counted operations: one call of attention, and a layer of each method.

    The dashed line is a matrix product's rate in the same run of the attention.

    Args:
        attention: rows of `benchmarks/ledger.csv`.
        prefill: rows of `benchmarks/prefill.csv`; without any that has a time, its panel says so.
        path: where to; ends in .svg, .png or .pdf.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no run of masked attention, another ending, or no such folder.
    """
    path, (points, ceiling), rows = check_picture(path), attention_points(attention), timed(prefill)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _scatter(left, points, ceiling, f"one call of attention,\n{newest_run(attention, 'masked_attention')[0].device}")
    if rows:
        about = f"a layer on the slowest host,\n{rows[-1].shape}, {rows[-1].mode} on {rows[-1].device}"
        _scatter(right, layer_points(rows), math.nan, about)
    else:
        right.text(0.5, 0.5, "no prefill measured yet", ha="center", transform=right.transAxes)
        right.set_axis_off()
    figure.savefig(path)
    return path


def _scatter(panel: Any, points: Sequence[Point], ceiling: float, title: str) -> None:
    """Draw points by name on logarithmic scales, and the line on which operations run at `ceiling` TFLOP/s."""
    from matplotlib.ticker import FuncFormatter

    for name, colour, mark in zip(dict.fromkeys(point.name for point in points), _COLOURS, _MARKS, strict=False):
        x, y = zip(*((point.tflop, point.ms) for point in points if point.name == name), strict=True)
        panel.plot(x, y, color=colour, marker=mark, markersize=5, linestyle="", label=name)
    if math.isfinite(ceiling):
        ends = [pick(point.tflop for point in points) for pick in (min, max)]
        label = f"at {ceiling:.0f} TFLOP/s"
        panel.plot(ends, [1e3 * x / ceiling for x in ends], color="black", linestyle="--", linewidth=1, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}" if f"{v:e}"[0] in "25" else ""))
    panel.tick_params(which="minor", labelsize=8)
    panel.set_title(title, fontsize=9, loc="left")
    panel.set_xlabel("counted, 10¹² operations")
    panel.set_ylabel("measured, ms")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=7, frameon=False)


def table(rows: Sequence[PrefillRow]) -> str:
    """Lay out, as Markdown, what was counted and what was measured of a prefill, the longest documents last.

    Args:
        rows: of `benchmarks/prefill.csv`; those of the mode, device and shape that was measured last are taken.
    """
    found = sorted(timed(rows), key=lambda row: (row.tokens, row.hosts))
    if not found:
        return "No prefill has been measured yet."
    first, lines = found[-1], [f"| {' | '.join(_TABLE)} |", f"| --- |{' ---: |' * (len(_TABLE) - 1)}"]
    for row in found:
        work = row.tflop, row.layer_ms, 1e3 * row.tflop / row.layer_ms
        rest = row.sent_mbytes, row.communicate_ms, row.formula_gbytes, row.peak_gbytes
        cells = (row.method, str(row.hosts), length_text(row.tokens), *map(figure_text, work + rest))
        lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(dict.fromkeys(row.commit for row in found))
    versions = f"torch {first.torch}, triton {first.triton}, {first.date[:10]}, commit {commits}"
    return "\n".join([f"**{first.shape}, {first.mode}, {first.dtype}, {first.device}, {versions}**", "", *lines])
