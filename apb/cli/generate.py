"""Answer a question about a document on several hosts."""

import argparse
import json
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

from apb.attend import Backend
from apb.cli.progress import ShowText, show_phase
from apb.cli.table import table
from apb.compress import TRAINING_FREE
from apb.context import PREFILL_PHASES
from apb.device import DTYPES
from apb.methods import METHODS
from apb.plan import Layout, QueryIn
from apb.run import HostKind, Job, Report, run_jobs
from apb.sampling import Sampling

__all__ = ["add_arguments", "add_host_arguments", "describe", "job_from", "read_text", "run", "run_and_compare"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--model", required=True, help="a local directory, a hub id, or SmolLM2-135M-Instruct")
    parser.add_argument(
        "--adapter",
        type=Path,
        help="a LoRA merged into the weights: a directory in PEFT's format, or smollm2-135m-long",
    )
    parser.add_argument("--document", required=True, action="append",
                        help="a text file; - reads standard input; several times: answered as a batch")  # fmt: skip
    parser.add_argument("--query", required=True, action="append",
                        help="the question: one for all documents, or one for each, in their order")  # fmt: skip
    parser.add_argument("--follow-up", action="append", default=[], metavar="QUERY",
                        help="a further question about the one document, on the same prefill; repeatable")  # fmt: skip
    parser.add_argument("--method", default="apb", help=f"{', '.join(METHODS)}; with settings: star:anchor=1024")
    parser.add_argument("--answer-prefix", default="", help="how the answer begins")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="ends an answer, beside the model's stop tokens; repeatable")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, help="draw from so many likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this probability together")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=None,
                        help="print an answer while it is written (default: on a terminal)")  # fmt: skip
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
    parser.add_argument("--heads", help="the retaining heads: a checkpoint, or smollm2-135m")
    parser.add_argument("--query-in", choices=get_args(QueryIn),
                        help="where the question is during the prefill (default: anchor)")  # fmt: skip
    parser.add_argument("--layout", choices=get_args(Layout),
                        help="one block a host, or two for balance (default: contiguous)")  # fmt: skip
    parser.add_argument("--backend", choices=get_args(Backend), default="auto",
                        help="who computes attention (default: the fastest one that takes the input)")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=300.0, help="longest wait for another host, in seconds")


def run(arguments: argparse.Namespace) -> int:
    """Generate, and print the answers, what each host did, and how long each phase took."""
    (document, query), *more = _asked(arguments)
    job = job_from(
        arguments,
        model=arguments.model,
        document=document,
        query=query,
        more=tuple(more),
        follow_ups=tuple(arguments.follow_up),
        method=arguments.method,
        adapter=arguments.adapter,
        answer_prefix=arguments.answer_prefix,
        max_new_tokens=arguments.max_new_tokens,
        stop=tuple(arguments.stop),
        sampling=Sampling(
            temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, seed=arguments.seed
        ),
        dtype=arguments.dtype,
    )
    if arguments.stream and more:
        raise ValueError(
            f"stream: the {1 + len(more)} documents are answered at once, and their answers would mix; leave it out"
        )
    wanted = sys.stdout.isatty() and not arguments.json if arguments.stream is None else arguments.stream
    stream = wanted and not more
    reports = run_and_compare(job, compare=arguments.compare_exact, stream=stream, to_stderr=arguments.json)
    if not reports:
        return 0  # another rank prints
    if arguments.json:
        named = zip(reports, cycle(arguments.document if more else arguments.document[:1]), strict=False)
        print(json.dumps([report.as_json() | {"document": path} for report, path in named], indent=2))
    else:
        heads = cycle(f"Document: {path}\n" if more else "" for path in arguments.document)
        texts = [describe(report, answered=stream) for report in reports]
        print("\n" * stream + "\n\n".join(head + text for head, text in zip(heads, texts, strict=False)))
    return 0


def _asked(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Pair documents and questions."""
    paths, queries = arguments.document, arguments.query
    if len(queries) not in (1, len(paths)):
        raise ValueError(
            f"query: expected one for all {len(paths)} documents, or one for each, got {len(queries)}; for further "
            f"questions about one document give --follow-up"
        )
    if paths.count("-") > 1:
        raise ValueError(f"document: standard input can be read once, got it {paths.count('-')} times; give files")
    return list(zip(map(read_text, paths), cycle(queries), strict=False))


def job_from(arguments: argparse.Namespace, **what: Any) -> Job:
    """Make a job of the host arguments and `what` else it needs."""
    where = {name: getattr(arguments, name) for name in ("hosts", "host_kind", "backend")}
    names = ("anchor", "passing", "compressor", "heads", "query_in", "layout")
    settings = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return Job(**where, settings=settings, timeout_s=arguments.timeout, **what)


def run_and_compare(job: Job, *, compare: bool, stream: bool = False, to_stderr: bool = False) -> list[Report]:
    """Run the job and, if asked, the same questions with exact attention on one host here.

    Args:
        job: what to run.
        compare: whether to.
        stream: print the answers as they are written.
        to_stderr: there, rather than on standard output.
    """

    def show() -> ShowText | None:
        return ShowText(job.queries, to_stderr=to_stderr) if stream else None

    reports = run_jobs(job, on_phase=show_phase, on_text=show())
    if reports and compare:
        print("The same with exact attention on one host", file=sys.stderr, flush=True)
        exact = replace(job, method="flash", settings={}, hosts=1, host_kind="threads")
        reports += run_jobs(exact, on_phase=show_phase, on_text=show(), here=True)
    if reports:
        show_phase("done", 0, 0)
    return reports


def describe(report: Report, *, answered: bool = False) -> str:
    """Lay out a report: the answer, what each host held, passed and computed, and the phases' times.

    Args:
        report: of one question.
        answered: leave the answer out, for it has been shown.
    """
    plan = report.plan
    lines = [] if answered else [f"Answer: {report.answer}"]
    if report.further:
        return "\n".join([f"Question: {report.query}", *lines, _further(report), "", _times(report)])
    lines += [
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
    return "\n".join([*lines, "", table(head, rows), "", _times(report), "* inside prefill"])


def _times(report: Report) -> str:
    """Lay out how long each phase took on each host."""
    phases = list(report.hosts[0].phase_ms)
    times = [(host.rank, *(f"{host.phase_ms.get(name, 0.0):,.0f}" for name in phases)) for host in report.hosts]
    return table(("ms on host", *(f"{name}*" if name in PREFILL_PHASES else name for name in phases)), times)


def _further(report: Report) -> str:
    """Say what a further question's answer is worth."""
    if report.sound:
        return "On the first question's prefill, which serves this one as well: as exact as on a prefill of its own."
    return (
        "On the first question's prefill, which chose its caches for that one: an approximation beyond the\n"
        "method's own. Caches for any question: --query-in after, with a compressor that reads none, such as snapkv."
    )


def read_text(path: str) -> str:
    """Read a document.

    Raises:
        ValueError: `path` is no readable UTF-8 text.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"document: cannot read {path} as UTF-8 text ({error}); give a text file, or -") from None
