"""Choose the next token from logits: greedily, or drawn at a temperature from the most likely tokens."""

from dataclasses import dataclass
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
        seed: starts the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        if not _is_number(t) or not isfinite(t) or t < 0:
            raise ValueError(f"temperature: expected a number ≥ 0, got {t!r}; 0 takes the most likely token")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"top_k: expected an integer ≥ 1, got {k!r}; leave it out for all tokens")
        if p is not None and not (_is_number(p) and 0 < p <= 1):
            raise ValueError(f"top_p: expected a number > 0 and ≤ 1, got {p!r}; leave it out for all tokens")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        for name, value in (("top_k", k), ("top_p", p)):
            if value is not None and t == 0:
                raise ValueError(f"{name}: {value} changes nothing at temperature 0; give a temperature, such as 1")

    def choose(self, logits: Float[Tensor, "batch vocab"], step: int) -> Int[Tensor, " batch"]:
        """Choose a token for each row.

        Args:
            logits: after the last token.
            step: the new token's place in the answer, from 0.
        """
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
        u = Random(f"{self.seed}, {step}").random()  # seeded by text, which is the same in all versions of Python
        place = torch.searchsorted(upto, u * upto[:, -1:], right=True)
        last = (mass > 0).sum(dim=-1, keepdim=True) - 1
        return order.gather(-1, place.minimum(last))[:, 0]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
