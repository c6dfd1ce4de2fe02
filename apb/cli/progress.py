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
    """Print the phase that begins and the time since the program started; redraw the line as its layers are done.

    Where standard error is not a terminal, only every quarter is printed.
    """
    terminal = sys.stderr.isatty()
    if total and not terminal and done * 4 // total == (done - 1) * 4 // total:
        return
    line = f"  {time.monotonic() - _START:6.1f} s  {_TEXT.get(name, name)}"
    if total:
        line += f", layer {done} of {total}"
    redrawn = terminal and total and done < total
    start = "\r" if terminal else ""
    print(f"{start}{line}", end="" if redrawn or (terminal and not total and name == "prefill") else "\n",
          file=sys.stderr, flush=True)  # fmt: skip
