"""Score methods on long-context tasks (RULER, InfiniteBench) against full attention; stops and goes on anywhere."""

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

from apb.adapter import check_adapter
from apb.bench import environment
from apb.cli.progress import redraw
from apb.cli.table import table
from apb.compress.retaining_head import find_heads
from apb.device import DTYPES, pick_device, pick_dtype
from apb.evals.check import FILES, check
from apb.evals.evaluate import SAMPLES_VERSION, Evaluation, evaluate
from apb.evals.ledger import write_ledger
from apb.evals.plots import budget_curve, dots, has_curve
from apb.evals.record import FULL
from apb.evals.report import Report, make_report, split_label
from apb.evals.sample import Sources
from apb.evals.store import Store, read_records, read_settings
from apb.evals.tasks import TASKS
from apb.files import fingerprint, write_whole
from apb.methods import METHODS, split_method

__all__ = ["SUITES", "add_arguments", "check", "describe", "run", "write"]

SUITES = {
    "ruler": tuple(task.name for task in TASKS.values() if task.suite == "ruler"),
    "ruler-offline": tuple(task.name for task in TASKS.values() if task.suite == "ruler" and not task.needs),
    "infinitebench": tuple(task.name for task in TASKS.values() if task.suite == "infinitebench"),
}
"""Names that stand for several tasks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--out", required=True, type=Path, help="folder of the records; with some, the run goes on")
    parser.add_argument("--model", help="a local directory, a hub id, or SmolLM2-135M-Instruct")
    parser.add_argument(
        "--adapter",
        type=Path,
        help="a LoRA merged into the weights: a directory in PEFT's format, or smollm2-135m-long",
    )
    parser.add_argument("--tasks", nargs="+", default=["ruler-offline"], metavar="TASK",
                        help=f"tasks, or {', '.join(SUITES)} (default: ruler-offline)")  # fmt: skip
    parser.add_argument("--length", nargs="+", default=["4K"], metavar="TOKENS", help="in all; 4K is 4096 (default)")
    parser.add_argument("--methods", nargs="+", default=["apb"], metavar="[LABEL@]METHOD",
                        help="as in apb compare, budgets also as fractions of a block: 'A half@apb:passing=1/2'; "
                             "full attention is always among them (default: apb)")  # fmt: skip
    parser.add_argument("--hosts", nargs="+", type=int, default=[4], help="how many, simulated (default: 4)")
    parser.add_argument("--samples", type=int, default=50, help="questions a task and length (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample (default: 0)")
    parser.add_argument("--haystack", type=Path, help="a text file, for tasks that hide facts in a text")
    parser.add_argument("--squad", type=Path, help="SQuAD's JSON file, for qa_1")
    parser.add_argument("--hotpotqa", type=Path, help="HotpotQA's JSON file, for qa_2")
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="most document tokens a batch")
    parser.add_argument("--max-new-tokens", type=int, help="instead of each task's own")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    parser.add_argument("--shard", default="0/1", metavar="I/N",
                        help="answer every N-th question from the I-th on (from 0); a process a GPU")  # fmt: skip
    parser.add_argument("--threshold", type=float, default=50.0,
                        help="%% that full attention must score if a task counts (default: 50)")  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="run nothing; report what is in --out")
    parser.add_argument("--ledger", type=Path, help="also put every sample's figures into this CSV file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead")


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing, print the table, and write the report and its pictures."""
    if not 0 <= arguments.threshold <= 100:
        raise ValueError(f"--threshold: expected a percentage, 0 to 100, got {arguments.threshold:g}")
    labels = _labels(arguments.methods)
    if not arguments.report_only:
        _answer(_setting(arguments, tuple(dict.fromkeys([FULL, *labels]))), arguments.out, labels)
    elif not arguments.out.is_dir():
        raise ValueError(f"--out: there is no folder {arguments.out}")
    _report(arguments)
    return 0


def _answer(setting: Evaluation, out: Path, labels: dict[str, str]) -> None:
    """Answer what is missing in the folder `out`."""
    from transformers.utils import logging

    check(setting)
    with Store(
        out, settings=_fixed(setting), labels=labels, run=environment(), shard=setting.shard, on_note=_say
    ) as store:
        if len(store):
            _say(f"{len(store):,} answers found in {out}; going on from there")
        logging.disable_progress_bar()  # ours says what goes on
        try:
            evaluate(setting, store=store, on_progress=Progress(store))
        except KeyboardInterrupt:
            _say(f"{len(store):,} answers are kept in {out}; the same command goes on from there")
            raise


def _report(arguments: argparse.Namespace) -> None:
    """Report what is in the folder: printed, and written."""
    records = read_records(arguments.out, on_note=_say)
    noted = read_settings(arguments.out)
    report = make_report(records, labels=noted["labels"], threshold=arguments.threshold / 100)
    written = write(report, arguments.out, noted)
    if arguments.ledger is not None:
        here = environment()
        run = noted["runs"][-1] if arguments.report_only and noted["runs"] else here  # not where the report is made
        write_ledger(arguments.ledger, records, run=run, labels=noted["labels"])
        written.append(arguments.ledger)
    print(report.json(**noted) if arguments.json else describe(report))
    _say(f"Written: {', '.join(map(str, written))}")


def describe(report: Report) -> str:
    """Lay out the report, a table for each model, length and number of hosts."""
    parts = []
    for section in report.sections:
        parts += [section.title, table(section.head(), section.rows(), left=("method",)), *section.notes, ""]
    return "\n".join([*parts, *wrap(report.legend(), 118)])


def write(report: Report, folder: Path, noted: dict[str, Any]) -> list[Path]:
    """Write `report.json` and, if matplotlib is there, `scores.svg` and a curve of each budget that was varied."""
    path = folder / "report.json"
    write_whole(path, lambda part: part.write_text(report.json(**noted) + "\n", encoding="utf-8"))
    written = [path]
    if find_spec("matplotlib") is None:
        _say("matplotlib is needed for pictures; pip install 'apb[viz]'")
        return written
    written.append(dots(report, folder / "scores.svg"))
    for budget in ("passing", "anchor"):
        if has_curve(report, budget):
            try:
                written.append(budget_curve(report, folder / f"{budget}.svg", budget=budget))
            except ValueError as error:
                _say(f"No curve of {budget}: {error}")
    return written


class Progress:
    """Say on standard error how far the run is, and about how long it still takes.

    Args:
        store: what it holds more than at first has been answered in this run.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.before = store, len(store)
        self.start = self.said = time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Note that `done` of `total` answers are there and `what` runs now; off a terminal, say so every 10 s."""
        now = time.monotonic()
        if not sys.stderr.isatty() and 0 < done < total and now - self.said < 10:
            return
        first, self.said = self.said == self.start, now
        new, elapsed = len(self.store) - self.before, now - self.start
        left = f", about {_duration(elapsed / new * (total - done))} left" if new and done < total else ""
        redraw(f"  {_duration(elapsed):>8}  {done:,} of {total:,} answers{left}: {what}", over=not first)


def _setting(arguments: argparse.Namespace, methods: tuple[str, ...]) -> Evaluation:
    if not arguments.model:
        raise ValueError("--model: expected a model to evaluate; only --report-only does without")
    tasks: dict[str, None] = {}
    for name in arguments.tasks:
        if name not in SUITES and name not in TASKS:
            raise ValueError(f"--tasks: expected some of {', '.join([*SUITES, *TASKS])}, got {name!r}")
        tasks |= dict.fromkeys(SUITES.get(name, (name,)))
    device = pick_device(arguments.device)
    return Evaluation(
        model=arguments.model,
        adapter=arguments.adapter,
        tasks=tuple(tasks),
        lengths=tuple(dict.fromkeys(_tokens(text) for text in arguments.length)),
        methods=methods,
        hosts=tuple(dict.fromkeys(arguments.hosts)),
        samples=arguments.samples,
        seed=arguments.seed,
        sources=Sources(haystack=arguments.haystack, squad=arguments.squad, hotpotqa=arguments.hotpotqa),
        batch_tokens=arguments.batch_tokens,
        dtype=str(pick_dtype(arguments.dtype, device)).removeprefix("torch."),
        device=str(device),
        max_new_tokens=arguments.max_new_tokens,
        shard=_shard(arguments.shard),
    )


def _fixed(setting: Evaluation) -> dict[str, Any]:
    """Return the settings that all runs in one folder must share; files by their content."""
    files = {name: getattr(setting.sources, name) for name in FILES}
    heads = {method: split_method(method)[1].get("heads") for method in setting.methods}
    return {
        "model": setting.model,
        "adapter": setting.adapter and f"{setting.adapter.name} (sha256 {_adapter_mark(setting.adapter)})",
        "dtype": setting.dtype,
        "max_new_tokens": setting.max_new_tokens,
        "samples_version": SAMPLES_VERSION,
        **{name: fingerprint(path) for name, path in files.items() if path},
        **{f"heads of {method}": f"sha256 {fingerprint(find_heads(path))}" for method, path in heads.items() if path},
    }


def _adapter_mark(adapter: Path) -> str:
    """Return a mark of an adapter's weights, and of the settings by which they are scaled and merged."""
    directory = check_adapter(adapter)
    return fingerprint(*sorted(directory.glob("adapter_model.*")), directory / "adapter_config.json")


def _labels(texts: list[str]) -> dict[str, str]:
    """Return each method's label; a method without one is its own."""
    found: dict[str, str] = {}
    for text in texts:
        method, label = split_label(text)
        if split_method(method)[0] not in METHODS:
            raise ValueError(f"--methods: expected [LABEL@] and one of {', '.join(METHODS)}, got {text!r}")
        if found.get(method, label) != label or label in (other for m, other in found.items() if m != method):
            raise ValueError(f"--methods: expected one label a method and one method a label, got {text!r} besides")
        found[method] = label
    return found


def _tokens(text: str) -> int:
    number = text[:-1] if text[-1:] in ("k", "K") else text
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"--length: expected tokens, such as 4096 or 4K, got {text!r}")
    return int(number) * (1 if number == text else 1024)


def _shard(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ValueError(f"--shard: expected I/N with I from 0 to N − 1, such as 0/4 to 3/4, got {text!r}")
    return int(first), int(count)


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600, 1)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:g} h"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
