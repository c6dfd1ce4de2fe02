"""Train retaining heads: label, score, step; and every so often save and measure (Locret, arXiv 2410.01805)."""

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.hf import model_shape
from apb.train.checkpoint import check_same_run, load_state, save_state
from apb.train.examples import Example, Examples
from apb.train.heads import StackedHeads
from apb.train.overlap import Curve, evaluate
from apb.train.prefetch import prefetch
from apb.train.settings import HeadTraining
from apb.train.step import make_optimizer, train_step

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
        RuntimeError: the loss is no longer a number; the last state that was saved is left as it is.
    """
    if save_every < 1:
        raise ValueError(f"save_every: expected at least 1 step, got {save_every}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more processes, got {workers}")
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    if examples.longest > positions:
        raise ValueError(f"lengths: expected at most {positions}, the model's positions, got {examples.longest}")
    model.requires_grad_(False)
    run = _begin(model, examples, training, Path(out), about or {}, resume)
    stopped = _train(run, examples, save_every, workers, stop, on_progress)
    return TrainedHeads(
        heads=run.heads, step=run.step, curve=run.curve, seconds=run.seconds, stopped=stopped, facts=run.facts
    )


def _train(
    run: "_Run",
    examples: Examples,
    save_every: int,
    workers: int,
    stop: Callable[[], str | None],
    on_progress: Callable[[HeadProgress], None],
) -> str | None:
    """Do the steps that are left; return why the run ended early, or None."""
    training, losses = run.training, _Losses()
    for example in prefetch(examples, range(run.step, training.steps), workers=workers):
        loss = train_step(run.model, run.heads, run.optimizer, example, training, run.step)
        losses.add(loss, example)
        run.step += 1
        last = run.step == training.steps
        if losses.due or last:
            on_progress(losses.report(run))
        reason = None if last else stop()
        with losses.paused():
            if last or run.step % training.eval_every == 0:
                run.measure()
            if last or reason or run.step % save_every == 0:
                losses.check(run)
                run.save()
        if reason:
            if run.curve.points[-1].step != run.step:
                run.measure()  # for the report; the saved curve keeps to its own steps
            return reason
    return None


@dataclass(kw_only=True)
class _Run:
    """A run between two steps."""

    model: Any
    training: HeadTraining
    held_out: Sequence[Example]
    out: Path
    facts: Mapping[str, str]
    heads: StackedHeads
    optimizer: torch.optim.Optimizer
    curve: Curve
    step: int = 0
    started: float = field(default_factory=time.monotonic)
    """When it would have begun, had it never been interrupted."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def measure(self) -> None:
        at = {"step": self.step, "seconds": self.seconds}
        evaluate(self.model, self.heads, self.held_out, self.training, self.curve, at)

    def save(self) -> None:
        state = {
            "facts": dict(self.facts),
            "step": self.step,
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve.as_json(),
            "seconds": self.seconds,
        }
        save_state(self.out, state)

    def restore(self, state: Mapping[str, Any]) -> None:
        check_same_run(state["facts"], self.facts, self.out)
        self.step, self.curve = state["step"], Curve.from_json(state["curve"])
        self.started -= state["seconds"]
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


def _begin(
    model: Any, examples: Examples, training: HeadTraining, out: Path, about: Mapping[str, str], resume: bool | None
) -> _Run:
    """Go on with the run in `out`, or begin one by measuring the untrained heads."""
    state = None if resume is False else load_state(out)
    if resume and state is None:
        raise ValueError(f"resume: expected the state of a run in {out}, got none; leave --resume out to start one")
    shape = model_shape(model.config)
    sizes = {"layers": shape.layers, "q_heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    settings = {name: str(value) for name, value in (sizes | asdict(training)).items()}
    heads = StackedHeads(shape, width=training.width, seed=training.seed).to(model.device)
    run = _Run(
        model=model,
        training=training,
        held_out=[examples.make(number, held_out=True) for number in range(training.eval_examples)],
        out=out,
        facts={**about, **settings, **examples.facts()},
        heads=heads,
        optimizer=make_optimizer(heads, training),
        curve=Curve(fraction=training.eval_fraction),
    )
    if state is not None:
        run.restore(state)
    out.mkdir(parents=True, exist_ok=True)
    if run.step == 0:
        run.measure()
    return run


class _Losses:
    """The steps since the last report: their losses, tokens and time."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.losses: list[Tensor] = []
        self.tokens, self.since, self.latest = 0, time.monotonic(), ""

    def add(self, loss: Tensor, example: Example) -> None:
        self.losses.append(loss)
        self.tokens += example.prompt.document.shape[1]
        self.latest = example.name

    @property
    def due(self) -> bool:
        """Whether it is time for a report."""
        return len(self.losses) == _LOG_EVERY or time.monotonic() - self.since > _LOG_SECONDS

    def check(self, run: _Run) -> float:
        """Return the mean loss; raise if it, or a weight, is no number: such heads are not worth saving."""
        loss = float(torch.stack(self.losses).mean()) if self.losses else 0.0
        if not math.isfinite(loss):
            wrong = f"the loss became {loss}"
        elif not all(bool(weight.isfinite().all()) for weight in run.heads.parameters()):
            wrong = "a weight became infinite or nan"
        else:
            return loss
        raise RuntimeError(
            f"{wrong} before step {run.step} ({self.latest}); start over with a smaller --learning-rate, or with "
            f"--dtype float32"
        )

    def report(self, run: _Run) -> HeadProgress:
        """Say how far the run is, and begin anew."""
        loss = self.check(run)
        spent = time.monotonic() - self.since  # with the wait for the device
        progress = HeadProgress(
            step=run.step,
            steps=run.training.steps,
            loss=loss,
            overlap=run.curve.points[-1].overlap,
            tokens_per_s=self.tokens / spent,
            seconds_left=(run.training.steps - run.step) * spent / len(self.losses),
        )
        self._forget()
        return progress

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leave what happens inside out of the time."""
        begun = time.monotonic()
        yield
        self.since += time.monotonic() - begun
