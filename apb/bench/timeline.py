"""A picture of what a GPU did: a lane a stream, a bar a kernel, and which part of each gather hides under others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from apb.bench.trace import Interval, Kind, Span, common, hidden, union
from apb.viz import check_picture

__all__ = ["timeline"]

_COLOURS: dict[Kind, str] = {
    "select": "#e8a33d",
    "attend": "#4878a8",
    "gather": "#b0578d",
    "copy": "#4f9d69",
    "other": "#9a9a9a",
}
_NAMES: dict[Kind, str] = {"select": "choosing what to pass", "attend": "attention", "gather": "gather"}
_HIDDEN = "#e3bdd3"


def timeline(spans: Sequence[Span], path: str | Path, *, title: str = "") -> Path:
    """Draw spans: the whole run, and below it the time around the gathers, which are short beside attention.

    Args:
        spans: of one host.
        path: where to; ends in .svg, .png or .pdf.
        title: what was measured.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no spans, another ending, or no such folder.
    """
    path = check_picture(path)
    if not spans:
        raise ValueError("spans: expected at least 1 to draw, got none; only a GPU's run has some")
    from matplotlib.figure import Figure

    end = max(span.stop_us for span in spans)
    near = _around_gathers(spans, end)
    views = [(0.0, end), *([near] if near else [])]
    lanes = sorted({span.stream for span in spans}, key=lambda stream: _busy(spans, stream), reverse=True)
    figure = Figure(figsize=(10, 1.3 + len(views) * (0.75 + 0.4 * len(lanes))), layout="constrained")
    panels = figure.subplots(len(views), 1, squeeze=False)[:, 0]
    for panel, view in zip(panels, views, strict=True):
        _draw(panel, spans, lanes, view)
    if near:
        panels[0].axvspan(*near, color="black", alpha=0.1, linewidth=0)
        panels[0].text(near[1], 0.03, " enlarged below", fontsize=7, transform=panels[0].get_xaxis_transform())
    if any(span.kind == "gather" for span in spans):
        share = f"{hidden(spans):.0%} of the gathers' time is hidden under something else"
        panels[-1].set_title(share, fontsize=9, loc="left")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.legend(handles=_legend(spans), loc="outside lower left", ncols=7, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return path


def _busy(spans: Sequence[Span], stream: int) -> float:
    """Return how long a stream computed."""
    return sum(span.us for span in spans if span.stream == stream and span.kind != "gather")


def _around_gathers(spans: Sequence[Span], end: float) -> Interval | None:
    """Return the time from before the first gather to after the last one, if there are gathers and it is short."""
    gathers = [span for span in spans if span.kind == "gather"]
    if not gathers:
        return None
    first, last = min(span.start_us for span in gathers), max(span.stop_us for span in gathers)
    margin = 0.25 * (last - first)
    view = max(0.0, first - margin), min(end, last + margin)
    return view if view[1] - view[0] < 0.7 * end else None


def _draw(panel: Any, spans: Sequence[Span], lanes: Sequence[int], view: Interval) -> None:
    """Draw the spans of a time, the busiest stream on top."""
    others = union((span.start_us, span.stop_us) for span in spans if span.kind != "gather")
    for place, stream in enumerate(lanes):
        mine = [span for span in spans if span.stream == stream]
        for kind in get_args(Kind):
            bars = [(span.start_us, span.us) for span in mine if span.kind == kind]
            panel.broken_barh(bars, (place - 0.36, 0.72), color=_COLOURS[kind], linewidth=0)
        gathers = [(span.start_us, span.stop_us) for span in mine if span.kind == "gather"]
        under = [(start, stop - start) for start, stop in common(gathers, others)]
        panel.broken_barh(under, (place - 0.36, 0.72), facecolor=_HIDDEN, edgecolor=_COLOURS["gather"],
                          hatch="////", linewidth=0)  # fmt: skip
    names = [f"stream {stream}" for stream in lanes]
    panel.set_yticks(range(len(lanes)), names, fontsize=8)
    panel.set_ylim(len(lanes) - 0.5, -0.5)
    panel.set_xlim(view)
    panel.set_xlabel("µs", fontsize=9)
    panel.tick_params(axis="x", labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(spans: Sequence[Span]) -> list[Any]:
    from matplotlib.patches import Patch

    kinds = [kind for kind in get_args(Kind) if any(span.kind == kind for span in spans)]
    handles = [Patch(color=_COLOURS[kind], label=_NAMES.get(kind, kind)) for kind in kinds]
    if "gather" in kinds:
        at = kinds.index("gather")
        handles[at].set_label("gather, exposed")
        under = Patch(facecolor=_HIDDEN, edgecolor=_COLOURS["gather"], hatch="////", linewidth=0)
        under.set_label("gather, hidden under the others")
        handles.insert(at + 1, under)
    return handles
