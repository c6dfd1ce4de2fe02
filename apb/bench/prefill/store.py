"""The prefill benchmark's ledger, and what of it need not be measured again: a run can stop anywhere and go on."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from apb.bench import read_rows
from apb.bench.prefill.record import PrefillRow

__all__ = ["Key", "done", "failed", "key", "newest", "read"]


class Key(NamedTuple):
    """What a row is known by: columns of `PrefillRow`."""

    mode: str
    shape: str
    tokens: int
    hosts: int
    method: str
    device: str
    backend: str
    dtype: str
    link: str


def key(row: PrefillRow) -> Key:
    """Return what a row is known by."""
    return Key(*(getattr(row, name) for name in Key._fields))


def failed(row: PrefillRow) -> bool:
    """Say whether a method could not run: it has no time, or was to be counted and has no operations."""
    return math.isnan(row.tflop if row.mode == "counted" else row.ttft_ms)


def done(rows: Iterable[PrefillRow], device: str) -> set[Key]:
    """Return the keys of what needs no measuring on this device; what failed last time is tried again."""
    return {key(row) for row in newest(rows) if row.device == device and not failed(row)}


def newest(rows: Iterable[PrefillRow]) -> list[PrefillRow]:
    """Return the last row of each key, in the order in which the keys came first."""
    return list({key(row): row for row in rows}.values())


def read(path: Path) -> list[PrefillRow]:
    """Read a ledger, the oldest row first; a file that is not there yet has none.

    Raises:
        ValueError: as `apb.bench.read_rows`.
    """
    return read_rows(path, PrefillRow) if path.exists() and path.stat().st_size else []
