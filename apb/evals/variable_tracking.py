"""Variable tracking, RULER's multi-hop task (arXiv 2404.06654): follow a chain of assignments through noise."""

import itertools
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from apb.evals import haystack
from apb.evals.lexicon import distinct
from apb.evals.sample import Desk, Draft, Task
from apb.evals.scoring import reference_fraction

__all__ = ["VariableTracking", "ask"]

_BEGIN = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_EXAMPLE_VALUE = "12345"


def ask(value: str, variables: int) -> tuple[str, str]:
    """Word the question for all variables of a value; return it and how its answer begins.

    Args:
        value: that the first variable is assigned.
        variables: how many there are.
    """
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {variables} variables are "
        f"assigned the value {value}, they are:",
    )


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
    """One chain "VAR ABCDE = 67890", "VAR FGHIJ = VAR ABCDE", … in RULER's noise, after a worked example.

    Attributes:
        hops: assignments from variable to variable; the chain has one variable more.
    """

    name: str = "vt"
    title: str = "Variable tracking"
    suite: Literal["ruler", "infinitebench"] = "ruler"
    max_new_tokens: int = 30
    question_room: int = 72
    hops: int = 4

    def write(self, desk: Desk) -> Draft:
        """Hide the statements in their order at distinct depths; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        (value,) = distinct(lambda: str(draw.randrange(10_000, 100_000)), 1, {_EXAMPLE_VALUE})
        names = _names(draw, self.hops + 1, letters=5)
        (head,) = tokens.known([self._example() + _BEGIN])
        statements = tokens.new(["\n" + line for line in _chain(names, value)])
        room = desk.room - len(head)
        first = next(haystack.noise(tokens))
        desk.require(len(head) + len(first) + sum(map(len, statements)))
        depths = haystack.spread(draw, len(statements))
        ids, positions = haystack.hide(statements, depths, haystack.noise(tokens), room)
        query, answer_prefix = ask(value, len(names))
        return Draft(
            document=head + ids,
            query=query,
            answer_prefix=answer_prefix,
            answer=" " + " ".join(names),
            references=tuple(names),
            positions=tuple(len(head) + at for at in positions),
            facts={value: tuple(names)},
        )

    def _example(self) -> str:
        """Return a worked example of three-letter variables, a line of noise before each statement."""
        names = _names(random.Random("apb/vt"), self.hops + 1, letters=3)
        lines = [line for statement in _chain(names, _EXAMPLE_VALUE) for line in (haystack.NOISE, statement)]
        query, answer_prefix = ask(_EXAMPLE_VALUE, len(names))
        return f"{_BEGIN}{chr(10).join(lines)}\n{query}{answer_prefix} {' '.join(names)}\n\n"

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the fraction of the variables that the prediction names."""
        return reference_fraction(prediction, references)


def _names(draw: random.Random, count: int, *, letters: int) -> list[str]:
    return distinct(lambda: "".join(draw.choices(string.ascii_uppercase, k=letters)), count, set())


def _chain(names: Sequence[str], value: str) -> list[str]:
    return [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
