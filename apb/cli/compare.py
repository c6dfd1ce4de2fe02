"""Answer one question with several methods: answers, times, pairs, bytes, memory, distance from exact attention."""

import argparse
import json
import os
import sys
from math import isnan
from pathlib import Path
from typing import Any, get_args

from apb.attend import Backend
from apb.cli.generate import read_text
from apb.cli.progress import show_phase
from apb.cli.table import table
from apb.compare import Outcome, compare
from apb.context import PREFILL_PHASES
from apb.masks import masks_picture, masks_text, shrink
from apb.methods import METHODS
from apb.models import DEMO_MODEL
from apb.run import HostKind, Job, Report
from apb.viz import check_picture

__all__ = ["add_arguments", "describe", "run"]

_ANSWER = 40  # of a long answer the last characters: they follow the prefix that was given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--document", required=True, help="a text file; - reads standard input")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--answer-prefix", default="", help="how the answer begins")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME[:SETTING=VALUE,…]",
                        help=f"default: all of {' '.join(METHODS)}; with settings: star:anchor=1024")  # fmt: skip
    parser.add_argument("--model", default=DEMO_MODEL, help="a local directory or a hub id (default: %(default)s)")
    parser.add_argument("--hosts", type=int, help="how many (default: 4; under torchrun its ranks)")
    parser.add_argument("--host-kind", choices=get_args(HostKind), default="auto", help="as in apb generate")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto", help="who computes attention")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--timeout", type=float, default=600.0, help="longest wait for another host, in seconds")
    parser.add_argument("--picture", type=Path, help="draw the masks side by side here (.svg, .png or .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print the table and the masks; 0 if every method ran."""
    if arguments.picture:
        check_picture(arguments.picture)
    hosts = 4 if arguments.hosts is None and "RANK" not in os.environ else arguments.hosts
    job = Job(
        model=arguments.model,
        document=read_text(arguments.document),
        query=arguments.query,
        answer_prefix=arguments.answer_prefix,
        hosts=hosts,
        host_kind=arguments.host_kind,
        backend=arguments.backend,
        dtype=arguments.dtype,
        max_new_tokens=arguments.max_new_tokens,
        timeout_s=arguments.timeout,
    )
    outcomes = compare(job, arguments.methods, on_phase=show_phase, on_method=_say)
    if not outcomes:
        return 0  # another rank prints
    show_phase("done", 0, 0)
    grids = {outcome.name: outcome.grid for outcome in outcomes if outcome.grid is not None}
    if arguments.json:
        print(json.dumps([_as_json(outcome) for outcome in outcomes], indent=2))
    else:
        print(describe(outcomes))
        if grids:
            small = {name: shrink(grid) for name, grid in grids.items()}
            print(f"\nWhat each document token (down) attends to (across), middle layer:\n\n{masks_text(small)}")
    if arguments.picture and grids:
        masks_picture(grids, arguments.picture)
        _say(f"Picture: {arguments.picture}")
    return 0 if all(outcome.report for outcome in outcomes) else 1


def describe(outcomes: list[Outcome]) -> str:
    """Lay out the outcomes, a line a method; every figure is the largest over the hosts."""
    ran = [(outcome, outcome.report) for outcome in outcomes if outcome.report]
    lines = []
    if ran:
        first = ran[0][1]
        hosts = max(len(report.hosts) for _, report in ran)
        lines = [
            f"{first.plan.tokens} document tokens, question of {first.plan.query}, on {hosts} host{'s' * (hosts > 1)} "
            f"({first.hosts[0].device}) where the method has several",
            "",
            table(_HEAD, [_row(outcome, report) for outcome, report in ran], left=("method", "answer")),
            "",
            "ms on the slowest host, not always the same; first token: prefill and question together; pairs of query",
            "and key in a layer, all heads; MB on the fullest host: sent in the prefill, KV cache, peak beyond the",
            "weights; logits: largest difference, at the first token, from exact attention on one host.",
            "",
        ]
        phases = [name for name in PREFILL_PHASES if any(_worst(report, name) for _, report in ran)]
        inside = [[_worst(report, name) for name in phases] for _, report in ran]
        rows = [(outcome.name, *(f"{ms:,.0f}" if ms else "–" for ms in times))
                for (outcome, _), times in zip(ran, inside, strict=True)]  # fmt: skip
        lines.append(table(("ms inside the prefill", *phases), rows, left=("ms inside the prefill",)))
    notes = [f"{outcome.name}: {outcome.error}" for outcome in outcomes if not outcome.report]
    notes += [
        f"{outcome.name}: attended exactly, for the document is shorter than its dense_below"
        for outcome, report in ran
        if outcome.name.startswith("minference") and not report.generation.indices
    ]
    return "\n".join([*lines, *([""] if lines and notes else []), *notes])


_HEAD = ("method", "prefill", "question", "first token", "a token", "pairs", "of exact", "sent MB", "cache MB",
         "peak MB", "logits off by", "answer")  # fmt: skip


def _row(outcome: Outcome, report: Report) -> tuple[str, ...]:
    hosts, after_first = report.hosts, max(1, len(report.tokens) - 1)
    answer = " ".join(report.answer.split())
    return (
        outcome.name,
        f"{_worst(report, 'prefill'):,.0f}",
        f"{_worst(report, 'query'):,.0f}",
        f"{max(host.phase_ms['prefill'] + host.phase_ms['query'] for host in hosts):,.0f}",
        f"{_worst(report, 'decode') / after_first:,.0f}",
        f"{max(host.pairs for host in hosts):,.0f}",
        f"{max(host.of_exact for host in hosts):.1%}",
        f"{max(host.prefill_bytes for host in hosts) / 1e6:.1f}",
        f"{max(host.cost.cache_bytes for host in hosts) * report.layers / 1e6:.1f}",
        f"{max(host.peak_bytes for host in hosts) / 1e6:,.0f}",
        f"{outcome.logit_difference:.2g}",
        answer if len(answer) <= _ANSWER else f"…{answer[-_ANSWER:]}",
    )


def _worst(report: Report, phase: str) -> float:
    return max(host.phase_ms.get(phase, 0.0) for host in report.hosts)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "error": outcome.error,
        "logit_difference": None if isnan(outcome.logit_difference) else outcome.logit_difference,
        "report": outcome.report.as_json() if outcome.report else None,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
