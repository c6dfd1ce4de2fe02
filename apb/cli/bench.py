"""Measure against the peers in one run on a GPU, and keep the ledger."""

import argparse
from importlib import import_module
from pathlib import Path

from apb.bench.plots import bars
from apb.viz import check_picture

__all__ = ["add_arguments", "run"]

_BENCHMARKS = {
    "kernel": "masked attention against FA3, cuDNN, FlexAttention and flash-2",
    "backward": "the backward pass against FlexAttention, flash-2 and cuDNN",
    "compress": "one layer's scoring, selection and gather against their floors",
    "decode": "one token's attention and one decoding step against cuDNN, flash-2, FlexAttention",
    "merge": "joining partial results against PyTorch, eager and compiled",
    "sparse": "MInference's kernel against exact attention",
    "ring": "how much of Ring Attention's sending hides under its computing (two or more GPUs)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    what = "; ".join(f"{name}: {about}" for name, about in _BENCHMARKS.items())
    parser.add_argument("what", choices=_BENCHMARKS, metavar="WHAT", help=what)
    parser.add_argument("--quick", action="store_true", help="about a minute: the smaller shapes only")
    parser.add_argument("--out", type=Path, help="append the figures to this CSV file")
    parser.add_argument("--plot", type=Path, help="draw the newest run in --out into this SVG or PNG file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, extend the ledger, draw the picture."""
    if arguments.out is not None and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        raise ValueError(f"--out: expected a CSV file in a folder that exists, got {arguments.out}")
    if arguments.plot is not None:
        check_picture(arguments.plot)
        if arguments.out is None:
            raise ValueError("--plot: pictures are drawn from the ledger; name its file with --out FILE")
    rows = import_module(f"apb.bench.{arguments.what}").run(quick=arguments.quick, out=arguments.out)
    if arguments.plot is not None:
        print(f"Drawn: {bars(arguments.out, rows[0].benchmark, arguments.plot)}")
    return 0
