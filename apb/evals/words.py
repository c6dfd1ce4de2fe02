"""Aggregation, RULER's two tasks (arXiv 2404.06654): name the words that a long list has most often."""

import math
import random
import string
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, count, takewhile
from typing import Literal

from apb.evals import haystack
from apb.evals.lexicon import distinct, words
from apb.evals.sample import Desk, Draft, Task
from apb.evals.scoring import reference_fraction
from apb.evals.tokens import Tokens

__all__ = ["CommonWords", "FrequentWords"]

_LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_LIST_QUERY = "Question: What are the 10 most common words in the above list?"
_LIST_ANSWER = " Answer: The top 10 words that appear most often in the list are:"
_SHORT = 4096  # RULER's own border
_COMMON = 10

_CODE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
_CODE_QUERY = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_CODE_ANSWER = " Answer: According to the coded text above, the three most frequently appeared words are:"

_ZETA = math.pi**2 / 6  # ζ(2)
_LEAST_WORDS = 80  # from there on the third coded word is more frequent than the fourth


@dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
    """Ten words stand 30 times each in a numbered list of words that stand 3 times, after a worked example.

    As in RULER, lists in fewer than 4096 tokens have them 6 times and once, and a shorter example. At the end of the
    list some words may stand less often than the other uncommon ones, so that it fits; when the word lists run out,
    both numbers are multiplied.
    """

    name: str = "cwe"
    title: str = "Common words"
    suite: Literal["ruler", "infinitebench"] = "ruler"
    max_new_tokens: int = 120
    question_room: int = 64

    def write(self, desk: Desk) -> Draft:
        """Write the list; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        short, split = desk.length < _SHORT, desk.sources.split
        pool = [word for word in _pool(split) if word not in _example_words(split)]
        common = _apart(draw, pool)
        others = [word for word in draw.sample(pool, len(pool)) if not any(part in word for part in common)]
        (head,) = tokens.known([_example(split, short) + _LIST])
        listed = _fitting(
            desk, desk.room - len(head), common, others, often=6 if short else 30, seldom=1 if short else 3
        )
        draw.shuffle(listed)
        ids = list(head)
        for number, word in zip(_numbers(tokens, len(listed)), _spaced(tokens, listed), strict=True):
            ids += number
            ids += word
        answer = sorted(common, key=listed.index)
        return Draft(
            document=haystack.fill(ids, desk.room, tokens.known(["\n" + haystack.NOISE])[0]),
            query=_LIST_QUERY,
            answer_prefix=_LIST_ANSWER,
            answer=" " + _numbered(answer),
            references=tuple(answer),
            facts={"most common": tuple(answer)},
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the fraction of the words that the prediction has."""
        return reference_fraction(prediction, references)


def _fitting(desk: Desk, room: int, common: list[str], others: list[str], *, often: int, seldom: int) -> list[str]:
    """Return the words, each as often as it is to stand, that fit into the room behind their numbers."""
    tokens = desk.tokens
    ends = list(accumulate(map(len, _numbers(tokens, max(room // 2, 11 * often)))))
    sizes = list(map(len, _spaced(tokens, others)))
    listed, used = common * often, often * sum(map(len, _spaced(tokens, common)))

    def fits(size: int, times: int) -> bool:
        entries = len(listed) + times
        return entries <= len(ends) and used + times * size + ends[entries - 1] <= room

    desk.require(desk.room - room + used + sizes[0] + ends[len(listed)])
    times = seldom
    for word, size in zip(others, sizes, strict=True):
        while times and not fits(size, times):
            times -= 1
        listed += [word] * times
        used += times * size
        if not times:
            return listed
    return _fitting(desk, room, common, others, often=2 * often, seldom=2 * seldom)


def _apart(draw: random.Random, pool: Sequence[str]) -> list[str]:
    """Draw ten words none of which stands in another."""
    chosen: list[str] = []
    while len(chosen) < _COMMON:
        word = draw.choice(pool)
        if not any(word in other or other in word for other in chosen):
            chosen.append(word)
    return chosen


@lru_cache
def _pool(split: str) -> tuple[str, ...]:
    return tuple(sorted({*words("adjective", split), *words("noun", split), *words("verb", split)}))


@lru_cache
def _example_words(split: str) -> tuple[str, ...]:
    return tuple(random.Random(f"apb/cwe/{split}").sample(_pool(split), 40))


@lru_cache
def _example(split: str, short: bool) -> str:
    chosen = _example_words(split)
    listed = [*chosen[:10] * 3, *chosen[10:20]] if short else [*chosen[:10] * 10, *chosen[10:] * 3]
    random.Random(f"apb/cwe/{split}").shuffle(listed)
    return f"{_LIST}{_numbered(listed)}\n{_LIST_QUERY}{_LIST_ANSWER} {_numbered(chosen[:10])}\n\n"


def _numbered(listed: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))


def _numbers(tokens: Tokens, count: int) -> list[list[int]]:
    return tokens.known([f"{' ' if number else ''}{number + 1}." for number in range(count)])


def _spaced(tokens: Tokens, listed: Sequence[str]) -> list[list[int]]:
    return tokens.known([" " + word for word in listed])


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Task):
    """Coded words of six letters; the k-th most frequent one makes up k⁻² / ζ(2) of the text, and the first is dots.

    More dots fill what is left; those are not coded words, so that the order of the others stays.
    """

    name: str = "fwe"
    title: str = "Frequent words"
    suite: Literal["ruler", "infinitebench"] = "ruler"
    max_new_tokens: int = 120
    question_room: int = 80

    def write(self, desk: Desk) -> Draft:
        """Write the coded text; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        head, dots = tokens.known([_CODE, " ..."])
        space = desk.room - len(head)
        kinds = len(_counts(max(space, _LEAST_WORDS)))
        coded = distinct(lambda: "".join(draw.choices(string.ascii_lowercase, k=6)), kinds - 1, set())
        units = [dots, *tokens.new([" " + word for word in coded])]

        def size(total: int) -> int:
            return sum(times * len(unit) for times, unit in zip(_counts(total), units, strict=False))

        desk.require(len(head) + size(_LEAST_WORDS))
        total = bisect_right(range(space + 1), space, lo=_LEAST_WORDS, key=size) - 1
        listed = [unit for times, unit in zip(_counts(total), units, strict=False) for _ in range(times)]
        listed += [dots] * ((space - sum(map(len, listed))) // len(dots))
        draw.shuffle(listed)
        answer = tuple(coded[:3])
        return Draft(
            document=haystack.fill([*head, *chain.from_iterable(listed)], desk.room, dots),
            query=_CODE_QUERY,
            answer_prefix=_CODE_ANSWER,
            answer=" " + ", ".join(answer),
            references=answer,
            facts={"most frequent": answer},
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the fraction of the words that the prediction has."""
        return reference_fraction(prediction, references)


def _counts(total: int) -> list[int]:
    """Return how often each kind of word stands among `total`, the most frequent one first, none of them 0."""
    return list(takewhile(bool, (round(total / rank**2 / _ZETA) for rank in count(1))))
