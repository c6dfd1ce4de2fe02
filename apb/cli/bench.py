"""Measure kernels against their peers in one run on a GPU, and keep the ledger."""

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("what", choices=("kernel",), help="kernel: masked attention against FlexAttention, SDPA, FA3")
    parser.add_argument("--quick", action="store_true", help="about a minute: the smaller shapes only")
    parser.add_argument("--out", type=Path, help="append the figures to this CSV file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, extend the ledger."""
    from apb.bench import kernel

    kernel.run(quick=arguments.quick, out=arguments.out)
    return 0
