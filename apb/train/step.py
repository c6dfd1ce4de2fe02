"""One step of training: observe an example, move the heads."""

from typing import Any

import torch
from torch import Tensor

from apb.train.examples import Example
from apb.train.heads import StackedHeads, retaining_loss
from apb.train.labels import Observed, observe
from apb.train.settings import HeadTraining

__all__ = ["backward", "make_optimizer", "train_step"]

_ACTIVATION_BYTES = 2 << 30  # of the layers whose hidden units are held at once


def make_optimizer(heads: StackedHeads, training: HeadTraining) -> torch.optim.Optimizer:
    """Return AdamW over the heads; `train_step` sets its rate."""
    return torch.optim.AdamW(
        heads.parameters(),
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=heads.fc1.is_cuda,
    )


def train_step(
    model: Any,
    heads: StackedHeads,
    optimizer: torch.optim.Optimizer,
    example: Example,
    training: HeadTraining,
    step: int,
) -> Tensor:
    """Train on one example; return its loss, on the device."""
    seen = observe(model, example, training.query_in)
    for group in optimizer.param_groups:
        group["lr"] = training.rate(step)
    loss = backward(heads, seen, training.smoothing)
    torch.nn.utils.clip_grad_value_(heads.parameters(), training.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def backward(heads: StackedHeads, seen: Observed, smoothing: float) -> Tensor:
    """Add the gradient of the layers' summed losses, a few layers at a time; return their mean.

    The sum leaves each layer the gradient that it would have alone, which is what the clip is meant for.
    """
    layers, tokens, _ = seen.features.shape
    at_once = max(1, _ACTIVATION_BYTES // (4 * seen.features.element_size() * tokens * heads.fc1.shape[1]))
    losses = []
    for first in range(0, layers, at_once):
        part = slice(first, first + at_once)
        loss = retaining_loss(heads.score(seen.features[part], first), seen.labels[part], smoothing)
        loss.sum().backward()
        losses.append(loss.detach())
    return torch.cat(losses).mean()
