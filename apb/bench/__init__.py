"""Benchmarks, one module each, and the ledger that they all write: plots and tables are drawn from it alone."""

import csv
import datetime
import io
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Environment", "Row", "append", "environment", "read_rows", "reason"]

Kind = TypeVar("Kind", bound="DataclassInstance")

_REASON = 200  # characters of it
_READ: dict[Any, Callable[[str], Any]] = {float: lambda cell: float(cell or "nan"), int: int, str: str}


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


def environment(device: torch.device | None = None) -> Environment:
    """Return the date, device, versions and commit of this run; None is the current GPU, or else the processor."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
    }


def reason(error: BaseException) -> str:
    """Say why something could not run, in a ledger's cell: the error's type and the beginning of its first line.

    >>> reason(ValueError("no heads\\nand more"))
    'ValueError: no heads'
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:_REASON]}"


def append(path: Path, rows: "Iterable[DataclassInstance]") -> None:
    """Add rows of one dataclass to a ledger, a line each, in one write; behind the column names if the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    rows = list(rows)
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.exists() else b""
    if old:
        _check_columns(path, next(csv.reader([old.split(b"\n", 1)[0].decode(errors="replace")])), type(rows[0]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not old:
        writer.writerow(field.name for field in fields(rows[0]))
    writer.writerows(map(_cell, astuple(row)) for row in rows)
    missing = "\n" if old and not old.endswith(b"\n") else ""  # a file from another hand, or a run that was cut off
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(missing + text.getvalue())


def read_rows(path: Path, kind: type[Kind]) -> list[Kind]:
    """Read the rows of a ledger; empty cells of numbers are NaN.

    Args:
        path: CSV file that `append` wrote.
        kind: dataclass of its rows, whose fields are texts, integers and floating-point numbers.

    Raises:
        ValueError: no CSV file, other columns than `kind` has, or a line that is no row, with its number.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file, strict=True)
        try:
            head = next(lines, [])
            found = [(lines.line_num, cells) for cells in lines if cells]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: expected a ledger in CSV, got {error}; repair it, or take another file"
            ) from None
    _check_columns(path, head, kind)
    return [_row(f"{path}, line {number}", cells, kind) for number, cells in found]


def _cell(value: float | int | str) -> str:
    """Write a value on one line: NaN as nothing, other fractions with four digits, line breaks as spaces."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return " ".join(str(value).splitlines())


def _check_columns(path: Path, head: Sequence[str], kind: "type[DataclassInstance]") -> None:
    """Refuse a file whose columns are not the fields of `kind`."""
    names = [field.name for field in fields(kind)]
    if list(head) != names:
        raise ValueError(f"{path}: expected the columns {names}, got {str(head)[:200]}; take another file")


def _row(where: str, cells: Sequence[str], kind: type[Kind]) -> Kind:
    """Read one line's cells."""
    columns = fields(kind)
    if len(cells) != len(columns):
        raise ValueError(f"{where}: expected {len(columns)} cells, got {len(cells)}; repair or remove the line")
    found: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        try:
            found[column.name] = _READ[column.type](cell)
        except ValueError:
            raise ValueError(
                f"{where}: expected a number as {column.name}, got {cell!r}; repair or remove the line"
            ) from None
    return kind(**found)


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
