"""Needles in a haystack, RULER's eight tasks (arXiv 2404.06654): find the values that the text gives to keys."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from statistics import mode
from typing import Literal

from apb.evals import haystack
from apb.evals.lexicon import distinct, new_number, new_uuid, word_key
from apb.evals.sample import Desk, Draft, Task
from apb.evals.scoring import reference_fraction
from apb.evals.tokens import Tokens

__all__ = ["Needles", "ask"]

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_SEVERAL = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n"
)

Kind = Literal["number", "uuid"]


def ask(keys: Sequence[str], kind: Kind = "number", *, values: int = 1) -> tuple[str, str]:
    """Word the question for the values of some keys; return it and how its answer begins.

    >>> ask(["tall-tree"])[0]
    'What is the special magic number for tall-tree mentioned in the provided text?'

    Args:
        keys: one or more, in the order in which to ask for them.
        kind: of their values.
        values: how many values each key has.
    """
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if len(keys) * values == 1:
        about = f"special magic {kind} for {named} mentioned in the provided text"
        return f"What is the {about}?", f" The {about} is"
    about = f"special magic {kind}s for {named} mentioned in the provided text"
    return f"What are all the {about}?", f" The {about} are"


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """Needles "One of the special magic numbers for tall-tree is: 1234567." in a haystack.

    Keys and values of a document are distinct. Keys are asked for, and their values listed, in the document's order.

    Attributes:
        hay: "noise" is RULER's line of five sentences, "text" a file's sentences, "needles" more needles.
        keys: needles' keys, those that are not asked for included, those of the hay not.
        values: of each key.
        asked: how many of the keys are asked for.
        key: two words, or a UUID.
        kind: of the values.
    """

    suite: Literal["ruler", "infinitebench"] = "ruler"
    max_new_tokens: int = 128
    hay: Literal["noise", "text", "needles"]
    keys: int = 1
    values: int = 1
    asked: int = 1
    key: Literal["words", "uuid"] = "words"
    kind: Kind = "number"

    def write(self, desk: Desk) -> Draft:
        """Hide the needles at distinct depths; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        if self.hay == "text":
            filler, taken_values = haystack.text(desk), set(haystack.digits(desk))
        else:
            filler, taken_values = haystack.noise(tokens), set()
        new_key = (lambda: new_uuid(draw)) if self.key == "uuid" else (lambda: word_key(draw, desk.sources.split))
        new_value = (lambda: new_uuid(draw)) if self.kind == "uuid" else (lambda: new_number(draw))
        taken_keys: set[str] = set()
        keys = distinct(_of_usual_size(new_key, tokens, self._usual_size(desk)), self.keys, taken_keys)
        hidden = [(key, value) for key in keys for value in distinct(new_value, self.values, taken_values)]
        draw.shuffle(hidden)
        asked = set(draw.sample(keys, self.asked))

        several = self.asked * self.values > 1
        (head,) = tokens.known([(_SEVERAL if several else _ONE).format(kind=self.kind)])
        needles = tokens.new([(" " if self.hay == "text" else "\n") + self._needle(pair) for pair in hidden])
        room = desk.room - len(head)
        facts: dict[str, tuple[str, ...]] = {}
        if self.hay == "needles":

            def more(number: int) -> list[tuple[str, str]]:
                names = distinct(new_key, number, taken_keys)
                return list(zip(names, distinct(new_value, number, taken_values), strict=True))

            others, units = self._distractors(tokens, room - sum(map(len, needles)), more)
            facts |= {key: (value,) for key, value in others}
            filler = chain(units, haystack.noise(tokens) if not units else islice(haystack.noise(tokens), 1, None))
        first = next(filler)
        desk.require(len(head) + len(first) + sum(map(len, needles)))
        ids, positions = haystack.hide(needles, haystack.spread(draw, len(hidden)), chain([first], filler), room)

        for key, value in hidden:
            facts[key] = (*facts.get(key, ()), value)
        found = [(*pair, len(head) + at) for pair, at in zip(hidden, positions, strict=True) if pair[0] in asked]
        references = tuple(value for _, value, _ in found)
        query, answer_prefix = ask(list(dict.fromkeys(key for key, *_ in found)), self.kind, values=self.values)
        return Draft(
            document=head + ids,
            query=query,
            answer_prefix=answer_prefix,
            answer=" " + ", ".join(references),
            references=references,
            positions=tuple(at for *_, at in found),
            facts=facts,
        )

    def _usual_size(self, desk: Desk) -> int:
        """Return how many tokens most keys have. Keys that may be asked for have as many, so that questions batch."""
        draw = random.Random("apb/keys")
        keys = [new_uuid(draw) if self.key == "uuid" else word_key(draw, desk.sources.split) for _ in range(64)]
        return mode(map(len, desk.tokens.known([" " + key for key in keys])))

    def _needle(self, pair: tuple[str, str]) -> str:
        return NEEDLE.format(kind=self.kind, key=pair[0], value=pair[1])

    def _distractors(
        self, tokens: Tokens, space: int, draw: Callable[[int], list[tuple[str, str]]]
    ) -> tuple[list[tuple[str, str]], list[list[int]]]:
        """Draw needles until the next one does not fit; return them and their tokens."""
        pairs: list[tuple[str, str]] = []
        units: list[list[int]] = []
        while True:
            batch = draw(max(1, space // len(units[-1]) if units else 1))
            lines = tokens.new(["\n" * bool(pairs or number) + self._needle(pair) for number, pair in enumerate(batch)])
            for pair, line in zip(batch, lines, strict=True):
                if len(line) > space:
                    return pairs, units
                space -= len(line)
                pairs.append(pair)
                units.append(line)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the fraction of the values that the prediction has."""
        return reference_fraction(prediction, references)


def _of_usual_size(new_key: Callable[[], str], tokens: Tokens, size: int) -> Callable[[], str]:
    def draw() -> str:
        while len(tokens.new([" " + (key := new_key())])[0]) != size:
            pass
        return key

    return draw
