"""Measure against the peers in one run on a GPU, and keep the ledger."""

import argparse
from functools import partial
from importlib import import_module
from pathlib import Path

from apb.bench.plots import bars
from apb.cli import bench_prefill
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
    "overlap": "how much of APB's sending hides under its computing, with a trace (two or more GPUs)",
    "end-to-end": "prefill and decoding of a whole model with random weights, method by method (two or more GPUs)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, about in _BENCHMARKS.items():
        one = what.add_parser(name, help=about, description=f"Measure {about}.")
        one.add_argument("--quick", action="store_true", help="about a minute: the smaller shapes only")
        one.add_argument("--out", type=Path, help="append the figures to this CSV file")
        one.add_argument("--plot", type=Path, help="draw the newest run in --out into this SVG or PNG file")
        if name == "kernel":
            one.add_argument("--by", nargs="+", metavar="NAME", help="only these of the table's columns: hopper fa3")
        if name == "end-to-end":
            one.add_argument("--methods", nargs="+", metavar="NAME[:SETTING=VALUE,…]", help="as in apb bench prefill")
    about = "a whole prefill, to the first token, by every method: measured, simulated on one GPU, or counted"
    bench_prefill.add_arguments(what.add_parser("prefill", help=about, description=bench_prefill.__doc__))


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, extend the ledger, draw the picture."""
    if arguments.what == "prefill":
        return bench_prefill.run(arguments)
    if arguments.out is not None and (arguments.out.is_dir() or not arguments.out.parent.is_dir()):
        raise ValueError(f"--out: expected a CSV file in a folder that exists, got {arguments.out}")
    if arguments.plot is not None:
        check_picture(arguments.plot)
        if arguments.out is None:
            raise ValueError("--plot: pictures are drawn from the ledger; name its file with --out FILE")
    module = import_module(f"apb.bench.{arguments.what.replace('-', '_')}")
    more = {name: getattr(arguments, name) for name in ("methods", "by") if getattr(arguments, name, None)}
    rows = module.run(quick=arguments.quick, out=arguments.out, **more)
    if arguments.plot is not None:
        draw = getattr(module, "plot", None) or partial(bars, benchmark=rows[0].benchmark)
        print(f"Drawn: {draw(arguments.out, path=arguments.plot)}")
    return 0
