"""Time a whole prefill by every method, to the first token: measured, simulated on one GPU, or counted."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args

import torch

from apb.attend import Backend
from apb.bench import append, environment
from apb.bench.prefill.link import Link
from apb.bench.prefill.methods import PRESETS
from apb.bench.prefill.plots import breakdown, scaling, speed
from apb.bench.prefill.record import Mode, PrefillRow
from apb.bench.prefill.run import cases, run_prefill
from apb.bench.prefill.shapes import SHAPES
from apb.bench.prefill.store import Key, done, failed, key, read
from apb.bench.prefill.table import blocks, figure_text, length_text
from apb.cli.progress import redraw
from apb.cli.table import table
from apb.device import DTYPES, pick_device, pick_dtype
from apb.viz import check_picture

__all__ = ["add_arguments", "describe", "run"]

_UNITS = {"k": 2**10, "m": 2**20}
_PICTURES: dict[str, Callable[..., Path]] = {"speed": speed, "breakdown": breakdown, "scaling": scaling}
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this benchmark's arguments."""
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"{', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--tokens", nargs="+", default=["128K"], metavar="N",
                        help="document tokens; 32K is 32768, 1M is 1048576 (default: 128K)")  # fmt: skip
    parser.add_argument("--hosts", nargs="+", type=int, metavar="H",
                        help="how many; several show how it scales (default: 8; under torchrun its ranks)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", metavar="NAME[:SETTING=VALUE,…]",
                        help=f"{', '.join(PRESETS)} (default: all), also with settings: apb:passing=512")  # fmt: skip
    parser.add_argument("--mode", choices=("auto", "measured", "simulated", "counted"), default="auto",
                        help="measured: a GPU for each host; simulated: each host's share in turn on one GPU; "
                             "counted: nothing timed (default: the first that this machine can do)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="of each time, at least (default: %(default)s)")
    parser.add_argument("--link", metavar="LATENCY_MS,GBYTES_PER_S", help="what simulated messages go over")
    parser.add_argument("--out", type=Path, help="append rows to this CSV file; what is there is not measured again")
    parser.add_argument("--again", action="store_true", help="measure also what is in --out")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw speed.svg, breakdown.svg and scaling.svg there")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto",
                        help="default: bfloat16; float32 where a CPU computes")  # fmt: skip
    parser.add_argument("--backend", choices=get_args(Backend), default="auto",
                        help="who computes the attention (default: on a GPU hopper, or else triton)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing, each row into the ledger as it comes; print the tables, draw the pictures."""
    lengths = list(dict.fromkeys(_tokens(text) for text in arguments.tokens))
    device, hosts = pick_device(arguments.device), _hosts(arguments.hosts)
    dtype = None if arguments.dtype == "auto" else pick_dtype(arguments.dtype, device)
    mode, why = _mode(arguments.mode, hosts, device)
    link = _link(arguments.link, mode)
    _check(arguments, mode, device)
    names = list(dict.fromkeys(arguments.methods or PRESETS))
    how: dict[str, Any] = {"device": device, "dtype": dtype, "backend": arguments.backend}
    wanted = set(cases(arguments.shape, lengths, hosts, names, mode, link, **how))
    # What all are compared with.
    shown = wanted | set(cases(arguments.shape, lengths, [1], ["flash"], mode, link, **how))
    here = environment(device)["device"]

    first = os.environ.get("RANK", "0") == "0"  # of torchrun's ranks the first one writes and speaks
    rows = read(arguments.out) if arguments.out and first else []
    known = set() if arguments.again else wanted & done(rows, here)
    progress = _Progress(len(wanted) - len(known))

    def keep(row: PrefillRow) -> None:
        rows.append(row)
        if arguments.out:
            append(arguments.out, [row])
        progress.row(row)

    if first:
        _say(f"{mode}: {why}")
    if known:
        _say(f"{len(known)} of {len(wanted)} rows are in {arguments.out} already; --again measures them again")
    try:
        run_prefill(
            arguments.shape, lengths, hosts, names, mode, arguments.repeats, link, known, keep, progress, **how,
        )  # fmt: skip
    except KeyboardInterrupt:
        if arguments.out and first:
            _say(f"The rows so far are in {arguments.out}; the same command goes on from there")
        raise
    rows.sort(key=lambda row: names.index(row.method) if row.method in names else len(names))
    if first:
        print(describe([row for row in rows if key(row) in shown]))
    if first and arguments.plot:
        speed_of = {"leave_out": ()} if arguments.methods else {}
        _draw(_alike(rows, shown), arguments.plot, tokens=max(lengths), hosts=max(hosts), **speed_of)
    return 0


def describe(rows: Sequence[PrefillRow]) -> str:
    """Lay out the rows as text, a block for each length and number of hosts."""
    parts, legends = [], []
    for block in blocks(rows):
        parts += [block.title, *wrap(block.about, _WIDTH), ""]
        for each in block.tables:
            parts += [table(each.head, each.rows, left=each.head[:1]), ""]
        for note in block.notes:
            parts += wrap(note, _WIDTH, subsequent_indent="  ")
        parts += [""] if block.notes else []
        legends.append(block.legend)
    return "\n".join([*parts, *(line for legend in dict.fromkeys(legends) for line in wrap(legend, _WIDTH))])


class _Progress:
    """Say on standard error what is measured now, and what came of it."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._start = self._before = time.monotonic()
        self._said, self._over = -10.0, False

    def __call__(self, text: str) -> None:
        """Show what goes on; off a terminal, every 10 s."""
        elapsed = time.monotonic() - self._start
        if sys.stderr.isatty() or elapsed - self._said >= 10:
            self._said = elapsed
            self._show(text, self._done + 1)
            self._over = True

    def row(self, row: PrefillRow) -> None:
        """Show a row that is done and how long that took, in the place of what went on."""
        figure = f"{figure_text(row.tflop)} TFLOP" if row.mode == "counted" else f"{figure_text(row.ttft_ms)} ms"
        hosts = f"{row.hosts} host{'s' * (row.hosts > 1)}"
        what = row.notes or "no figure" if failed(row) else figure
        self._done += 1
        now = time.monotonic()
        took, self._before = now - self._before, now
        self._show(f"{row.method}, {length_text(row.tokens)} tokens, {hosts}: {what} (in {took:.1f} s)", self._done)
        self._over = False

    def _show(self, text: str, number: int) -> None:
        elapsed = time.monotonic() - self._start
        redraw(f"  {elapsed:6.1f} s  [{number}/{self._total}] {text}", over=self._over)


def _tokens(text: str) -> int:
    """Read "128K", "1M" or "131072"."""
    unit = _UNITS.get(text[-1:].lower())
    number = text[:-1] if unit else text
    if not (number.isascii() and number.isdecimal()) or int(number) < 1:
        raise ValueError(f"--tokens: expected document tokens, such as 131072, 128K or 1M, got {text!r}")
    return int(number) * (unit or 1)


def _hosts(asked: Sequence[int] | None) -> list[int]:
    """Return the numbers of hosts that were asked for, or else torchrun's ranks, or 8."""
    ranks = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    for hosts in asked or ():
        if hosts < 1:
            raise ValueError(f"--hosts: expected at least 1, got {hosts}")
        if ranks not in (None, hosts):
            raise ValueError(f"--hosts: torchrun started {ranks} ranks, got {hosts}; leave --hosts out")
    return list(dict.fromkeys(asked or [ranks or 8]))


def _mode(asked: str, hosts: Sequence[int], device: torch.device) -> tuple[Mode, str]:
    """Return the mode, and why it is that one."""
    gpus, most = torch.cuda.device_count() if device.type == "cuda" else 0, max(hosts)
    seen = f"{gpus or 'no'} GPU{'s' * (gpus > 1)} for {most} host{'s' * (most > 1)}"
    if "RANK" in os.environ:
        if asked in ("simulated", "counted"):
            raise ValueError(f"--mode: {asked} is the work of one process, and torchrun started ranks; go without it")
        return "measured", f"torchrun started {os.environ['WORLD_SIZE']} ranks"
    if asked == "measured" and gpus < most and device.type == "cuda":
        raise ValueError(f"--mode: measured takes a GPU for each host, got {seen}; take --mode simulated")
    for mode in get_args(Mode):
        if asked == mode:
            return mode, "as asked"
    return ("measured" if gpus >= most else "simulated" if gpus else "counted"), seen


def _link(text: str | None, mode: Mode) -> Link | None:
    """Read "LATENCY_MS,GBYTES_PER_S"."""
    if text is None:
        return None
    if mode != "simulated":
        raise ValueError(f"--link: only simulated messages go over it, and the mode is {mode}; leave it out")
    try:
        latency_ms, gbytes_per_s = map(float, text.split(","))
        return Link(latency_ms=latency_ms, gbytes_per_s=gbytes_per_s)
    except ValueError:
        raise ValueError(
            f"--link: expected LATENCY_MS,GBYTES_PER_S, at least 0 and above 0, such as 0.03,350, got {text!r}"
        ) from None


def _check(arguments: argparse.Namespace, mode: Mode, device: torch.device) -> None:
    """Refuse what cannot be, and what could not be written afterwards."""
    out, plot = arguments.out, arguments.plot
    if arguments.shape not in SHAPES:
        raise ValueError(f"--shape: expected one of {', '.join(SHAPES)}, got {arguments.shape!r}")
    if mode != "counted" and (device.type, arguments.device) == ("cpu", "auto") and arguments.shape != "tiny":
        raise ValueError(
            f"--mode: {mode} times GPUs, and there is none; take --mode counted, --shape tiny, or --device cpu if a "
            f"CPU is to run {arguments.shape}"
        )
    if arguments.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, got {arguments.repeats}")
    if mode == "measured" and device.index:
        raise ValueError(f"--device: measured hosts take the first GPUs, got {arguments.device!r}; leave it out")
    if "RANK" in os.environ and arguments.device != "auto":
        raise ValueError(f"--device: each of torchrun's ranks has its own, got {arguments.device!r}; leave it out")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out: expected a CSV file in a folder that exists, got {out}")
    if plot is not None and mode == "counted":
        raise ValueError("--plot: pictures are of times, and counted rows have none; leave it out, or simulate")
    if plot is not None and not plot.is_dir():
        raise ValueError(f"--plot: expected a folder that exists, got {plot}")
    for name in _PICTURES if plot else ():
        check_picture(plot / f"{name}.svg")


def _alike(rows: Sequence[PrefillRow], shown: set[Key]) -> list[PrefillRow]:
    """Return the rows that may stand in one picture with those of `shown`: other lengths, hosts and methods."""
    kinds = {(one.mode, one.shape, one.device, one.dtype) for one in shown}
    links = {"", *(one.link for one in shown)}
    by = {one.method: {other.backend for other in shown if other.method == one.method} for one in shown}
    anyone = set().union(*by.values())
    return [
        row
        for row in rows
        if (row.mode, row.shape, row.device, row.dtype) in kinds
        and row.link in links
        and row.backend in by.get(row.method, anyone)
    ]


def _draw(rows: Sequence[PrefillRow], folder: Path, *, tokens: int, hosts: int, **speed_of: Any) -> None:
    """Draw the pictures that these rows have something for, and say why there is no other."""
    at = {
        "speed": {"hosts": hosts, **speed_of},
        "breakdown": {"tokens": tokens, "hosts": hosts},
        "scaling": {"tokens": tokens},
    }
    for name, draw in _PICTURES.items():
        try:
            print(f"Drawn: {draw(rows, folder / f'{name}.svg', **at[name])}")
        except ValueError as error:
            _say(f"No {name}.svg: {error}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
