"""Haystacks: hide needles at sentence boundaries of noise or of a text, in exactly so many tokens."""

import random
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path

from apb.evals.sample import Desk
from apb.evals.tokens import Tokens

__all__ = ["NOISE", "fill", "hide", "noise", "spread", "text"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's line of five sentences that says nothing."""

_DEPTHS = 40  # evenly spaced, both ends included
_WORDS = 60  # a longer sentence is cut
_BATCH = 64  # sentences tokenised at a time


def spread(draw: random.Random, count: int) -> list[float]:
    """Draw that many distinct depths in [0, 1], in order, from 40 evenly spaced ones as RULER does (or more)."""
    places = max(_DEPTHS, count)
    return [place / (places - 1) for place in sorted(draw.sample(range(places), count))]


def hide(
    needles: Sequence[list[int]], depths: Sequence[float], filler: Iterable[list[int]], room: int
) -> tuple[list[int], tuple[int, ...]]:
    """Lay out filler with needles between its units; the last unit of filler is cut where the room ends.

    Args:
        needles: tokens of each, in the order in which they stand.
        depths: of each, in [0, 1], in ascending order; the boundary between two units nearest to it is taken.
        filler: tokens of each unit, without end. The first one always comes first.
        room: tokens in all, at least those of the needles and of the first unit.

    Returns:
        exactly `room` tokens, and where in them each needle begins.
    """
    space = room - sum(map(len, needles))
    units: list[list[int]] = []
    ends: list[int] = []
    for unit in filler:
        if unit:
            units.append(unit)
            ends.append((ends[-1] if ends else 0) + len(unit))
        if ends and ends[-1] >= space:
            break
    boundaries = ends if ends[-1] == space else ends[:-1]
    after = [_nearest(boundaries, depth * space) for depth in depths]
    ids: list[int] = []
    positions: list[int] = []
    for number, unit in enumerate(units):
        ids += unit if number < len(boundaries) else unit[: space - (ends[-2] if number else 0)]
        while len(positions) < len(needles) and after[len(positions)] == number:
            positions.append(len(ids))
            ids += needles[len(positions) - 1]
    return ids, tuple(positions)


def _nearest(values: Sequence[int], target: float) -> int:
    right = min(bisect_left(values, target), len(values) - 1)
    return right - 1 if right and target - values[right - 1] < values[right] - target else right


def fill(ids: list[int], room: int, unit: list[int]) -> list[int]:
    """Return `ids` with as much of `unit`, again and again, as fits into the room."""
    while len(ids) < room:
        ids = ids + unit[: room - len(ids)]
    return ids


def noise(tokens: Tokens) -> Iterator[list[int]]:
    """Yield RULER's noise, a line a unit, without end."""
    first, rest = tokens.known([NOISE, "\n" + NOISE])
    return chain([first], repeat(rest))


def text(desk: Desk) -> Iterator[list[int]]:
    """Yield the sentences of the haystack file's half, from a drawn one on, again and again."""
    sentences, _ = _read(desk.source("haystack"), desk.sources.split)
    start = desk.random.randrange(len(sentences))
    return _sentences(desk.tokens, sentences, start)


def digits(desk: Desk) -> frozenset[str]:
    """Return every seven digits in a row that the haystack file has, which no value may be."""
    return _read(desk.source("haystack"), desk.sources.split)[1]


def _sentences(tokens: Tokens, sentences: Sequence[str], start: int) -> Iterator[list[int]]:
    yield tokens.known([sentences[start]])[0]
    at = start + 1
    while True:
        yield from tokens.known([" " + sentences[i % len(sentences)] for i in range(at, at + _BATCH)])
        at += _BATCH


def _read(path: Path, split: str) -> tuple[Sequence[str], frozenset[str]]:
    state = path.stat()
    halves, numbers = _split(path, state.st_mtime_ns, state.st_size)
    return halves[split == "training"], numbers


@lru_cache(maxsize=4)
def _split(path: Path, changed_ns: int, size: int) -> tuple[tuple[Sequence[str], Sequence[str]], frozenset[str]]:
    try:
        words = path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack: {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    sentences: list[str] = []
    start = 0
    for end, word in enumerate(words, start=1):
        if re.search(r"[.!?][\"')\]”’]*$", word) or end - start == _WORDS or end == len(words):
            sentences.append(" ".join(words[start:end]))
            start = end
    if len(sentences) < 2:
        raise ValueError(f"haystack: expected a text of two sentences or more, got {len(sentences)} in {str(path)!r}")
    runs = re.findall(r"[0-9]{7,}", " ".join(words))
    numbers = frozenset(run[i : i + 7] for run in runs for i in range(len(run) - 6))
    half = len(sentences) // 2
    return (sentences[:half], sentences[half:]), numbers
