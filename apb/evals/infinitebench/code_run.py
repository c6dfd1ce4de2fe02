"""Code.Run of InfiniteBench (arXiv 2402.13718): compute what a chain of small functions returns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from apb.evals import haystack
from apb.evals.sample import Desk, Draft, Task
from apb.evals.scoring import last_word
from apb.evals.tokens import Tokens

__all__ = ["CodeRun"]

_BEGIN = "Following is a set of Python functions.\n\n"
_STEPS = [step for step in range(-20, 21) if step]
_CALLS = 0.8  # of the distractors call another one
_BATCH = 64  # functions tokenised at a time


@dataclass(frozen=True, kw_only=True)
class CodeRun(Task):
    """Functions that add a number to their argument and call another one, in a drawn order; one chain is asked for.

    Attributes:
        depths: how many functions the chain may have, from and to.
    """

    name: str = "code_run"
    title: str = "Code.Run"
    suite: Literal["ruler", "infinitebench"] = "infinitebench"
    max_new_tokens: int = 5
    question_room: int = 96
    depths: tuple[int, int] = (2, 10)

    def write(self, desk: Desk) -> Draft:
        """Write the functions; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        head, rest = tokens.known([_BEGIN, "# " + haystack.NOISE + "\n"])
        numbers = max(100, desk.room // 16)
        names = [f"func_{number}" for number in draw.sample(range(numbers), numbers)]
        argument, depth = draw.randrange(1, 100), draw.randint(*self.depths)
        chain = names[:depth]

        result, sources = argument, []
        for name, called in zip(chain, [*chain[1:], None], strict=True):
            step = draw.choice([step for step in _STEPS if result + step >= 0])
            result += step
            sources.append(_source(name, called, step))
        for at in range(depth, numbers):  # a distractor calls one that is drawn before it, so that none is missing
            called = names[draw.randrange(depth, at)] if at > depth and draw.random() < _CALLS else None
            sources.append(_source(names[at], called, draw.choice(_STEPS)))

        used, units = len(head), []
        for unit in _in_batches(tokens, sources):
            if used + len(unit) > desk.room:
                desk.require(used + len(unit) if len(units) < depth else 0)
                break
            units.append(unit)
            used += len(unit)
        order = draw.sample(range(len(units)), len(units))
        ends = list(accumulate((len(units[number]) for number in order), initial=len(head)))
        call = f"{chain[0]}({argument})"
        return Draft(
            document=haystack.fill([*head, *(id for number in order for id in units[number])], desk.room, rest),
            query=f"Please give me the exact number of the return value of {call}. Be concise. "
            "Your response must end with the final returned value.",
            answer_prefix=f" The return value of {call} is",
            answer=f" {result}",
            references=(str(result),),
            positions=tuple(ends[order.index(number)] for number in range(depth)),
            facts={call: (str(result),)},
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the prediction ends with the right number."""
        return last_word(prediction, references)


def _source(name: str, called: str | None, step: int) -> str:
    value = f"{called}(x)" if called else "x"
    return f"def {name}(x):\n    return {value} {'+' if step > 0 else '-'} {abs(step)}\n\n"


def _in_batches(tokens: Tokens, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _BATCH):
        yield from tokens.new(texts[start : start + _BATCH])
