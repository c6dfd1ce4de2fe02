"""Benchmarks, one module each, and the ledger that they all write: plots and tables are drawn from it alone."""

import csv
import datetime
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import torch

__all__ = ["Environment", "Row", "append", "environment"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: a line of `benchmarks/ledger.csv`.

    Attributes:
        date: when the run began, ISO 8601 in UTC; the day alone in early rows.
        device: name of the GPU, or of the processor.
        torch: version of PyTorch.
        triton: version of Triton, or "none".
        commit: short hash of the checkout, with "+" if it has changes; "unknown" outside one.
        benchmark: which benchmark.
        case: which input, such as the lengths.
        backend: who computed it.
        ms: median time; NaN if it could not run.
        tflops: useful 10¹² operations a second; NaN where that has no meaning.
        notes: whatever else has to be known, such as why it could not run.
        low_ms, high_ms: the times between which eight of ten repeats fell; NaN where none were kept.
        gbytes: useful 10⁹ bytes a second, each input read once and each output written once; NaN where the work is
            not bound by them.
    """

    date: str
    device: str
    torch: str
    triton: str
    commit: str
    benchmark: str
    case: str
    backend: str
    ms: float
    tflops: float
    notes: str = ""
    low_ms: float = math.nan
    high_ms: float = math.nan
    gbytes: float = math.nan


class Environment(TypedDict):
    """The columns of a row that are the same for a whole run; `Row` says what they are."""

    date: str
    device: str
    torch: str
    triton: str
    commit: str


def environment() -> Environment:
    """Return the date, device, versions and commit of this run."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
    }


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a ledger, with the column names first if the file is new."""
    names = [field.name for field in fields(Row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            cells = asdict(row).items()
            writer.writerow({k: ("" if math.isnan(v) else f"{v:.4g}") if isinstance(v, float) else v for k, v in cells})


def _commit() -> str:
    """Ask git for the commit of this checkout; a copy without git says it in `APB_COMMIT`."""
    if os.environ.get("APB_COMMIT"):
        return os.environ["APB_COMMIT"]
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()
