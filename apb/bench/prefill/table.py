"""From rows to tables: for each mode, shape, length and number of hosts, what every method took."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from apb.bench.prefill.record import PHASES, PrefillRow
from apb.bench.prefill.store import failed

__all__ = ["LEGEND", "Block", "Table", "balance", "blocks", "by_hosts", "figure_text", "length_text", "markdown"]

LEGEND = {
    "timed": (
        "first token ms: the prefill of all layers, then the question's pass and the first logits (question ms). "
        "tokens/s: document tokens over that time. vs flash: how many times faster than exact attention on one host. "
        "peak GB: the most memory of a host (by the formula). load: the busiest host's time in a layer, without "
        "messages, over the hosts' mean. sent MB: in a layer, by the host that sends most. ms in a layer: on the "
        "slowest host, mean over the layers."
    ),
    "counted": (
        "TFLOP: 10¹² operations of a layer on the host that has most; minference: at most, since its text decides. "
        "vs flash: how many times fewer than exact attention on one host; that is no speed-up, for operations do not "
        "all take equally long. peak GB: memory of a host by the formula. load: the busiest host's operations over the "
        "hosts' mean. sent MB: in a layer, by the host that sends most."
    ),
}
"""What the columns say, for rows with times and for counted ones."""

_ABOUT = {
    "measured": "measured on {}, a process for each host",
    "simulated": "simulated: each host's share timed in turn on one {}, messages modelled",
    "counted": "counted: operations and bytes by formula, nothing timed",
}
_TIMED = ("method", "hosts", "first token ms", "question ms", "tokens/s", "vs flash", "peak GB", "load", "sent MB")
_COUNTED = ("method", "hosts", "TFLOP", "vs flash", "peak GB", "load", "sent MB")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns of text; the first is aligned to the left."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Everything about one shape and length on one number of hosts, in one mode.

    Attributes:
        title: which.
        about: what the mode is, on what device, and of what versions and days the rows are.
        tables: totals, and the phases of a layer where there are times.
        notes: the rows' notes, each once, with the methods that it is of unless it is of all.
        legend: what the columns say.
    """

    title: str
    about: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    legend: str


def length_text(tokens: int) -> str:
    """Write a number of tokens as people say it.

    >>> length_text(131072), length_text(3 * 2**19), length_text(100_000)
    ('128K', '1536K', '100,000')
    """
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def figure_text(value: float) -> str:
    """Write a number with three digits that say something, and all of those before the point.

    >>> figure_text(1234.5), figure_text(33.96), figure_text(0.25), figure_text(float("nan"))
    ('1,234', '34.0', '0.250', '–')
    """
    if not math.isfinite(value):
        return "–"
    if abs(value) < 0.01:
        return f"{value:.2g}"
    power = int(f"{value:.2e}".partition("e")[2])  # of ten, once rounded
    return f"{value:,.{max(0, 2 - power)}f}"


def balance(row: PrefillRow) -> float:
    """Return the busiest host's load over the hosts' mean; NaN if none was kept.

    Raises:
        ValueError: a load that is no number.
    """
    try:
        loads = [float(load) for load in row.load.split()]
    except ValueError:
        raise ValueError(f"load: expected numbers separated by spaces, got {row.load!r}; repair that row") from None
    return max(loads) * len(loads) / sum(loads) if sum(loads) else math.nan


def by_hosts(rows: Iterable[PrefillRow]) -> dict[int, list[PrefillRow]]:
    """Group the rows of one mode, shape and length by the number of hosts, the fewest first.

    Methods that are there on one host alone are beside the others in every group, and a group of their own only where
    there are no others.
    """
    rows = list(rows)
    several = {row.method for row in rows if row.hosts > 1}
    numbers = sorted({row.hosts for row in rows if row.method in several}) or [1]
    return {hosts: [row for row in rows if row.method not in several or row.hosts == hosts] for hosts in numbers}


def blocks(rows: Iterable[PrefillRow]) -> list[Block]:
    """Lay out rows, of what was measured twice the newest: by mode, device and precision, shape, length, and hosts."""
    groups: dict[tuple[str, str, str, str, int], dict[tuple[str | int, ...], PrefillRow]] = {}
    for row in rows:
        device = "" if row.mode == "counted" else row.device  # what is counted is the same everywhere
        one = row.method, row.hosts, row.backend, row.link
        groups.setdefault((row.mode, device, row.dtype, row.shape, row.tokens), {})[one] = row
    return [
        _block(found, hosts)
        for _, group in sorted(groups.items(), key=lambda group: group[0])
        for hosts, found in by_hosts(group.values()).items()
    ]


def markdown(rows: Iterable[PrefillRow]) -> str:
    """Lay out rows as Markdown."""
    lines, legends = [], []
    for block in blocks(rows):
        lines += [f"**{block.title}**", "", f"{block.about}.", ""]
        for table in block.tables:
            lines += [f"| {' | '.join(table.head)} |", f"| --- |{' ---: |' * (len(table.head) - 1)}"]
            lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table.rows]
            lines.append("")
        lines += [*(f"- {note}" for note in block.notes), ""]
        legends.append(block.legend)
    return "\n".join([*lines, *(f"{legend}\n" for legend in dict.fromkeys(legends))])


def _block(rows: Sequence[PrefillRow], hosts: int) -> Block:
    first = rows[0]
    counted = first.mode == "counted"
    flash = next((row for row in rows if row.method == "flash"), None)
    rows = _told_apart(rows)
    tables = [_counted_table(rows, flash)] if counted else [_timed_table(rows, flash), _phase_table(rows)]
    said = {note: [row.method for row in rows if row.notes == note] for note in dict.fromkeys(r.notes for r in rows)}
    return Block(
        title=f"{first.shape}, {length_text(first.tokens)} tokens, {hosts} host{'s' * (hosts > 1)}, {first.mode}",
        about=f"{_ABOUT.get(first.mode, '{}').format(first.device)}; {_versions(rows)}{_precision(rows)}",
        tables=tuple(tables),
        notes=tuple(
            note if len(methods) == len(rows) else f"{', '.join(methods)}: {note}"
            for note, methods in said.items()
            if note
        ),
        legend=LEGEND["counted" if counted else "timed"],
    )


def _told_apart(rows: Sequence[PrefillRow]) -> list[PrefillRow]:
    """Put the backend, or the link, behind a method's name where the same method is there with another one."""
    rows = list(rows)
    for column in ("backend", "link"):
        held: dict[str, set[str]] = {}
        for row in rows:
            held.setdefault(row.method, set()).add(getattr(row, column))
        rows = [
            replace(row, method=f"{row.method} ({getattr(row, column)})") if len(held[row.method]) > 1 else row
            for row in rows
        ]
    return rows


def _precision(rows: Sequence[PrefillRow]) -> str:
    """Say in which precision rows were computed, and by whom."""
    backends = " and ".join(sorted({row.backend for row in rows} - {""}))
    return "".join(f", {text}" for text in (rows[0].dtype, backends and f"attention by {backends}") if text)


def _timed_table(rows: Sequence[PrefillRow], flash: PrefillRow | None) -> Table:
    return Table(
        head=_TIMED,
        rows=tuple(
            (
                row.method,
                str(row.hosts),
                figure_text(row.ttft_ms),
                figure_text(row.query_ms),
                figure_text(row.tokens_per_s),
                _ratio(flash.ttft_ms / row.ttft_ms if flash and row.ttft_ms else math.nan),
                "–" if failed(row) else f"{figure_text(row.peak_gbytes)} ({figure_text(row.formula_gbytes)})",
                figure_text(balance(row)),
                figure_text(row.sent_mbytes),
            )
            for row in rows
        ),
    )


def _phase_table(rows: Sequence[PrefillRow]) -> Table:
    return Table(
        head=("ms in a layer", "in all", *PHASES),
        rows=tuple(
            (row.method, figure_text(row.layer_ms), *(figure_text(getattr(row, f"{phase}_ms")) for phase in PHASES))
            for row in rows
            if not failed(row)
        ),
    )


def _counted_table(rows: Sequence[PrefillRow], flash: PrefillRow | None) -> Table:
    return Table(
        head=_COUNTED,
        rows=tuple(
            (
                row.method,
                str(row.hosts),
                figure_text(row.tflop),
                _ratio(flash.tflop / row.tflop if flash and row.tflop else math.nan),
                figure_text(row.formula_gbytes),
                figure_text(balance(row)),
                figure_text(row.sent_mbytes),
            )
            for row in rows
        ),
    )


def _versions(rows: Sequence[PrefillRow]) -> str:
    """Return the versions and days of the rows, a piece for each different set of versions."""
    days: dict[str, set[str]] = {}
    for row in rows:
        days.setdefault(f"torch {row.torch}, triton {row.triton}, commit {row.commit}", set()).add(row.date[:10])
    return "; ".join(f"{text}, {' to '.join(sorted({min(found), max(found)}))}" for text, found in days.items())


def _ratio(value: float) -> str:
    return f"{figure_text(value)}×" if math.isfinite(value) else "–"
