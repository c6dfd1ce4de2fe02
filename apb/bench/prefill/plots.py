"""Pictures of a prefill benchmark: speed against length, what a layer's time goes into, time against hosts."""

import math
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from apb.bench.prefill.record import PHASES, PrefillRow
from apb.bench.prefill.store import failed, newest
from apb.bench.prefill.table import by_hosts, figure_text, length_text
from apb.viz import check_picture

__all__ = ["breakdown", "scaling", "speed"]

# Paul Tol's "muted" and "bright" palettes, which colour-blind people can tell apart too.
_COLOURS = ("#332288", "#cc6677", "#117733", "#ddcc77", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_EXACT = "flash"  # what all are compared with: black
_PHASES = dict(zip(PHASES, ("#4477aa", "#ccbb44", "#ee6677", "#228833", "#66ccee", "#aa3377", "#bbbbbb"), strict=True))

_NOTE = 100  # characters that fit beside a method


def speed(
    rows: Sequence[PrefillRow],
    path: str | Path,
    *,
    hosts: int | None = None,
    leave_out: Container[str] = ("minference",),
) -> Path:
    """Draw document tokens per second to the first token against the document's length, a line a method.

    Args:
        rows: of one mode, device, shape and precision, by one backend and link; what was measured twice counts as
            measured last.
        path: where to; ends in .svg, .png or .pdf.
        hosts: which number of them; the largest if None. Methods of one host are always drawn.
        leave_out: methods that are not drawn. On random text MInference is as slow as it can be.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: rows that are not comparable, fewer than two lengths, another ending, or no such folder.
    """
    path, rows = check_picture(path), [row for row in _timed(rows) if row.method not in leave_out]
    hosts = max(by_hosts(rows)) if hosts is None else hosts
    shown = by_hosts(rows).get(hosts, [])
    lengths = sorted({row.tokens for row in shown})
    if len(lengths) < 2:
        raise ValueError(f"rows: speed against length takes two lengths on {hosts} hosts, got {len(lengths)}")
    figure, panel = _figure(f"{_title(rows)}, {hosts} host{'s' * (hosts > 1)}")
    for method, style in _styles(rows).items():
        line = sorted((row.tokens, row.tokens_per_s) for row in shown if row.method == method)
        if line:
            panel.plot(*zip(*line, strict=True), label=method, **style)
    _ticks(panel, lengths, [length_text(tokens) for tokens in lengths])
    panel.set_xlabel("document tokens")
    panel.set_ylabel("document tokens / s to the first token")
    return _save(figure, path)


def scaling(rows: Sequence[PrefillRow], path: str | Path, *, tokens: int | None = None) -> Path:
    """Draw the time to the first token against the number of hosts, a line a method; dashed: methods of one host.

    Args:
        rows: as for `speed`.
        path: as for `speed`.
        tokens: which length; the longest if None.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as for `speed`, of fewer than two numbers of hosts.
    """
    path, rows = check_picture(path), _timed(rows)
    tokens = max(row.tokens for row in rows) if tokens is None else tokens
    shown = [row for row in rows if row.tokens == tokens]
    numbers = sorted({row.hosts for row in shown if row.method in {r.method for r in shown if r.hosts > 1}})
    if len(numbers) < 2:
        raise ValueError(
            f"rows: time against hosts takes two numbers of hosts at {length_text(tokens)}, got {len(numbers)}"
        )
    figure, panel = _figure(f"{_title(rows)}, {length_text(tokens)} tokens")
    for method, style in _styles(rows).items():
        line = sorted((row.hosts, row.ttft_ms / 1e3) for row in shown if row.method == method)
        if line and max(line)[0] == 1:
            panel.axhline(line[0][1], label=f"{method} (1 host)", color=style["color"], linestyle="--", linewidth=1.2)
        elif line:
            panel.plot(*zip(*line, strict=True), label=method, **style)
    _ticks(panel, numbers, [str(hosts) for hosts in numbers])
    panel.set_xlabel("hosts")
    panel.set_ylabel("time to first token, s")
    return _save(figure, path)


def breakdown(
    rows: Sequence[PrefillRow], path: str | Path, *, tokens: int | None = None, hosts: int | None = None
) -> Path:
    """Draw what a layer's time on the slowest host is made of, a bar a method, stacked by phase.

    Methods of one host, which take several times as long, have a panel and a scale of their own. What could not run
    says why.

    Args:
        rows: as for `speed`.
        path: as for `speed`.
        tokens: which length; the longest if None.
        hosts: which number of them; the largest if None.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as for `speed`, but of no rows at that length.
    """
    path, timed, rows = check_picture(path), _timed(rows), newest(rows)
    tokens = max(row.tokens for row in timed) if tokens is None else tokens
    groups = by_hosts(row for row in rows if row.tokens == tokens)
    shown = groups.get(max(groups) if hosts is None else hosts, [])
    panels = {n: [row for row in shown if row.hosts == n] for n in sorted({row.hosts for row in shown}, reverse=True)}
    if not panels:
        raise ValueError(f"rows: there are none of {length_text(tokens)} tokens on {hosts} hosts")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [0.75 + 0.34 * len(found) for found in panels.values()]
    figure = Figure(figsize=(8.5, 1.0 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (number, found) in zip(grid, panels.items(), strict=True):
        _stack(panel, found)
        panel.set_xlabel(f"ms in a layer, slowest of {number} hosts" if number > 1 else "ms in a layer, 1 host")
    figure.suptitle(f"{_title(rows)}, {length_text(tokens)} tokens", x=0.01, ha="left", fontsize=10)
    handles = [Patch(color=colour, label=phase) for phase, colour in _PHASES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return _save(figure, path)


def _timed(rows: Sequence[PrefillRow]) -> list[PrefillRow]:
    """Return the newest rows with times; raise if there are none, or they are not comparable."""
    found = sorted({(row.mode, row.device, row.shape, row.dtype) for row in rows})
    if len(found) > 1:
        raise ValueError(
            f"rows: expected one mode, device, shape and precision, got {'; '.join(map(', '.join, found))}"
        )
    timed = [row for row in newest(rows) if math.isfinite(row.ttft_ms)]
    ways = Counter((row.method, row.tokens, row.hosts) for row in timed)
    if twice := sorted({method for (method, *_), count in ways.items() if count > 1}):
        raise ValueError(f"rows: expected one backend and link of each method, got several of {', '.join(twice)}")
    if not timed:
        what = f"{len(rows)} rows without times" if rows else "no rows"
        raise ValueError(f"rows: expected some with times (measured or simulated) to draw, got {what}")
    return timed


def _title(rows: Sequence[PrefillRow]) -> str:
    return f"{rows[0].shape}, {rows[0].mode} on {rows[0].device}"


def _styles(rows: Sequence[PrefillRow]) -> dict[str, dict[str, Any]]:
    """Return how each method's line looks, the same in every picture of these rows."""
    methods = sorted({row.method for row in rows} - {_EXACT})
    styles = {
        method: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKS[i % len(_MARKS)], "linewidth": 1.5}
        for i, method in enumerate(methods)
    }
    return {_EXACT: {"color": "black", "marker": "*", "linewidth": 1.5}} | styles


def _figure(title: str) -> tuple[Any, Any]:
    """Return a figure and its panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure, figure.subplots()


def _ticks(panel: Any, places: Sequence[int], labels: Sequence[str]) -> None:
    """Set logarithmic scales, with ticks of ours across and plain numbers up."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    panel.set_xscale("log", base=2)
    panel.set_xticks(places, labels)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    panel.yaxis.set_major_formatter(plain)
    low, high = panel.get_ylim()
    if high / low < 100:  # else the powers of ten are enough
        panel.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}" if f"{v:e}"[0] in "25" else ""))
    panel.tick_params(axis="y", which="minor", labelsize=8)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _stack(panel: Any, rows: Sequence[PrefillRow]) -> None:
    """Draw one stacked bar a row."""
    for place, row in enumerate(rows):
        left = 0.0
        for phase, colour in _PHASES.items():
            width = getattr(row, f"{phase}_ms")
            if width > 0:
                panel.barh(place, width, left=left, color=colour, edgecolor="white", linewidth=0.5, height=0.75)
                left += width
        said = (row.notes or "no time")[:_NOTE] if failed(row) else figure_text(row.layer_ms)
        panel.text(left, place, f" {said}", fontsize=8, va="center")
    panel.set_yticks(range(len(rows)), [row.method for row in rows], fontsize=9)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1.1 * max([row.layer_ms for row in rows if not failed(row)], default=1.0))
    panel.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    """Write the picture; beside lines stands what they are, in the order in which they end."""
    if lines := [line for panel in figure.axes for line in panel.lines]:
        lines.sort(key=lambda line: line.get_ydata()[-1], reverse=True)
        figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path)
    return path
