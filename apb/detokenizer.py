"""Turn tokens into text one by one, for the work of a few tokens each: an answer is never decoded as a whole.

A decoder's text of one token depends on its neighbours: a character's bytes may be spread over several tokens, and some
tokenizers drop the first token's leading space. So tokens are read in a *window* that grows until it ends with a whole
character, behind the window before it as *context*:

        context  window                    text of the window = text(context + window) − text(context)
    …  │ Ġqueen │ 0xE2 0x82 0xAC │  next   held back until 0xAC completes the €; then it is the context of the next one
"""

from typing import Any

__all__ = ["Detokenizer"]

_PART = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no whole character (yet)
_LONG = 8  # tokens: more than a character has bytes


class Detokenizer:
    """The text of one sequence of tokens, special ones left out; what has been returned stays.

    With a byte-level tokenizer the pieces put together are the text of all tokens, whatever these are. One that falls
    back on bytes turns a run of them into replacement characters as a whole if it is no text; of such a run, the
    characters that were whole before remain.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._silent = {token for token in tokenizer.all_special_ids if not self._decode([token])}
        self._context: list[int] = []
        self._window: list[int] = []
        self._text, self._given = "", 0  # the window's text, and how much of it has been returned

    def push(self, token: int) -> str:
        """Add a token; return the characters that are whole now and were not yet returned."""
        if token in self._silent:
            return ""
        self._window.append(token)
        self._text = self._read(self._window)
        if self._text and not self._text.endswith(_PART):
            return self._move(len(self._window), self._text)
        if len(self._window) >= _LONG:  # the bytes are no text, or tokens begin within characters all the time
            for first in range(len(self._window) - 1, len(self._window) - 4, -1):
                head, tail = self._read(self._window[:first]), self._decode(self._window[first:])
                if tail and head + tail == self._text:  # no character lies across: else it would be broken here
                    return self._move(first, head) + self._give(tail.rstrip(_PART))
        return self._give(self._text.rstrip(_PART))

    def end(self) -> str:
        """Return what was held back: no more tokens come."""
        return self._give(self._text)

    def _move(self, first: int, text: str) -> str:
        """Return the rest of the window's text up to token `first`; the window begins there from now on."""
        piece = text[self._given :]
        self._given = max(0, self._given - len(text))
        self._context, self._window = self._window[:first], self._window[first:]
        self._text = self._text[len(text) :]
        return piece

    def _give(self, text: str) -> str:
        """Return what is new of the window's text."""
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece

    def _read(self, tokens: list[int]) -> str:
        """Return the text of tokens that follow the context."""
        before, whole = self._decode(self._context), self._decode(self._context + tokens)
        return whole[len(before) :] if whole.startswith(before) else self._decode(tokens)

    def _decode(self, tokens: list[int]) -> str:
        # Cleaning up (" ." to ".") would reach back into what has been returned.
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
