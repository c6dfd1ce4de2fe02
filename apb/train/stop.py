"""When to end a run early: Ctrl-C, SIGTERM, or the time that it was given."""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["stopper"]


@contextmanager
def stopper(minutes: float | None) -> Generator[Callable[[], str | None]]:
    """Give a function that says why to stop, or None; a second signal interrupts at once. Main thread only.

    Raises:
        ValueError: `minutes` is not more than 0.
    """
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes: expected more than 0, got {minutes}")
    asked: list[str] = []
    end = None if minutes is None else time.monotonic() + 60 * minutes

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append("interrupted" if number == signal.SIGINT else "terminated")

    def stop() -> str | None:
        return asked[0] if asked else "time is up" if end is not None and time.monotonic() >= end else None

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
