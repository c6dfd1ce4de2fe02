"""Score answers as the benchmarks' own scorers do: RULER counts substrings, InfiniteBench is strict."""

import re
from collections.abc import Sequence

__all__ = [
    "any_reference",
    "correct_prefix",
    "first_integer",
    "first_number",
    "last_word",
    "reference_fraction",
    "whole_word",
]


def reference_fraction(prediction: str, references: Sequence[str]) -> float:
    """Return the fraction of the references that occur in the prediction, in whatever case (RULER).

    >>> reference_fraction("They are ABCDE and fghij.", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"])
    0.5
    """
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def any_reference(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if any of the references occurs in the prediction, in whatever case (RULER's QA)."""
    text = prediction.lower()
    return float(any(reference.lower() in text for reference in references))


def first_integer(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the first run of digits is the reference, digit by digit (PassKey, Number.String).

    >>> first_integer(" 01234. Not 5.", ["01234"]), first_integer("1: 01234", ["01234"])
    (1.0, 0.0)
    """
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found.group() == references[0])


def whole_word(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the reference is one of the words that punctuation and spaces leave (KV retrieval)."""
    return float(references[0] in re.sub(r"""[\n:"'.,?!{}]""", " ", prediction).split())


def first_number(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the first number, integer or decimal, equals the reference (Math.Find)."""
    found = re.search(r"[0-9]+\.[0-9]+|[0-9]+", prediction)
    return float(found is not None and float(found.group()) == float(references[0]))


def last_word(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the last word is an integer and equals the reference (Code.Run)."""
    words = re.sub(r"""[\n.`'":]""", " ", prediction).split()
    return float(
        bool(words) and re.fullmatch(r"[+-]?[0-9]+", words[-1]) is not None and int(words[-1]) == int(references[0])
    )


def correct_prefix(prediction: str, references: Sequence[str]) -> float:
    """Return how far the prediction's integers are right, as a fraction of the references (Math.Calc).

    >>> correct_prefix("[1, 4, 9, 12]", ["1", "4", "8", "12"])
    0.5
    """
    right = 0
    for value, reference in zip(re.findall(r"[0-9]+", prediction), references, strict=False):
        if int(value) != int(reference):
            break
        right += 1
    return right / len(references)
