"""Measure the merge of partial attention against PyTorch, eager and compiled, all in one run on one GPU.

Every part is read once and the result written once: those bytes a second are set against a large copy's or sum's.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from apb.bench import Row
from apb.bench.measure import Bench
from apb.merge import merge

__all__ = ["CASES", "Case", "moved_bytes", "run"]

HEADS, DIM = 32, 128


class Case(NamedTuple):
    """Partial outputs [parts, 1, 32, rows, 128] in a dtype."""

    parts: int
    rows: int
    dtype: torch.dtype


CASES = (Case(2, 16384, torch.bfloat16), Case(8, 1, torch.float32))
"""Two kernel calls over one host's rows, and eight hosts' parts of a decoded token."""


def moved_bytes(case: Case) -> int:
    """Count the bytes of outputs and LSEs, those of all parts and those of the result.

    >>> moved_bytes(Case(parts=2, rows=1, dtype=torch.bfloat16))
    24960
    """
    return (case.parts + 1) * HEADS * case.rows * (DIM * case.dtype.itemsize + 4)


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure every backend and peer on every case, print a table, extend the ledger.

    Args:
        quick: changes nothing; this is quick.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    bench = Bench("merge")
    for case in CASES:
        generator = torch.Generator("cuda").manual_seed(0)
        outs = torch.randn(case.parts, 1, HEADS, case.rows, DIM, device="cuda", generator=generator).to(case.dtype)
        lses = torch.randn(outs.shape[:-1], device="cuda", generator=generator)
        calls = {
            "triton": partial(merge, outs, lses, backend="triton"),
            "eager": partial(merge, outs, lses, backend="torch"),
            "compiled": partial(torch.compile(merge, dynamic=False), outs, lses, backend="torch"),
        }
        name = f"{case.parts} × {case.rows} {str(case.dtype).removeprefix('torch.')}"
        bench.compare(name, calls, moved=moved_bytes(case), graph=calls)
    return bench.finish(out)
