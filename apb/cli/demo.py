"""Hide a pass key in a real text and let a real model find it, with APB over several hosts."""

import argparse
import json
import os
import random
import sys
from importlib.resources import files

from apb.cli.generate import add_host_arguments, describe, job_from, run_and_compare
from apb.models import DEMO_MODEL

__all__ = ["add_arguments", "hide_key", "run"]

# Worded as in RULER's needle tasks, which small models follow best.
NEEDLE = "One of the special magic numbers for the pass key is: {key}."
QUERY = "What is the special magic number for the pass key mentioned in the provided text?"
ANSWER_PREFIX = "The special magic number for the pass key mentioned in the provided text is"
_CHARACTERS = 16_800  # about 4000 tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--seed", type=int, default=0, help="draws the key and where it is hidden")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    add_host_arguments(parser)


def hide_key(seed: int) -> tuple[str, str, float]:
    """Return the document, its five-digit key, and the key's depth (0 is the start, 1 the end)."""
    draw = random.Random(seed)
    key, about = str(draw.randrange(10_000, 100_000)), draw.uniform(0.1, 0.9)
    text = files("apb").joinpath("data/esther.txt").read_text(encoding="utf-8")[:_CHARACTERS]
    text = text[: text.rindex(".") + 1]
    cut = text.index(". ", int(about * len(text))) + 2
    return f"{text[:cut]}{NEEDLE.format(key=key)} {text[cut:]}", key, cut / len(text)


def run(arguments: argparse.Namespace) -> int:
    """Ask for the key with APB and with exact attention; 0 if APB's answer has it."""
    document, key, depth = hide_key(arguments.seed)
    rank = os.environ.get("RANK")  # under torchrun, whose ranks are the hosts
    if rank is None and arguments.hosts is None:
        arguments.hosts = 4
    if rank in (None, "0"):
        print(
            f"{DEMO_MODEL} reads six chapters of the Book of Esther (King James Version), in which the pass key "
            f"{key} is hidden at {depth:.0%} depth.",
            file=sys.stderr,
            flush=True,
        )
    job = job_from(
        arguments,
        model=DEMO_MODEL,
        document=document,
        query=QUERY,
        answer_prefix=ANSWER_PREFIX,
        max_new_tokens=8,
    )
    reports = run_and_compare(job, compare=True)
    if not reports:
        return 0  # another rank prints
    found = [key in report.answer for report in reports]
    if arguments.json:
        print(
            json.dumps([report.as_json() | {"right": ok} for report, ok in zip(reports, found, strict=True)], indent=2)
        )
    else:
        for report, ok in zip(reports, found, strict=True):
            print(f"\n{describe(report)}\n{'Right' if ok else 'Wrong'}: the key is {key}.")
        busiest, exact = (max(host.cost.pairs for host in report.hosts) for report in reports)
        print(
            f"\nAPB's busiest host scores {exact / busiest:.1f} times fewer query-key pairs than "
            f"one host with exact attention."
        )
        if reports[0].hosts[0].device == "CPU":
            print("Hosts that share one machine's processors take turns: these times say nothing of separate machines.")
    return 0 if found[0] else 1
