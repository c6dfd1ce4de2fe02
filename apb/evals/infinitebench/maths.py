"""Math.Find and Math.Calc of InfiniteBench (arXiv 2402.13718): a long list of numbers, and a long sum."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from apb.evals import haystack
from apb.evals.sample import Desk, Draft, Task
from apb.evals.scoring import correct_prefix, first_number
from apb.evals.tokens import Tokens

__all__ = ["MathCalc", "MathFind"]

_RANKS = ("largest", "second largest", "third largest", "smallest", "second smallest", "third smallest")
_HIGHEST = 999
_CALC = (
    "Let us calculate the intermediate values of an expression.\n\n"
    "Expression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
    "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\n"
    "Expression: "
)


@dataclass(frozen=True, kw_only=True)
class MathFind(Task):
    """A list of two-digit numbers; the three largest and the three smallest occur once each, at drawn depths.

    Asked for is one of those, or the median; the list has an odd length.
    """

    name: str = "math_find"
    title: str = "Math.Find"
    suite: Literal["ruler", "infinitebench"] = "infinitebench"
    max_new_tokens: int = 3
    question_room: int = 64

    def write(self, desk: Desk) -> Draft:
        """Write the list; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        high, low = sorted(draw.sample(range(71, 100), 3))[::-1], sorted(draw.sample(range(10, 30), 3))
        extremes = dict(zip(_RANKS, (*high, *low), strict=True))
        head, bracket, rest = tokens.known(
            ["Memorize the numbers in the following list.\n\n[", "].", "\n" + haystack.NOISE]
        )

        def units(numbers: Sequence[int]) -> list[list[int]]:
            return tokens.known([f"{', ' if i else ''}{number}" for i, number in enumerate(numbers)])

        middle = draw.choices(range(30, 71), k=max(1, desk.room // 2))
        filler = units(middle)
        order = draw.sample(list(extremes), len(extremes))
        needles = units([0, *(extremes[name] for name in order)])[1:]
        used = len(head) + len(bracket) + sum(map(len, needles))
        desk.require(used + len(filler[0]))
        ends = list(accumulate(map(len, filler), initial=used))
        kept = bisect_right(ends, desk.room) - 1
        kept -= 1 - kept % 2
        room = ends[kept] - len(head) - len(bracket)
        ids, positions = haystack.hide(needles, haystack.spread(draw, len(needles)), filler[:kept], room)
        ranked = sorted([*middle[:kept], *extremes.values()])
        facts = {name: (str(number),) for name, number in extremes.items()}
        facts["median"] = (str(ranked[len(ranked) // 2]),)
        name = draw.choice(list(facts))
        (answer,) = facts[name]
        return Draft(
            document=haystack.fill([*head, *ids, *bracket], desk.room, rest),
            query=f"What is the {name} number in the list? You should answer with only one number, no other words.",
            answer_prefix=f" The {name} number of the list is:",
            answer=f" {answer}",
            references=(answer,),
            positions=tuple(len(head) + positions[order.index(name)] for _ in range(name in order)),
            facts=facts,
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the first number of the prediction is the right one."""
        return first_number(prediction, references)


@dataclass(frozen=True, kw_only=True)
class MathCalc(Task):
    """A long chain of + and −; the answer is its intermediate values, beginning with the first operand.

    Operands have one or two digits, and no value is negative or above 999. Only as many values are asked for as fit
    into `max_new_tokens`. InfiniteBench allows 30000 new tokens, more than most models' whole window:
    `dataclasses.replace(TASKS["math_calc"], max_new_tokens=30_000)` does too.
    """

    name: str = "math_calc"
    title: str = "Math.Calc"
    suite: Literal["ruler", "infinitebench"] = "infinitebench"
    max_new_tokens: int = 256
    question_room: int = 64

    def write(self, desk: Desk) -> Draft:
        """Write the expression; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        head, end, rest = tokens.known([_CALC, ".", "\n" + haystack.NOISE])
        total = draw.randrange(1, 100)
        values, (first,) = [total], tokens.known([str(total)])
        ids = [*head, *first]
        desk.require(len(ids) + len(end) + len(tokens.known([" + 99"])[0]))
        while True:
            operand = draw.randrange(1, 100)
            sign = draw.choice([sign for sign in (1, -1) if 0 <= total + sign * operand <= _HIGHEST])
            (term,) = tokens.known([f" {'+' if sign > 0 else '-'} {operand}"])
            if len(ids) + len(term) + len(end) > desk.room:
                break
            total += sign * operand
            ids += term
            values.append(total)
        asked = self._fitting(tokens, values)
        listed = ", ".join(asked)
        return Draft(
            document=haystack.fill(ids + end, desk.room, rest),
            query="What are the intermediate values of the last expression?",
            answer_prefix=" Values:",
            answer=f" [{listed}]" if len(asked) == len(values) else f" [{listed}",
            references=asked,
            facts={"values": tuple(map(str, values))},
        )

    def _fitting(self, tokens: Tokens, values: Sequence[int]) -> tuple[str, ...]:
        """Return the first values, as many as an answer has room for."""
        pieces = tokens.known([f"{',' if i else ' ['} {value}" for i, value in enumerate(values)])
        ends = list(accumulate(map(len, pieces)))
        return tuple(map(str, values[: bisect_right(ends, self.max_new_tokens - 1)]))

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return how many of the prediction's integers are right before the first wrong one, as a fraction."""
        return correct_prefix(prediction, references)
