"""PassKey, Number.String and KV retrieval of InfiniteBench (arXiv 2402.13718)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from apb.evals import haystack
from apb.evals.lexicon import distinct, new_uuid
from apb.evals.sample import Desk, Draft, Task
from apb.evals.scoring import first_integer, whole_word

__all__ = ["HiddenDigits", "KeyValue"]

_JSON = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"


@dataclass(frozen=True, kw_only=True)
class HiddenDigits(Task):
    """One line of digits in the noise: "The pass key is 12345. Remember it. 12345 is the pass key."

    Attributes:
        what: what the digits are called.
        find: what the instruction says to do.
        digits: how many; they may begin with 0.
        repeats: how many of them repeat the digit before them, at drawn places.
    """

    suite: Literal["ruler", "infinitebench"] = "infinitebench"
    question_room: int = 48
    what: str
    find: str
    digits: int
    repeats: int = 0

    def write(self, desk: Desk) -> Draft:
        """Hide the line; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        key = self._digits(draw)
        head = tokens.known(
            [
                f"There is an important info hidden inside a lot of irrelevant text. {self.find} "
                "I will quiz you about the important information there.\n\n"
            ]
        )[0]
        needles = tokens.new([f"\nThe {self.what} is {key}. Remember it. {key} is the {self.what}."])
        desk.require(len(head) + len(next(haystack.noise(tokens))) + len(needles[0]))
        room = desk.room - len(head)
        ids, positions = haystack.hide(needles, haystack.spread(draw, 1), haystack.noise(tokens), room)
        return Draft(
            document=head + ids,
            query=f"What is the {self.what}?",
            answer_prefix=f" The {self.what} is",
            answer=f" {key}",
            references=(key,),
            positions=tuple(len(head) + at for at in positions),
            facts={self.what: (key,)},
        )

    def _digits(self, draw: random.Random) -> str:
        key = draw.choices("0123456789", k=self.digits - self.repeats)
        for _ in range(self.repeats):
            place = draw.randrange(len(key))
            key.insert(place, key[place])
        return "".join(key)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the first integer of the prediction is the digits."""
        return first_integer(prediction, references)


@dataclass(frozen=True, kw_only=True)
class KeyValue(Task):
    """A JSON object of UUIDs, and a key to look up; the key stands at one of 40 evenly spaced depths."""

    name: str = "kv_retrieval"
    title: str = "Retrieve.KV"
    suite: Literal["ruler", "infinitebench"] = "infinitebench"
    max_new_tokens: int = 50
    question_room: int = 96

    def write(self, desk: Desk) -> Draft:
        """Write the object; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        head, brace, rest = tokens.known([_JSON, "}", "\n" + haystack.NOISE])
        taken: set[str] = set()
        pairs: list[tuple[str, str]] = []
        units: list[list[int]] = []
        space, full = desk.room - len(head) - len(brace), False
        while not full:
            more = max(1, space // len(units[-1])) if units else 1
            drawn = distinct(lambda: new_uuid(draw), 2 * more, taken)
            batch = list(zip(drawn[::2], drawn[1::2], strict=True))
            lines = [f'{", " if pairs or i else ""}"{key}": "{value}"' for i, (key, value) in enumerate(batch)]
            for pair, unit in zip(batch, tokens.new(lines), strict=True):
                if full := len(unit) > space:
                    if not pairs:
                        desk.require(len(head) + len(brace) + len(unit))
                    break
                pairs.append(pair)
                units.append(unit)
                space -= len(unit)
        (depth,) = haystack.spread(draw, 1)
        asked = round(depth * (len(pairs) - 1))
        key, value = pairs[asked]
        ids = [token for unit in (head, *units, brace) for token in unit]
        return Draft(
            document=haystack.fill(ids, desk.room, rest),
            query=f'Key: "{key}"',
            answer_prefix=" The value associated with the specified key is:",
            answer=f' "{value}"',
            references=(value,),
            positions=(len(head) + sum(map(len, units[:asked])),),
            facts={key: (value,) for key, value in pairs},
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the value is a whole word of the prediction."""
        return whole_word(prediction, references)
