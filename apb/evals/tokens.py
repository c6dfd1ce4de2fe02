"""A tokenizer with a memory: the pieces that samples share are tokenised once a process."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["Tokens"]

_KNOWN: WeakKeyDictionary[Any, dict[str, list[int]]] = WeakKeyDictionary()


class Tokens:
    """Tokenise text piece by piece, without special tokens.

    Args:
        tokenizer: of the model; all `Tokens` of one tokenizer share their memory.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known = _KNOWN.setdefault(tokenizer, {})

    def new(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise pieces that will hardly come again."""
        return self._tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []

    def known(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise pieces that come again, and remember them; the lists are shared, so leave them as they are."""
        if missing := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known.update(zip(missing, self.new(missing), strict=True))
        return [self._known[text] for text in texts]
