"""Words, keys and values to hide: adjectives, nouns and verbs of `wonderwords`, seven-digit numbers, UUIDs."""

import random
import re
import uuid
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import Literal

__all__ = ["distinct", "new_number", "new_uuid", "word_key", "words"]

_WORD = re.compile(r"[a-z]{2,}")


@lru_cache
def words(kind: Literal["adjective", "noun", "verb"], split: str) -> tuple[str, ...]:
    """Return one half of the words of a kind, in alphabetical order.

    A word's half depends on its letters alone, so that it is the same for every kind and every release of the lists.

    Raises:
        ImportError: wonderwords is not installed.
    """
    try:
        text = files("wonderwords").joinpath(f"assets/{kind}list.txt").read_text(encoding="utf-8")
    except ModuleNotFoundError:
        raise ImportError("wonderwords is needed for words to hide; pip install 'apb[eval]'") from None
    listed = {line.strip() for line in text.splitlines()}
    return tuple(sorted(word for word in listed if _WORD.fullmatch(word) and half(word) == split))


def half(text: str) -> str:
    """Return the split that a text belongs to."""
    return ("evaluation", "training")[zlib.crc32(text.encode()) & 1]


def word_key(draw: random.Random, split: str) -> str:
    """Draw an adjective and a noun, "tall-tree"."""
    return f"{draw.choice(words('adjective', split))}-{draw.choice(words('noun', split))}"


def new_number(draw: random.Random) -> str:
    """Draw seven digits; the first one is not 0."""
    return str(draw.randrange(1_000_000, 10_000_000))


def new_uuid(draw: random.Random) -> str:
    """Draw a version 4 UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def distinct(make: Callable[[], str], count: int, taken: set[str]) -> list[str]:
    """Draw until `count` are new, and add them to `taken`."""
    made: list[str] = []
    while len(made) < count:
        if (one := make()) not in taken:
            taken.add(one)
            made.append(one)
    return made
