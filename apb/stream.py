"""Show answers while they are written: whole characters, no white space around, and an end at a stop string."""

from collections.abc import Callable, Sequence
from typing import Any

from apb.detokenizer import Detokenizer

__all__ = ["TextStream", "TextStreams"]


class TextStream:
    """The text of one answer, a piece at a time; the pieces put together are the whole, without white space around it.

    A piece is held back while it may still change: while a character lacks bytes that later tokens bring, while it may
    be the beginning of a stop string, which is no part of the answer, and while it may be white space at the end. The
    work for a token does not grow with the answer.

    Args:
        tokenizer: of the model.
        stop: texts that end the answer.
        head: text that precedes the first token (an answer prefix).
    """

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = (), head: str = "") -> None:
        for text in stop:
            if not text:
                raise ValueError("stop: expected some text, got ''; leave it out to end at the model's stop tokens")
        self.stop = tuple(stop)
        self.stopped = False
        """Whether a stop string has come; further tokens change nothing."""
        self._detokenizer = Detokenizer(tokenizer)
        self._pieces: list[str] = []
        self._head, self._unsure = head, ""  # what precedes the first piece; what may be a stop string's beginning
        self._space: list[str] = []

    @property
    def text(self) -> str:
        """What has been given: after `end` the whole answer, up to a stop string."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Add a token; return what can be shown now."""
        return "" if self.stopped else self._take(self._detokenizer.push(token), last=False)

    def end(self) -> str:
        """Return what was held back: no more tokens come."""
        return "" if self.stopped else self._take(self._detokenizer.end(), last=True)

    def _take(self, new: str, *, last: bool) -> str:
        """Look for a stop string, and hold back what may become one."""
        text = self._unsure + new
        found = [text.index(stop) for stop in self.stop if stop in text]
        self.stopped = bool(found)
        if found or last:
            sure = min(found, default=len(text))
        else:
            sure = len(text) - max((_overlap(text, stop) for stop in self.stop), default=0)
        self._unsure = text[sure:]
        return self._give(text[:sure])

    def _give(self, text: str) -> str:
        """Hold back white space at the end, and drop it at the beginning."""
        text, self._head = self._head + text, ""
        if not text.strip():
            self._space.append(text)
            return ""
        text = "".join(self._space) + text
        piece = text.rstrip() if self._pieces else text.strip()
        self._space = [text[len(text.rstrip()) :]]
        self._pieces.append(piece)
        return piece


class TextStreams:
    """The texts of several answers, which may be written at the same time.

    Args:
        tokenizer: of the model.
        count: how many answers.
        stop, head: as in `TextStream`, of each.
        show: called with (answer's number, piece) as they are written; an empty piece ends an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        count: int,
        *,
        stop: Sequence[str] = (),
        head: str = "",
        show: Callable[[int, str], None] | None = None,
    ) -> None:
        self._streams = [TextStream(tokenizer, stop=stop, head=head) for _ in range(count)]
        self._show = show or (lambda answer, piece: None)

    @property
    def texts(self) -> list[str]:
        """What has been given of each answer."""
        return [stream.text for stream in self._streams]

    def push(self, answer: int, number: int, token: int) -> bool:
        """Add token `number` of an answer; return whether a stop string ends it. What `generate_batch` calls."""
        if piece := self._streams[answer].push(token):
            self._show(answer, piece)
        return self._streams[answer].stopped

    def end(self, answer: int) -> None:
        """Say that an answer is complete."""
        if rest := self._streams[answer].end():
            self._show(answer, rest)
        self._show(answer, "")


def _overlap(text: str, stop: str) -> int:
    """Return how long the end of `text` is that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
