"""Teach a small model long-context tasks with a LoRA adapter, under full attention.

A model that cannot find a fact under full attention says nothing about the methods that approximate it. The adapter
(Hu et al., arXiv 2106.09685; trained and stored by PEFT) is learned on generated documents whose words and texts the
evaluation never uses.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from apb.bench import environment
from apb.evals import TASKS, Sources
from apb.files import write_whole
from apb.train.adapter_card import adapter_card
from apb.train.dialogues import IGNORED, Dialogues
from apb.train.examples import check_lengths
from apb.train.settings import check_integers, check_positive

__all__ = ["AdapterTraining", "TrainedAdapter", "train_adapter"]


@dataclass(frozen=True, kw_only=True)
class AdapterTraining:
    """How to train an adapter.

    Attributes:
        tasks: generators to draw from, all equally often.
        lengths: document lengths to draw from.
        steps: optimiser steps.
        minutes: stop by then at the latest; the learning rate falls by whichever limit is nearer.
        batch_tokens: document tokens a step and rank.
        turns: most questions a document.
        rank, alpha: of LoRA; the update is (alpha / rank) · B A.
        lr: highest learning rate; over the whole run it falls to 0 along a cosine.
        warmup: steps in which it also rises linearly from 0.
        seed: of the data.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    steps: int = 1000
    minutes: float | None = None
    batch_tokens: int = 32_768
    turns: int = 4
    rank: int = 16
    alpha: int = 32
    lr: float = 1e-3
    warmup: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, steps=1, batch_tokens=1, turns=1, rank=1, alpha=1, warmup=0)
        check_positive(self, "lr", *(["minutes"] if self.minutes is not None else []))
        check_lengths(self.lengths)
        if not self.tasks or any(task not in TASKS for task in self.tasks):
            unknown = [task for task in self.tasks if task not in TASKS]
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(unknown) or 'none'}")

    def rate(self, step: int, done: float) -> float:
        """Return the learning rate of a step, counted from 0, when a share `done` of the run is over.

        >>> AdapterTraining(tasks=("vt",), lr=1e-3, warmup=10).rate(4, 0.0)
        0.0005
        >>> AdapterTraining(tasks=("vt",), lr=1e-3, warmup=10).rate(500, 0.5)
        0.0005
        """
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup)) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter:
    """What came of a training.

    Attributes:
        curve: points (step, loss, right: share of the learned tokens that are predicted, seconds).
        stopped: why it ended before its last step; None if it did not.
    """

    curve: list[dict[str, float]]
    stopped: str | None


def train_adapter(
    model: Any,
    tokenizer: Any,
    out: Path,
    training: AdapterTraining,
    sources: Sources,
    *,
    base_model: str,
    workers: int = 4,
    log_every: int = 20,
    stop: Callable[[], str | None] = lambda: None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> TrainedAdapter:
    """Train an adapter and write it to `out` in PEFT's format, with its facts and a model card.

    Under torchrun every rank draws its own batches, and the ranks' gradients are averaged.

    Args:
        model: a transformers causal language model on one device; it is left with the adapter in it.
        tokenizer: its tokenizer, with a chat template.
        out: a directory.
        training: how.
        sources: texts and words; of the "training" split.
        base_model: what the model is called.
        workers: processes that write documents.
        log_every: steps between points of the curve.
        stop: says why to end now, or None; the adapter is written all the same.
        on_log: called on rank 0 with each point of the curve.

    Raises:
        ValueError: documents longer than the model's positions, or sources of the evaluation.
        ImportError: PEFT is not installed.
        RuntimeError: the loss is no longer a number; nothing is written.
    """
    _check(model, training, sources, workers)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    adapted = _add_adapter(model, training, base_model)
    data = Dialogues(
        tokenizer=tokenizer,
        tasks=training.tasks,
        lengths=training.lengths,
        batch_tokens=training.batch_tokens,
        turns=training.turns,
        sources=sources,
        seed=training.seed,
        rank=rank,
        world_size=world,
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    batches = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    model.train()
    log = on_log if rank == 0 and on_log else lambda point: None
    trained = _optimise(model, weights, batches, training, world, log_every, stop, log)
    model.eval()
    if rank == 0:
        _write(adapted, out, asdict(training) | {"base_model": base_model, "ranks": world}, trained)
    return trained


def _check(model: Any, training: AdapterTraining, sources: Sources, workers: int) -> None:
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more processes, got {workers}")
    positions = model.config.max_position_embeddings
    if max(training.lengths) > positions:
        raise ValueError(f"lengths: {max(training.lengths)} tokens, but the model has {positions} positions")
    if sources.split != "training":
        raise ValueError(
            f"sources: expected the 'training' split, got {sources.split!r}; the other one is evaluated on"
        )


def _add_adapter(model: Any, training: AdapterTraining, base_model: str) -> Any:
    """Put an untrained adapter into the model, the same one on every rank."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("peft is needed for adapters; pip install 'apb[train]'") from None
    torch.manual_seed(training.seed)
    adapted = get_peft_model(
        model,
        LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    adapted.peft_config["default"].base_model_name_or_path = base_model
    return adapted


def _write(adapted: Any, out: Path, facts: dict[str, Any], trained: TrainedAdapter) -> None:
    """Write the adapter, its facts and its card."""
    out.mkdir(parents=True, exist_ok=True)
    half = {name: weight.bfloat16() for name, weight in adapted.state_dict().items()}
    adapted.save_pretrained(str(out), state_dict=half, save_embedding_layers=False)
    facts = facts | {"environment": environment(), "stopped": trained.stopped, "curve": trained.curve}
    write_whole(out / "training.json", lambda part: part.write_text(json.dumps(facts, indent=2) + "\n"))
    size = (out / "adapter_model.safetensors").stat().st_size
    write_whole(out / "README.md", lambda part: part.write_text(adapter_card(facts, size), encoding="utf-8"))


def _optimise(
    model: Any,
    weights: Sequence[Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    training: AdapterTraining,
    world: int,
    log_every: int,
    stop: Callable[[], str | None],
    log: Callable[[dict[str, float]], None],
) -> TrainedAdapter:
    """Run the steps: AdamW, the rate rising at first and then falling along a cosine, gradients clipped to norm 1."""
    optimizer = torch.optim.AdamW(weights, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0)
    started, curve, sums = time.perf_counter(), [], torch.zeros(3, device=model.device)
    for step, (ids, targets) in enumerate(batches):
        reason = stop()
        done = step / training.steps
        if training.minutes:
            done = max(done, (time.perf_counter() - started) / 60 / training.minutes)
        done = _latest(1.0 if reason else done, world, model.device)
        if done >= 1:
            _means(sums, world, step)
            return TrainedAdapter(curve=curve, stopped=reason or ("time is up" if step < training.steps else None))
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step, done)
        loss, right, count = _forward(model, ids.to(model.device), targets.to(model.device))
        loss.backward()
        _average(weights, world)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack((loss.detach(), right / count, torch.ones_like(loss)))
        if (step + 1) % log_every == 0 or step + 1 == training.steps:
            loss_mean, right_mean = _means(sums, world, step + 1)
            seconds = time.perf_counter() - started
            curve.append({"step": step + 1, "loss": loss_mean, "right": right_mean, "seconds": seconds})
            log(curve[-1])
    raise AssertionError("batches have no end")


def _means(sums: Tensor, world: int, step: int) -> tuple[float, float]:
    """Return the means of loss and right over steps and ranks since the last call, and begin anew.

    Raises:
        RuntimeError: the loss is no number, on every rank at once.
    """
    if world > 1:
        dist.all_reduce(sums)
    loss, right = (sums[:2] / sums[2].clamp(min=1)).tolist()
    sums.zero_()
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss became {loss} before step {step}; start over with a smaller --lr")
    return loss, right


def _latest(done: float, world: int, device: torch.device) -> float:
    """Return the ranks' largest `done`, so that all of them stop at the same step."""
    if world == 1:
        return done
    clock = torch.tensor(done, device=device, dtype=torch.float32)
    dist.all_reduce(clock, op=dist.ReduceOp.MAX)
    return float(clock)


def _forward(model: Any, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss over learned tokens, how many of them are predicted, and their number."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        learned = targets[:, 1:] != IGNORED
        logits = model.get_output_embeddings()(hidden[:, :-1][learned])
    wanted = targets[:, 1:][learned]
    loss = F.cross_entropy(logits.float(), wanted)
    return loss, (logits.argmax(dim=-1) == wanted).sum(), torch.tensor(len(wanted), device=ids.device)


def _average(weights: Sequence[Tensor], world: int) -> None:
    """Average the gradients over the ranks, in one message."""
    if world == 1:
        return
    flat = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
    dist.all_reduce(flat)
    start = 0
    for weight in weights:
        if weight.grad is not None:
            weight.grad.copy_(flat[start : start + weight.numel()].view_as(weight) / world)
            start += weight.numel()
