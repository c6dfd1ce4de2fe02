"""Answer a question about a document on several hosts."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from apb.attend import Backend
from apb.cli.progress import show_phase
from apb.cli.table import table
from apb.compress import TRAINING_FREE
from apb.context import PREFILL_PHASES
from apb.methods import METHODS
from apb.plan import Layout, QueryIn
from apb.run import HostKind, Job, Report, run_job

__all__ = ["add_arguments", "add_host_arguments", "describe", "job_from", "read_text", "run", "run_and_compare"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--model", required=True, help="a local directory, a hub id, or SmolLM2-135M-Instruct")
    parser.add_argument("--document", required=True, help="a text file; - reads standard input")
    parser.add_argument("--query", required=True, help="the question")
    parser.add_argument("--method", default="apb", help=f"{', '.join(METHODS)}; with settings: star:anchor=1024")
    parser.add_argument("--answer-prefix", default="", help="how the answer begins")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    parser.add_argument("--compare-exact", action="store_true", help="also answer with exact attention on one host")
    add_host_arguments(parser)


def add_host_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says where and how: hosts, anchor, passing, compressor, layout, backend."""
    parser.add_argument("--hosts", type=int, help="how many; left out under torchrun, whose ranks are the hosts")
    parser.add_argument(
        "--host-kind", choices=get_args(HostKind), default="auto", help="auto: processes, or threads on one GPU"
    )
    parser.add_argument("--anchor", type=int, help="document tokens in the anchor (APB: a quarter of a block)")
    parser.add_argument("--passing", type=int, help="tokens each block passes on (default: an eighth of a block)")
    parser.add_argument("--compressor", choices=(*TRAINING_FREE, "retaining-head"),
                        help="chooses the tokens that are passed on (default: query-aware)")  # fmt: skip
    parser.add_argument("--heads", help="checkpoint of the retaining heads")
    parser.add_argument("--query-in", choices=get_args(QueryIn),
                        help="where the question is during the prefill (default: anchor)")  # fmt: skip
    parser.add_argument("--layout", choices=get_args(Layout),
                        help="one block a host, or two for balance (default: contiguous)")  # fmt: skip
    parser.add_argument("--backend", choices=get_args(Backend), default="auto",
                        help="who computes attention (default: triton on CUDA, sdpa on CPU)")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=300.0, help="longest wait for another host, in seconds")


def run(arguments: argparse.Namespace) -> int:
    """Generate, and print the answer, what each host did, and how long each phase took."""
    job = job_from(
        arguments,
        model=arguments.model,
        document=read_text(arguments.document),
        query=arguments.query,
        method=arguments.method,
        answer_prefix=arguments.answer_prefix,
        max_new_tokens=arguments.max_new_tokens,
        dtype=arguments.dtype,
    )
    reports = run_and_compare(job, compare=arguments.compare_exact)
    if not reports:
        return 0  # another rank prints
    if arguments.json:
        print(json.dumps([report.as_json() for report in reports], indent=2))
    else:
        print("\n\n".join(describe(report) for report in reports))
    return 0


def job_from(arguments: argparse.Namespace, **what: Any) -> Job:
    """Make a job of the host arguments and `what` else it needs."""
    where = {name: getattr(arguments, name) for name in ("hosts", "host_kind", "backend")}
    names = ("anchor", "passing", "compressor", "heads", "query_in", "layout")
    settings = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return Job(**where, settings=settings, timeout_s=arguments.timeout, **what)


def run_and_compare(job: Job, *, compare: bool) -> list[Report]:
    """Run the job and, if asked, the same question with exact attention on one host here."""
    report = run_job(job, on_phase=show_phase)
    if report is None:
        return []
    reports = [report]
    if compare:
        print("The same question with exact attention on one host", file=sys.stderr, flush=True)
        exact = replace(job, method="flash", settings={}, hosts=1, host_kind="threads")
        answer = run_job(exact, on_phase=show_phase, here=True)
        reports += [answer] if answer else []
    show_phase("done", 0, 0)
    return reports


def describe(report: Report) -> str:
    """Lay out a report: the answer, what each host held, passed and computed, and the phases' times."""
    plan = report.plan
    lines = [
        f"Answer: {report.answer}",
        f"{report.title} on {report.host_kind} ({report.hosts[0].device}), "
        f"{plan.tokens} document tokens, {report.wall_s:.1f} s in all",
        report.method,
        str(plan).splitlines()[0],
    ]
    rows = []
    for host in report.hosts:
        share = plan.host(host.rank)
        spans = " ".join(f"[{block.start}, {block.stop})" for block in share.blocks)
        rows.append(
            (
                host.rank,
                spans,
                share.anchor_rows,
                sum(block.passing_tokens for block in share.blocks),
                sum(block.kept_tokens for block in share.blocks),
                f"{host.pairs:,.0f}",
                f"{host.of_exact:.1%}",
                f"{sum(host.sent_bytes.values()) / 1e6:.2f}",
                sum(host.messages.values()),
            )
        )
    head = ("host", "holds", "anchor rows", "receives", "passes", "pairs/layer", "of exact", "sent MB", "messages")
    lines += ["", table(head, rows), ""]
    phases = list(report.hosts[0].phase_ms)
    times = [(host.rank, *(f"{host.phase_ms.get(name, 0.0):,.0f}" for name in phases)) for host in report.hosts]
    head = ("ms on host", *(f"{name}*" if name in PREFILL_PHASES else name for name in phases))
    lines += [table(head, times), "* inside prefill"]
    return "\n".join(lines)


def read_text(path: str) -> str:
    """Read a document.

    Raises:
        ValueError: `path` is no readable UTF-8 text.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"document: cannot read {path} as UTF-8 text ({error}); give a text file, or -") from None
