"""Choose the next token from logits: greedily, or drawn at a temperature from the most likely tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens; the default is greedy.

    A draw is one number u, which follows from the seed and the token's place in the answer alone: not from the device,
    the number of hosts, or the other rows of the batch. The token is the first, from the most likely one down, at which
    the probabilities add up to more than u.

    Attributes:
        temperature: T ≥ 0; the probabilities are softmax(logits / T), and 0 takes the most likely token.
        top_k: draw from the k ≥ 1 most likely tokens only.
        top_p: draw from the fewest most likely tokens that have probability p together, 0 < p ≤ 1; after `top_k`.
        seed: starts the draws. The rows of a batch share them, since a row does not know its batch: copies of a prompt
            get the same answer. To sample several, give a seed for each row.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        if not _is_number(t) or not isfinite(t) or t < 0:
            raise ValueError(f"temperature: expected a number ≥ 0, got {t!r}; 0 takes the most likely token")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"top_k: expected an integer ≥ 1, got {k!r}; leave it out for all tokens")
        if p is not None and not (_is_number(p) and 0 < p <= 1):
            raise ValueError(f"top_p: expected a number > 0 and ≤ 1, got {p!r}; leave it out for all tokens")
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        if any(isinstance(seed, bool) or not isinstance(seed, int) for seed in seeds):
            raise ValueError(f"seed: expected an integer, or a tuple of one for each row, got {self.seed!r}")
        for name, value in (("top_k", k), ("top_p", p)):
            if value is not None and t == 0:
                raise ValueError(f"{name}: {value} changes nothing at temperature 0; give a temperature, such as 1")

    def check_rows(self, rows: int) -> None:
        """Refuse a batch of another number of rows than there are seeds for.

        Raises:
            ValueError: naming both.
        """
        if isinstance(self.seed, tuple) and len(self.seed) != rows:
            raise ValueError(f"seed: expected one, or one for each of the {rows} rows, got {len(self.seed)}")

    def for_rows(self, places: Sequence[int]) -> "Sampling":
        """Return the settings for some of the rows."""
        return replace(self, seed=tuple(self.seed[i] for i in places)) if isinstance(self.seed, tuple) else self

    def choose(self, logits: Float[Tensor, "batch vocab"], step: int) -> Int[Tensor, " batch"]:
        """Choose a token for each row.

        Args:
            logits: after the last token.
            step: the new token's place in the answer, from 0.

        Raises:
            ValueError: another number of rows than there are seeds for.
        """
        self.check_rows(len(logits))
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scores, order = logits.double().sort(dim=-1, descending=True, stable=True)  # of equals the lowest id is first
        scores, order = scores[:, : self.top_k], order[:, : self.top_k]
        # The largest score goes first: a tiny temperature must not make infinity of it.
        mass = ((scores - scores[:, :1]) / self.temperature).softmax(dim=-1)
        if self.top_p is not None:
            before = mass.cumsum(dim=-1) - mass
            mass = mass.masked_fill(before >= self.top_p, 0)
        upto = mass.cumsum(dim=-1)
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        # Seeded by text, which is the same in all versions of Python.
        u = torch.tensor([[Random(f"{seed}, {step}").random()] for seed in seeds], dtype=mass.dtype, device=mass.device)
        place = torch.searchsorted(upto, u * upto[:, -1:], right=True)
        last = (mass > 0).sum(dim=-1, keepdim=True) - 1
        return order.gather(-1, place.minimum(last))[:, 0]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
