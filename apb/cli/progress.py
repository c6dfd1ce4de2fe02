"""Say on standard error what is going on, and show an answer while it is written."""

import shutil
import sys
import time

__all__ = ["ShowText", "redraw", "show_phase"]

_START = time.monotonic()
_TEXT = {
    "load": "loading the model",
    "plan": "agreeing on the plan",
    "prefill": "prefilling the document",
    "query": "asking the question",
    "decode": "writing the answer",
    "done": "done",
}


def redraw(text: str, *, over: bool) -> None:
    """Print a line on standard error, on a terminal in place of the one above.

    Args:
        text: one line; on a terminal it is cut to the width, since a wrapped one could not be replaced.
        over: whether the line above is an earlier state of this one. Off a terminal it stays.
    """
    if sys.stderr.isatty():
        text = text[: max(1, shutil.get_terminal_size().columns - 1)]
        if over:
            text = f"\x1b[1A\x1b[2K{text}"  # up one line, and clear it
    print(text, file=sys.stderr, flush=True)


def show_phase(name: str, done: int, total: int) -> None:
    """Print the phase that begins and the time since the program started; then its layers as they are done.

    A terminal's line is redrawn; elsewhere every quarter is printed.
    """
    if total and not sys.stderr.isatty() and done * 4 // total == (done - 1) * 4 // total:
        return
    layers = f", layer {done} of {total}" if total else ""
    elapsed = time.monotonic() - _START
    redraw(f"  {elapsed:6.1f} s  {_TEXT.get(name, name)}{layers}", over=total > 0)


class ShowText:
    """Print answers as they come, each behind its question if there are several; picklable, for spawned hosts."""

    def __init__(self, questions: list[str], *, to_stderr: bool = False) -> None:
        self._questions, self._to_stderr, self._now = questions, to_stderr, -1

    def __call__(self, question: int, piece: str) -> None:
        """Print a piece of the answer to question number `question`; an empty one ends it."""
        head = ""
        if question != self._now:
            head = f"Question: {self._questions[question]}\n" if len(self._questions) > 1 else ""
            head += "Answer: "
            self._now = question
        stream = sys.stderr if self._to_stderr else sys.stdout
        stream.write(head + (piece or "\n"))
        stream.flush()
