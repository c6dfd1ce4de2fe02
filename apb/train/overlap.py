"""How well scores choose: the overlap of the best tokens by score with the best tokens by label."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apb.compress.select import select
from apb.train.examples import Example
from apb.train.heads import StackedHeads, retaining_loss
from apb.train.labels import observe
from apb.train.settings import HeadTraining

__all__ = ["Curve", "Point", "evaluate", "top_overlap"]


def top_overlap(
    scores: Float[Tensor, "*heads tokens"], labels: Float[Tensor, "*heads tokens"], fraction: float
) -> Float[Tensor, "*heads"]:
    """Return |best by score ∩ best by label| / kept, where kept = max(1, round(fraction · tokens)); nothing is pooled.

    Random scores overlap by `fraction` on average.

    >>> top_overlap(torch.tensor([5.0, 4.0, 1.0, 0.0]), torch.tensor([0.0, 9.0, 1.0, 8.0]), 0.5)
    tensor(0.5000)
    """
    kept = max(1, round(fraction * scores.shape[-1]))
    chosen, wanted = (
        torch.zeros_like(x, dtype=torch.bool).scatter_(-1, select(x, kept), True) for x in (scores, labels)
    )
    return (chosen & wanted).sum(dim=-1) / kept


@dataclass(frozen=True, kw_only=True)
class Point:
    """Held-out examples after so many steps: means over examples, layers and heads; seconds of training so far."""

    step: int
    overlap: float
    loss: float
    seconds: float


@dataclass(kw_only=True)
class Curve:
    """How a run went.

    Attributes:
        fraction: share of the tokens that the overlap is taken of; random scores reach it.
        points: in the order of the steps, the untrained heads first.
        query_aware: the overlap of the training-free compressor on the same examples.
        examples: names of the held-out examples and the overlaps with the last point's heads and query-aware scores.
    """

    fraction: float
    points: list[Point] = field(default_factory=list)
    query_aware: float = float("nan")
    examples: list[tuple[str, float, float]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain numbers, lists and strings."""
        return asdict(self) | {"random": self.fraction}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Curve":
        """Read what `as_json` wrote."""
        return cls(
            fraction=found["fraction"],
            points=[Point(**point) for point in found["points"]],
            query_aware=found["query_aware"],
            examples=[(name, ours, theirs) for name, ours, theirs in found["examples"]],
        )


@torch.no_grad()
def evaluate(
    model: Any,
    heads: StackedHeads,
    examples: Sequence[Example],
    training: HeadTraining,
    curve: Curve,
    at: dict[str, Any],
) -> Point:
    """Measure the heads on held-out examples and add the point to the curve.

    Args:
        model: the frozen model.
        heads: as they are now.
        examples: held out.
        training: the run's settings.
        curve: gets the point, the overlap of query-aware scores, and both by example.
        at: the point's step and seconds.
    """
    device, found = heads.fc1.device, []
    for example in examples:
        seen = observe(model, example, training.query_in, reference=True)
        scores = heads.score(seen.features).float()
        assert seen.query_aware is not None
        ours, theirs = (top_overlap(x, seen.labels, training.eval_fraction).mean() for x in (scores, seen.query_aware))
        found.append(torch.stack((ours, theirs, retaining_loss(scores, seen.labels, training.smoothing).mean())))
    rows = torch.stack(found).to(device).tolist()
    ours, theirs, loss = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    point = Point(overlap=ours, loss=loss, **at)
    curve.points.append(point)
    curve.query_aware = theirs
    curve.examples = [(example.name, row[0], row[1]) for example, row in zip(examples, rows, strict=True)]
    return point
