"""Say on standard error what is going on, and show an answer while it is written."""

import sys
import time

__all__ = ["ShowText", "show_phase"]

_START = time.monotonic()
_TEXT = {
    "load": "loading the model",
    "plan": "agreeing on the plan",
    "prefill": "prefilling the document",
    "query": "asking the question",
    "decode": "writing the answer",
    "done": "done",
}


def show_phase(name: str, done: int, total: int) -> None:
    """Print the phase that begins and the time since the program started; then its layers as they are done.

    A terminal's line is redrawn; elsewhere every quarter is printed.
    """
    terminal = sys.stderr.isatty()
    if total and not terminal and done * 4 // total == (done - 1) * 4 // total:
        return
    layers = f", layer {done} of {total}" if total else ""
    again = "\x1b[1A\x1b[2K" if terminal and total else ""  # up one line, and clear it
    elapsed = time.monotonic() - _START
    print(f"{again}  {elapsed:6.1f} s  {_TEXT.get(name, name)}{layers}", file=sys.stderr, flush=True)


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
