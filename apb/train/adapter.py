"""Teach a small model long-context tasks with a LoRA adapter, under full attention.

A model that cannot find a fact under full attention says nothing about the methods that approximate it. The adapter
(Hu et al., arXiv 2106.09685; trained and stored by PEFT) is learned on generated documents whose words and texts the
evaluation never uses.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from apb.evals import Sources
from apb.train.dialogues import IGNORED, Dialogues

__all__ = ["AdapterTraining", "train_adapter"]


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
        lr: highest learning rate, after `warmup` steps; it then falls to 0 along a cosine.
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


def train_adapter(
    model: Any,
    tokenizer: Any,
    out: Path,
    training: AdapterTraining,
    sources: Sources,
    *,
    workers: int = 4,
    log_every: int = 20,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train an adapter and write it to `out` in PEFT's format; return the curve.

    Under torchrun every rank draws its own batches, and the ranks' gradients are averaged.

    Args:
        model: a transformers causal language model on one device; it is left with the adapter in it.
        tokenizer: its tokenizer.
        out: a directory.
        training: how.
        sources: texts and words; use their "training" split.
        workers: processes that write documents.
        log_every: steps between points of the curve.
        on_log: called on rank 0 with each point: step, loss, right (share of learned tokens predicted), seconds.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("peft is needed for adapters; pip install 'apb[train]'") from None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(training.seed)  # the same initial adapter on every rank
    adapted = get_peft_model(
        model,
        LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0)
    data = Dialogues(
        tokenizer=tokenizer, tasks=training.tasks, lengths=training.lengths, batch_tokens=training.batch_tokens,
        turns=training.turns, sources=sources, seed=training.seed, rank=rank, world_size=world,
    )  # fmt: skip
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    started, curve, sums = time.perf_counter(), [], torch.zeros(3, device=model.device)
    model.train()
    for step, (ids, targets) in enumerate(loader):
        spent = (time.perf_counter() - started) / 60
        done = max(step / training.steps, spent / training.minutes if training.minutes else 0.0)
        if world > 1:  # the slowest rank's clock counts
            clock = torch.tensor(done, device=model.device)
            dist.all_reduce(clock, op=dist.ReduceOp.MAX)
            done = float(clock)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = training.lr * min(1.0, (step + 1) / training.warmup) * 0.5 * (1 + math.cos(math.pi * done))
        loss, right, count = _forward(model, ids.to(model.device), targets.to(model.device))
        loss.backward()
        _average(weights, world)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack((loss.detach(), right / count, torch.ones_like(loss)))
        if (step + 1) % log_every == 0:
            mean = (sums / sums[2]).tolist()
            sums.zero_()
            seconds = time.perf_counter() - started
            curve.append({"step": step + 1, "loss": mean[0], "right": mean[1], "seconds": seconds})
            if on_log and rank == 0:
                on_log(curve[-1])
    model.eval()
    if rank == 0:
        half = {name: weight.bfloat16() for name, weight in adapted.state_dict().items()}
        adapted.save_pretrained(out, state_dict=half)
        facts = asdict(training) | {"world_size": world, "curve": curve}
        (out / "training.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
    return curve


def _forward(model: Any, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss over learned tokens, how many of them are predicted, and their number."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        learned = targets[:, 1:] != IGNORED
        logits = model.get_output_embeddings()(hidden[:, :-1][learned])
    wanted = targets[:, 1:][learned]
    loss = F.cross_entropy(logits.float(), wanted)
    return loss, (logits.argmax(dim=-1) == wanted).sum(), torch.tensor(len(wanted), device=ids.device)


def _average(weights: list[Tensor], world: int) -> None:
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
