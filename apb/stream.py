"""Turn tokens into text as they come, and end an answer at a stop string."""

from collections.abc import Sequence
from typing import Any

__all__ = ["TextStream"]

_PART = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no whole character (yet)


class TextStream:
    """The text of one answer, a piece at a time; the pieces put together are the whole text.

    A piece is held back while it may still change: while a character lacks bytes that later tokens bring, and while it
    may be the beginning of a stop string, which is no part of the answer.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer.
        head: text that precedes the first token (an answer prefix).
    """

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = (), head: str = "") -> None:
        for text in stop:
            if not text:
                raise ValueError("stop: expected some text, got ''; leave it out to end at the model's stop tokens")
        self.tokenizer, self.stop, self.head = tokenizer, tuple(stop), head
        self.tokens: list[int] = []
        self.stopped = False
        """Whether a stop string has come; further tokens change nothing."""
        self._given = ""

    @property
    def text(self) -> str:
        """The answer so far, up to a stop string."""
        return self._read()[0]

    def push(self, token: int) -> str:
        """Add a token; return what can be shown now."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        text, self.stopped = self._read()
        if self.stopped:
            return self._give(text)
        text = text.rstrip(_PART)
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        return self._give(text[: len(text) - held])

    def end(self) -> str:
        """Return what was held back: no more tokens come."""
        return self._give(self.text)

    def _read(self) -> tuple[str, bool]:
        """Return the text up to a stop string, and whether there is one."""
        answer = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [answer.index(stop) for stop in self.stop if stop in answer]
        return (self.head + answer[: min(found, default=None)]).lstrip(), bool(found)

    def _give(self, text: str) -> str:
        if not text.startswith(self._given):  # the tokenizer has taken back what was shown, which stays
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return how long the end of `text` is that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
