"""Say on standard error what is going on."""

import sys
import time

__all__ = ["show_phase"]

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
