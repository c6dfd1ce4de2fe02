"""Measure against the peers in one run on a GPU, and keep the ledger."""

import argparse
from importlib import import_module
from pathlib import Path

__all__ = ["add_arguments", "run"]

_BENCHMARKS = {
    "kernel": "masked attention against FlexAttention, SDPA and FA3",
    "sparse": "MInference's kernel against exact attention",
    "ring": "how much of Ring Attention's sending hides under its computing (two or more GPUs)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    what = "; ".join(f"{name}: {about}" for name, about in _BENCHMARKS.items())
    parser.add_argument("what", choices=_BENCHMARKS, metavar="WHAT", help=what)
    parser.add_argument("--quick", action="store_true", help="about a minute: the smaller shapes only")
    parser.add_argument("--out", type=Path, help="append the figures to this CSV file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, extend the ledger."""
    import_module(f"apb.bench.{arguments.what}").run(quick=arguments.quick, out=arguments.out)
    return 0
