"""How retaining heads are trained: Locret's recipe, every number a setting."""

import math
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Decay", "HeadTraining", "SeenIn", "check_integers", "check_positive"]

Decay = Literal["linear", "constant"]
SeenIn = Literal["anchor", "after"]


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Settings of a training run (Locret, arXiv 2410.01805; APB's warm-up).

    Attributes:
        width: hidden units of a head, ≥ 1.
        steps: one example each, ≥ 1.
        learning_rate: AdamW's, after the warm-up.
        betas: AdamW's.
        weight_decay: AdamW's (PyTorch's default; the papers name none).
        warmup: steps in which the rate rises linearly from 0 (APB 300, Locret 2000).
        decay: "linear": the rate then falls to 0 at the last step, our choice; "constant": it stays.
        smoothing: weight of the squared difference between neighbouring tokens' scores.
        clip: every element of the gradient is cut to [−clip, clip].
        query_in: what the scored tokens have seen. "anchor": the question, embedded behind the document's prefix, as
            in APB's plan; "after": the document alone.
        seed: starts the draw of the weights and of the examples.
        eval_every: steps between two points of the curve.
        eval_examples: held-out examples behind each point, ≥ 1.
        eval_fraction: share of the tokens that the overlap is taken of.
    """

    width: int = 1024
    steps: int = 3000
    learning_rate: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 300
    decay: Decay = "linear"
    smoothing: float = 0.0025
    clip: float = 0.5
    query_in: SeenIn = "anchor"
    seed: int = 0
    eval_every: int = 250
    eval_examples: int = 8
    eval_fraction: float = 0.1

    def __post_init__(self) -> None:
        check_integers(self, width=1, steps=1, warmup=0, eval_every=1, eval_examples=1)
        check_positive(self, "learning_rate", "clip")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers, 0 ≤ beta < 1, got {self.betas}")
        for name in ("weight_decay", "smoothing"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number ≥ 0, got {getattr(self, name)!r}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction: expected a share between 0 and 1, got {self.eval_fraction!r}")
        for name, known in (("decay", ("linear", "constant")), ("query_in", ("anchor", "after"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0.

        >>> HeadTraining(steps=4000, warmup=1000).rate(999)
        0.0005
        >>> HeadTraining(steps=4000, warmup=1000).rate(2500)
        0.00025
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.learning_rate
        return self.learning_rate * max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))


def check_integers(settings: Any, **least: int) -> None:
    """Raise unless each named setting is an integer of at least so much."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{name}: expected an integer ≥ {bound}, got {value!r}")


def check_positive(settings: Any, *names: str) -> None:
    """Raise unless each named setting is a finite number above 0."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name}: expected a number > 0, got {getattr(settings, name)!r}")
