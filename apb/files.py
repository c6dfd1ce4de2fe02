"""Files that appear whole or not at all, and marks that tell their contents apart."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["fingerprint", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, then put it there in one step: a crash leaves the old file or the new.

    Args:
        path: in a directory that is there.
        write: writes the file that it is given the path of.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())  # else the name could reach the disk before what is in the file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fingerprint(*paths: Path) -> str:
    """Return the first 12 hex digits of the SHA-256 of these files' contents, one behind the other."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                found.update(piece)
    return found.hexdigest()[:12]
