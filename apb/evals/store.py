"""Where records are kept: lines of JSON that are only ever added to, so that a run can stop anywhere and go on.

A folder holds `settings.json`, which is what must not change between runs, and one `records-I-of-N.jsonl` for each
process that writes. Readers merge them.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from apb.evals.record import Key, Record
from apb.files import write_whole

__all__ = ["Store", "read_records", "read_settings"]

Note = Callable[[str], None]

_UNNOTED = {"samples_version": 1}  # what runs had that did not note it yet


class Store:
    """One process's hold of a folder of records.

        store = Store(folder, settings={"model": "…", "dtype": "bfloat16"})
        store.done(record.key)      # was it answered, in this run or an earlier one, by this process or another?
        store.add([record])         # on disk when it returns
        store.records()             # all of them, from every process

    Args:
        folder: made if it is not there.
        settings: JSON values that every run in this folder must agree on. A name that an earlier run did not give is
            added.
        labels: what to call methods in reports, by their text; noted, free to change.
        run: what else to note about this run, such as its device and versions.
        shard: (i, n): this process is the i-th of n, and writes `records-i-of-n.jsonl`.
        on_note: told what was found, such as a half-written line.

    Raises:
        ValueError: a setting differs, a file that is no store's, or another process that writes the same shard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        settings: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        run: Mapping[str, Any] | None = None,
        shard: tuple[int, int] = (0, 1),
        on_note: Note | None = None,
    ) -> None:
        from filelock import FileLock, Timeout

        self.folder, note = Path(folder), on_note or (lambda text: None)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"out: expected a folder, got the file {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"records-{shard[0]}-of-{shard[1]}.jsonl"
        self._lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"out: another process is writing {self.path}; wait for it, or give each process a --shard of its own"
            ) from None
        try:
            with FileLock(self.folder / "settings.lock"):
                _agree(self.folder, settings or {}, labels or {}, run)
            self._done = {record.key for record in read_records(self.folder, on_note=note)}
            self._file: BinaryIO = self.path.open("ab")
            _cut_half_line(self.path)
        except BaseException:
            self._lock.release()
            raise

    def __len__(self) -> int:
        """How many different records are known, from this process and, as of its start, from others."""
        return len(self._done)

    def done(self, key: Key) -> bool:
        """Say whether a question has been answered."""
        return key in self._done

    def add(self, records: Iterable[Record]) -> None:
        """Write records and wait until the disk has them; those that are there already are left out."""
        new = {record.key: record for record in records if record.key not in self._done}
        if not new:
            return
        self._file.write("".join(f"{record.to_line()}\n" for record in new.values()).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._done.update(new)

    def records(self) -> list[Record]:
        """Read every process's records, as `read_records`."""
        return read_records(self.folder)

    def close(self) -> None:
        """Let another process write this shard."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> "Store":
        """Return the store itself, closed when the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(folder: str | Path, *, on_note: Note | None = None) -> list[Record]:
    """Read the records of all processes; of several with one key the first counts.

    A last line without its end is what a killed process was writing (or a running one is); it is left out.

    Args:
        folder: with `records-*.jsonl`; others' files are left alone.
        on_note: told what was left out.

    Raises:
        ValueError: a line that is no record, with its file and number.
    """
    found: dict[Key, Record] = {}
    for path in sorted(Path(folder).glob("records-*.jsonl")):
        *lines, rest = path.read_bytes().split(b"\n")
        if rest and on_note:
            on_note(f"{path.name}: the last line is half-written, so its question will be asked again")
        for number, line in enumerate(lines, 1):
            try:
                record = Record.from_line(line.decode())
            except ValueError as error:
                raise ValueError(f"out: {path}, line {number} is no record ({error}); repair or remove it") from None
            found.setdefault(record.key, record)
    return list(found.values())


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Read what is noted about a folder's runs: the `settings` that they share, `labels` of methods, and `runs`.

    All three are empty if there is nothing yet.

    Raises:
        ValueError: the file is not a store's.
    """
    path = Path(folder) / "settings.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {"settings": {}, "labels": {}, "runs": []}
    except ValueError as error:
        raise ValueError(f"out: {path} is not readable ({error}); repair it, or take another folder") from None
    if not isinstance(found, dict) or not found.keys() >= {"settings", "labels", "runs"}:
        raise ValueError(f"out: {path} was not written by apb eval; take another folder")
    return found


def _agree(folder: Path, settings: Mapping[str, Any], labels: Mapping[str, str], run: Mapping[str, Any] | None) -> None:
    """Hold settings against those of earlier runs, and note the new ones."""
    before = read_settings(folder)
    earlier = _UNNOTED | before["settings"] if before["settings"] else {}
    for name, value in settings.items():
        known = earlier.get(name, value)
        if known != value:
            raise ValueError(
                f"{name}: the records in {folder} were made with {known!r}, got {value!r}; "
                f"give the same, or another folder with --out"
            )
    runs = [*before["runs"], dict(run)] if run and dict(run) not in before["runs"] else before["runs"]
    after = {"settings": {**before["settings"], **settings}, "labels": {**before["labels"], **labels}, "runs": runs}
    if after != before or not (folder / "settings.json").exists():
        write_whole(folder / "settings.json", lambda part: part.write_text(json.dumps(after, indent=2) + "\n"))


def _cut_half_line(path: Path) -> None:
    """Cut off what follows the last complete line of our own file, which nobody else is writing."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
