"""Where examples come from. Each is a function of seed and number, so a resumed run sees the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from apb.evals import Sources, make_sample
from apb.files import fingerprint
from apb.prompt import Prompt

__all__ = ["Example", "Examples", "GeneratedExamples", "check_lengths", "draw", "listed"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question about a document, and its answer.

    Attributes:
        prompt: document, query and suffix, of batch 1.
        answer: the answer's tokens.
        name: says what it is in messages.
    """

    prompt: Prompt
    answer: Int[Tensor, "1 answer"]
    name: str


class Examples(Protocol):
    """A source of examples."""

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        ...

    def make(self, number: int, *, held_out: bool = False) -> Example:
        """Return an example; the same number gives the same one, and no held-out one is ever trained on."""
        ...

    def facts(self) -> dict[str, str]:
        """Say what the examples are, the files' contents included: with other facts a run is not resumed."""
        ...


@dataclass(frozen=True, kw_only=True)
class GeneratedExamples:
    """Question-answer pairs of RULER's kinds, from `apb.evals`.

    Attributes:
        tokenizer: of the model.
        tasks: names that `apb.evals` knows.
        lengths: tokens in all, from document to answer.
        seed: starts the draw; training takes even sample seeds, held-out ones are odd.
        sources: what the generators draw from.
    """

    tokenizer: Any
    tasks: Sequence[str]
    lengths: Sequence[int]
    seed: int = 0
    sources: Sources = Sources(split="training")

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks: expected at least one task, got none")
        check_lengths(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths)

    def make(self, number: int, *, held_out: bool = False) -> Example:
        """Draw task, length and sample; held-out ones go round the tasks and lengths in turn."""
        chance = draw(self.seed, number, held_out)
        task, length = chance.choice(list(self.tasks)), chance.choice(list(self.lengths))
        if held_out:
            task, longest_first = self.tasks[number % len(self.tasks)], sorted(self.lengths, reverse=True)
            length = longest_first[(number + number // len(self.tasks)) % len(self.lengths)]
        seed = 2 * chance.getrandbits(30) + held_out
        sample = make_sample(task, self.tokenizer, length=length, seed=seed, sources=self.sources)
        answer = torch.as_tensor(sample.answer_ids, dtype=torch.int64).reshape(1, -1)
        return Example(prompt=sample.prompt, answer=answer, name=f"{task} at {length} tokens")

    def facts(self) -> dict[str, str]:
        """Say what the examples are."""
        facts = {
            "data": "generated",
            "data_seed": str(self.seed),
            "tasks": ",".join(self.tasks),
            "lengths": listed(self.lengths),
            "haystack": "none",
            "split": self.sources.split,
        }
        for name in ("haystack", "squad", "hotpotqa"):
            if (path := getattr(self.sources, name)) is not None:
                facts |= {name: Path(path).name, f"{name}_sha256": fingerprint(Path(path))}
        return facts


def draw(seed: int, number: int, held_out: bool) -> Random:
    """Return the chance that an example is made of."""
    return Random(f"{seed} {'held out' if held_out else 'training'} {number}")


def listed(numbers: Sequence[int]) -> str:
    """Join numbers by commas."""
    return ",".join(map(str, numbers))


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise if there is no length, or one of less than two tokens."""
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths: expected at least one, of 2 tokens or more, got {list(lengths)}")
