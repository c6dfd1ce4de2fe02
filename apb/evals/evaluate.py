"""Run an evaluation: every method on the same samples, batch by batch, into a store."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from apb.evals.ask import Asker
from apb.evals.record import Record
from apb.evals.sample import Sample, Sources
from apb.evals.store import Store
from apb.evals.tasks import TASKS, make_sample
from apb.hf import model_shape
from apb.methods import Method, make_method
from apb.models import load_model, load_tokenizer

__all__ = ["FULL", "Cell", "Evaluation", "cells", "evaluate"]

FULL = "flash"
"""Full attention on one host, which every method is held against."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        model: as `load_model` reads it.
        adapter: a LoRA directory to merge into it.
        tasks, lengths, methods, hosts: all combinations are run; methods of one host once, whatever `hosts` says.
        samples: per task and length; the same ones for every method.
        seed: of the first sample; the others count on from it.
        sources: the texts and words.
        batch_tokens: most document tokens in one batch.
        dtype, device: "auto" is bfloat16 on a GPU, float32 on the CPU.
        max_new_tokens: instead of each task's own.
        shard: (i, n): of the samples, take those numbered i, i + n, …
    """

    model: str
    adapter: Path | None = None
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    hosts: tuple[int, ...]
    samples: int
    seed: int = 0
    sources: Sources = field(default_factory=Sources)
    batch_tokens: int = 16_384
    dtype: str = "auto"
    device: str = "auto"
    max_new_tokens: int | None = None
    shard: tuple[int, int] = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of the table before it is filled: a task of one length, done by a method on so many hosts."""

    length: int
    task: str
    method: str
    hosts: int


def cells(setting: Evaluation) -> list[Cell]:
    """List what has to be run, in order; methods of one host appear once.

    Raises:
        ValueError: no such method, task or setting.
    """
    found: dict[Cell, None] = {}
    for length in setting.lengths:
        for task in setting.tasks:
            for method in setting.methods:
                alone = method_for(method, tokens=length, hosts=1).one_host
                for hosts in (1,) if alone else setting.hosts:
                    found[Cell(length=length, task=task, method=method, hosts=hosts)] = None
    return list(found)


def method_for(text: str, *, tokens: int, hosts: int) -> Method:
    """Make a method of its text, in which a fraction is one of a block: "apb:anchor=1/4,passing=1/8".

    >>> method_for("star:anchor=1/4", tokens=4096, hosts=4).anchor
    256

    Args:
        text: as `make_method` reads it, but for the fractions.
        tokens: n, the document's.
        hosts: H; a block is n / H tokens, in zigzag half of that.

    Raises:
        ValueError: as `make_method`.
    """
    name, colon, rest = text.partition(":")
    blocks = hosts * (2 if "layout=zigzag" in rest or name == "ring-zigzag" else 1)
    block = -(-tokens // blocks)
    parts = []
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key != "heads" and "/" in value:
            try:
                value = str(int(Fraction(value) * block))
            except (ValueError, ZeroDivisionError):
                raise ValueError(f"{key}: expected an integer or a fraction of a block (1/8), got {value!r}") from None
        parts.append(f"{key}{equals}{value}")
    return make_method(name + colon + ",".join(parts))


def evaluate(
    setting: Evaluation,
    *,
    store: Store | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[Record]:
    """Run what `store` does not hold yet, and return the records of this run.

    Args:
        setting: what to run.
        store: where records go after each batch.
        on_progress: called with (answers done, answers in all, what runs now) before each batch.

    Raises:
        ValueError: something in `setting` that cannot be; before the model is loaded where it can be known.
    """
    todo = cells(setting)
    device = setting.device if setting.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = setting.dtype if setting.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    tokenizer = load_tokenizer(setting.model)
    extra: dict[str, Any] = {} if setting.adapter is None else {"adapter": setting.adapter}
    model = load_model(setting.model, device=torch.device(device), dtype=getattr(torch, dtype), **extra)
    asker = Asker(model, stop_tokens=_stop_tokens(model, tokenizer))
    shape = model_shape(model.config)

    first, step = setting.shard
    seeds = range(setting.seed + first, setting.seed + setting.samples, step)
    done, total, found = 0, len(todo) * len(seeds), []
    made: tuple[tuple[int, str], list[Sample]] | None = None
    name = setting.model if setting.adapter is None else f"{setting.model}+{setting.adapter.name}"
    for cell in todo:
        empty = Record(
            model=name,
            method=cell.method,
            hosts=cell.hosts,
            length=cell.length,
            task=cell.task,
            seed=0,
            score=0.0,
            nll=0.0,
            prediction="",
            references=(),
        )
        missing = [seed for seed in seeds if store is None or not store.done(replace(empty, seed=seed).key)]
        done += len(seeds) - len(missing)
        if not missing:
            continue
        if made is None or made[0] != (cell.length, cell.task):
            make = [
                make_sample(cell.task, tokenizer, length=cell.length, seed=s, sources=setting.sources) for s in seeds
            ]
            made = (cell.length, cell.task), make
        wanted = set(missing)
        task = TASKS[cell.task]
        for batch in _batches([sample for sample in made[1] if sample.seed in wanted], setting.batch_tokens):
            if on_progress:
                on_progress(done, total, f"{cell.method} on {cell.hosts}, {cell.task} at {cell.length}")
            method = method_for(cell.method, tokens=batch[0].prompt.document.shape[1], hosts=cell.hosts)
            method = method.prepare(shape, model.device, model.dtype)
            answers = asker.ask(batch, method, cell.hosts, max_new_tokens=setting.max_new_tokens or task.max_new_tokens)
            records = []
            for sample, answer in zip(batch, answers, strict=True):
                text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
                records.append(
                    replace(
                        empty,
                        seed=sample.seed,
                        score=task.score(text, sample.references),
                        nll=answer.nll,
                        prediction=text,
                        references=sample.references,
                    )
                )
            found += records
            if store is not None:
                store.add(records)
            done += len(records)
    if on_progress:
        on_progress(done, total, "done")
    return found


def _batches(samples: list[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Group samples of equal lengths, at most `batch_tokens` document tokens (or one sample) at a time."""
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        p = sample.prompt
        shape = p.document.shape[1], p.query.shape[1], p.suffix.shape[1], p.prefix_tokens
        groups.setdefault(shape, []).append(sample)
    for (tokens, *_), group in sorted(groups.items()):
        size = max(1, batch_tokens // tokens)
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    stop = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id} | set(stop if isinstance(stop, list) else [stop])
    return sorted(found - {None})
