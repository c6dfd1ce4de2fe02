"""Train retaining heads: label, score, step; and every so often save and measure (Locret, arXiv 2410.01805)."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.hf import model_shape
from apb.train.checkpoint import check_same_run, load_state, save_state
from apb.train.examples import Examples
from apb.train.heads import StackedHeads
from apb.train.overlap import Curve, evaluate
from apb.train.prefetch import prefetch
from apb.train.settings import HeadTraining
from apb.train.step import train_step

__all__ = ["HeadProgress", "TrainedHeads", "train_heads"]

_LOG_EVERY = 20  # steps: reading a number from the device waits for it
_LOG_SECONDS = 5.0  # where steps are that slow, waiting costs nothing


@dataclass(frozen=True, kw_only=True)
class HeadProgress:
    """How far a run is; loss is the mean since the last report, overlap the last point's."""

    step: int
    steps: int
    loss: float
    overlap: float
    tokens_per_s: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class TrainedHeads:
    """What came of a run.

    Attributes:
        heads: the trained weights, float32.
        step: steps done.
        curve: held-out overlap along the way.
        seconds: of training, over all parts of a resumed run.
        stopped: why the run ended early, or None.
        facts: what the run was trained on and how, as strings.
    """

    heads: StackedHeads
    step: int
    curve: Curve
    seconds: float
    stopped: str | None
    facts: Mapping[str, str]


def train_heads(
    model: Any,
    examples: Examples,
    training: HeadTraining,
    out: str | Path,
    *,
    resume: bool | None = None,
    save_every: int = 250,
    workers: int = 0,
    about: Mapping[str, str] | None = None,
    stop: Callable[[], str | None] = lambda: None,
    on_progress: Callable[[HeadProgress], None] = lambda progress: None,
) -> TrainedHeads:
    """Train retaining heads for a frozen model; the state of the run is kept in a directory.

    On the CPU a run that was interrupted and resumed ends with the same weights, bit for bit.

    Args:
        model: a causal language model with plain causal attention; it is frozen, and put into the "apb" implementation.
        examples: what to train on.
        training: how.
        out: directory of the state; made if it is not there.
        resume: None: go on if `out` holds a state; True: it must; False: start over.
        save_every: steps between two saves of the state, ≥ 1.
        workers: processes that make examples ahead; 0 makes each when its step comes.
        about: further facts, such as the model's name; a run is resumed only with the same ones.
        stop: asked after each step; a reason ends the run, with its state saved.
        on_progress: told every 20 steps, or 5 seconds if that is sooner.

    Raises:
        ValueError: examples longer than the model's positions, or a state of another run.
        RuntimeError: the loss is no longer a number.
    """
    out, shape = Path(out), model_shape(model.config)
    if save_every < 1:
        raise ValueError(f"save_every: expected at least 1 step, got {save_every}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more processes, got {workers}")
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    if examples.longest > positions:
        raise ValueError(f"lengths: expected at most {positions}, the model's positions, got {examples.longest}")
    model.requires_grad_(False)
    heads = StackedHeads(shape, width=training.width, seed=training.seed).to(model.device)
    optimizer = torch.optim.AdamW(
        heads.parameters(),
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=model.device.type == "cuda",
    )
    settings = {name: str(value) for name, value in asdict(training).items()}
    sizes = {"layers": shape.layers, "q_heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    facts = {**(about or {}), **{name: str(size) for name, size in sizes.items()}, **settings, **examples.facts()}
    state = None if resume is False else load_state(out)
    if resume and state is None:
        raise ValueError(f"resume: expected the state of a run in {out}, got none; leave --resume out to start one")
    first, curve, seconds = 0, Curve(fraction=training.eval_fraction), 0.0
    if state is not None:
        check_same_run(state["facts"], facts, out)
        first, curve, seconds = state["step"], Curve.from_json(state["curve"]), state["seconds"]
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
    out.mkdir(parents=True, exist_ok=True)

    started = time.monotonic() - seconds
    held_out = [examples.make(number, held_out=True) for number in range(training.eval_examples)]

    def measure(step: int) -> None:
        evaluate(model, heads, held_out, training, curve, {"step": step, "seconds": time.monotonic() - started})

    def save(step: int) -> None:
        save_state(
            out,
            {
                "facts": facts,
                "step": step,
                "heads": heads.state_dict(),
                "optimizer": optimizer.state_dict(),
                "curve": curve.as_json(),
                "seconds": time.monotonic() - started,
            },
        )

    if first == 0:
        measure(0)
    step, reason = first, None
    losses: list[Tensor] = []
    since, tokens = time.monotonic(), 0
    for example in prefetch(examples, range(first, training.steps), workers=workers):
        losses.append(train_step(model, heads, optimizer, example, training, step))
        step += 1
        tokens += example.prompt.document.shape[1]
        spent = time.monotonic() - since
        if len(losses) == _LOG_EVERY or spent > _LOG_SECONDS or step == training.steps:
            loss = float(torch.stack(losses).mean())
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss became {loss} before step {step} ({example.name}); start over with a smaller "
                    f"--learning-rate, or with --dtype float32"
                )
            spent = time.monotonic() - since  # with the wait
            on_progress(
                HeadProgress(
                    step=step,
                    steps=training.steps,
                    loss=loss,
                    overlap=curve.points[-1].overlap,
                    tokens_per_s=tokens / spent,
                    seconds_left=(training.steps - step) * spent / len(losses),
                )
            )
            losses, since, tokens = [], time.monotonic(), 0
        reason = stop() if step < training.steps else None
        paused = time.monotonic()
        if step % training.eval_every == 0 or step == training.steps:
            measure(step)
        if reason or step % save_every == 0 or step == training.steps:
            save(step)
        since += time.monotonic() - paused
        if reason:
            if curve.points[-1].step != step:
                measure(step)  # for the report; the saved curve keeps to its own steps
            break
    return TrainedHeads(
        heads=heads, step=step, curve=curve, seconds=time.monotonic() - started, stopped=reason, facts=facts
    )
