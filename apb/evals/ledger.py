"""The quality ledger: a CSV file, a row for each method, length, number of hosts and task, with every sample's figures.

The documentation's tables are drawn from it, so that no figure is typed by hand; unlike the store it has no answers'
texts, and so is small enough to be kept with the code.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apb.evals.record import Record
from apb.files import write_whole

__all__ = ["read_ledger", "write_ledger"]

_RUN = ("date", "device", "torch", "triton", "commit")
_CELL = ("model", "method", "hosts", "length", "task")
_COLUMNS = (*_RUN, *_CELL, "label", "seeds", "scores", "nlls")


def write_ledger(
    path: Path, records: Iterable[Record], *, run: Mapping[str, Any], labels: Mapping[str, str] | None = None
) -> None:
    """Put records into a ledger; rows of the same model, method, hosts, length and task are replaced.

    Args:
        path: the file; made if it is not there, and written whole or not at all.
        records: in any order.
        run: date, device, torch, triton and commit of the run that they are from.
        labels: what to call methods, by their text.
    """
    rows = {tuple(row[name] for name in _CELL): row for row in _rows(path)}
    cells: dict[tuple[str, ...], list[Record]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        cells.setdefault(tuple(str(getattr(record, name)) for name in _CELL), []).append(record)
    for cell, found in cells.items():
        rows[cell] = {
            **{name: run.get(name, "") for name in _RUN},
            **dict(zip(_CELL, cell, strict=True)),
            "label": (labels or {}).get(found[0].method, ""),
            "seeds": " ".join(str(record.seed) for record in found),
            "scores": " ".join(f"{record.score:.4g}" for record in found),
            "nlls": " ".join(f"{record.nll:.4g}" for record in found),
        }
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    write_whole(path, lambda part: part.write_text(text.getvalue(), encoding="utf-8"))


def read_ledger(path: Path) -> tuple[list[Record], dict[str, str], list[dict[str, str]]]:
    """Read a ledger: its records (without texts), the methods' labels, and the runs that they are from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row whose seeds, scores and likelihoods are not of one number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"ledger: no file at {path}")
    records, labels, runs = [], {}, {}
    for row in _rows(path):
        if row["label"]:
            labels[row["method"]] = row["label"]
        run = {name: row[name] for name in _RUN}
        runs[tuple(run.values())] = run
        columns = [row[name].split() for name in ("seeds", "scores", "nlls")]
        if len({len(column) for column in columns}) != 1:
            where = " ".join(row[name] for name in _CELL)
            raise ValueError(f"ledger: {path.name}, {where}: {[len(c) for c in columns]} seeds, scores and NLLs")
        for seed, score, nll in zip(*columns, strict=True):
            records.append(
                Record(
                    model=row["model"],
                    method=row["method"],
                    hosts=int(row["hosts"]),
                    length=int(row["length"]),
                    task=row["task"],
                    seed=int(seed),
                    score=float(score),
                    nll=float(nll),
                    prediction="",
                    references=(),
                )
            )
    return records, labels, list(runs.values())


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
