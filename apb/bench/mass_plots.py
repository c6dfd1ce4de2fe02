"""Pictures of where attention goes, drawn from `benchmarks/attention_mass.csv` alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apb.bench.mass import MassRow
from apb.viz import check_picture

__all__ = ["bound", "shares", "through_layers"]

# Paul Tol's "bright" palette, which colour-blind people can tell apart too.
_PARTS = {"anchor": "#4477aa", "block": "#66ccee", "passed": "#228833", "dropped": "#ee6677"}
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44")
_MARKS = ("o", "s", "^", "D", "v")


def shares(rows: Sequence[MassRow], path: str | Path, compressor: str, passing: int) -> Path:
    """Draw a bar a layer: the shares of attention on anchor, block, passing block, and on what was dropped.

    Args:
        rows: of one run.
        path: where to; ends in .svg, .png or .pdf.
        compressor: whose choice.
        passing: l_p.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no such rows by layer, another ending, or no such folder.
    """
    path, found = check_picture(path), _layers(rows, compressor, passing)
    figure, panel = _figure(rows)
    places, bottom = [row.layer for row in found], [0.0] * len(found)
    for part, colour in _PARTS.items():
        heights = [100 * getattr(row, f"{part}_mass") for row in found]
        panel.bar(places, heights, bottom=bottom, color=colour, width=0.85, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    panel.set_xlabel(f"layer ({compressor}, {passing} passed by each block)")
    panel.set_ylabel("attention, %")
    return _save(figure, panel, path)


def bound(rows: Sequence[MassRow], path: str | Path) -> Path:
    """Draw one layer's error (solid) and its bound (dashed) against the passing length, the mean of all layers.

    Args:
        rows: of one run.
        path: as for `shares`.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no rows of all layers, another ending, or no such folder.
    """
    path, whole = check_picture(path), [row for row in rows if row.layer < 0]
    if not whole:
        raise ValueError("rows: expected some of all layers (layer −1) to draw, got none")
    figure, panel = _figure(rows)
    names = list(dict.fromkeys(row.compressor for row in whole))
    for name, colour, mark in zip(names, _COLOURS, _MARKS, strict=False):
        line = sorted((row for row in whole if row.compressor == name), key=lambda row: row.passing)
        x = [row.passing for row in line]
        panel.plot(x, [row.error for row in line], color=colour, marker=mark, label=f"{name}: error")
        panel.plot(x, [row.bound for row in line], color=colour, linestyle="--", linewidth=1, label=f"{name}: bound")
    ticks = sorted({row.passing for row in whole})
    panel.set_xscale("symlog", base=2, linthresh=min([tick for tick in ticks if tick] or [1]))
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("passing length, tokens of each block")
    panel.set_ylabel("‖o − õ‖ / max ‖v‖")
    return _save(figure, panel, path)


def through_layers(rows: Sequence[MassRow], path: str | Path, runs: Sequence[tuple[str, int]]) -> Path:
    """Draw the error by layer: in a whole run (solid), and in that layer alone (dashed).

    Args:
        rows: of one run.
        path: as for `shares`.
        runs: compressor and passing length of each pair of lines.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as for `shares`.
    """
    path = check_picture(path)
    figure, panel = _figure(rows)
    for (compressor, passing), colour, mark in zip(runs, _COLOURS, _MARKS, strict=False):
        found = _layers(rows, compressor, passing)
        x, name = [row.layer for row in found], f"{compressor}, {passing}" if passing else "nothing passed"
        panel.plot(x, [row.whole_error for row in found], color=colour, marker=mark, markersize=4, label=name)
        panel.plot(x, [row.error for row in found], color=colour, linestyle="--", linewidth=1, label=f"{name}: alone")
    panel.set_xlabel("layer")
    panel.set_ylabel("‖o − õ‖ / max ‖v‖")
    panel.set_ylim(bottom=0)
    return _save(figure, panel, path)


def _layers(rows: Sequence[MassRow], compressor: str, passing: int) -> list[MassRow]:
    """Return the rows of a compressor's budget by layer."""
    found = [row for row in rows if row.layer >= 0 and (row.compressor, row.passing) == (compressor, passing)]
    if not found:
        raise ValueError(f"rows: none of {compressor!r} with {passing} passed is of a single layer")
    return sorted(found, key=lambda row: row.layer)


def _figure(rows: Sequence[MassRow]) -> tuple[Any, Any]:
    """Return a figure, titled with what was measured, and its panel."""
    from matplotlib.figure import Figure

    row = rows[0]
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    title = f"{row.model}, {row.text}, {row.tokens} tokens on {row.hosts} hosts, anchor {row.anchor}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure, figure.subplots()


def _save(figure: Any, panel: Any, path: Path) -> Path:
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path)
    return path
