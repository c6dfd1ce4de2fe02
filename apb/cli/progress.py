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


def show_phase(name: str) -> None:
    """Print the phase that begins, and the time since the program started."""
    print(f"  {time.monotonic() - _START:6.1f} s  {_TEXT.get(name, name)}", file=sys.stderr, flush=True)
