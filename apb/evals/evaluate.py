"""Run an evaluation: every method on the same samples, batch by batch, into a store."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from apb.evals.ask import Asker
from apb.evals.record import Key, Record
from apb.evals.sample import Sample, Sources
from apb.evals.store import Store
from apb.evals.tasks import TASKS, make_sample
from apb.hf import model_shape
from apb.methods import Method, make_method
from apb.models import load_model, load_tokenizer

__all__ = ["Cell", "Evaluation", "Subject", "cells", "evaluate", "load_subject", "method_for"]


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

    def key(self, model: str, seed: int) -> Key:
        """Return the key of this entry's record of one sample."""
        return model, self.method, self.hosts, self.length, self.task, seed


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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is evaluated, loaded; `name` is how records know it."""

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)


def load_subject(setting: Evaluation) -> Subject:
    """Load the model that `setting` names; errors as `load_model`."""
    device = setting.device if setting.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = setting.dtype if setting.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    model = load_model(setting.model, device=torch.device(device), dtype=getattr(torch, dtype), adapter=setting.adapter)
    name = setting.model if setting.adapter is None else f"{setting.model}+{setting.adapter.name}"
    return Subject(name=name, model=model, tokenizer=load_tokenizer(setting.model))


def evaluate(
    setting: Evaluation,
    *,
    store: Store | None = None,
    subject: Subject | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[Record]:
    """Run what `store` does not hold yet, and return the records of this run.

    Args:
        setting: what to run.
        store: where records go after each batch.
        subject: the model, if it is loaded already.
        on_progress: called with (answers done, answers in all, what runs now) before each batch.

    Raises:
        ValueError: something in `setting` that cannot be; before the model is loaded where it can be known.
    """
    todo = cells(setting)
    subject = subject or load_subject(setting)
    asker = Asker(subject.model, stop_tokens=_stop_tokens(subject))
    tell = on_progress or (lambda done, total, what: None)
    first, step = setting.shard
    seeds = range(setting.seed + first, setting.seed + setting.samples, step)
    samples: dict[int, Sample] = {}
    drawn, found, done, total = None, [], 0, len(todo) * len(seeds)
    for cell in todo:
        if drawn != (cell.length, cell.task):
            drawn, samples = (cell.length, cell.task), {}
        missing = [seed for seed in seeds if store is None or not store.done(cell.key(subject.name, seed))]
        done += len(seeds) - len(missing)
        for seed in missing:
            if seed not in samples:
                samples[seed] = make_sample(
                    cell.task, subject.tokenizer, length=cell.length, seed=seed, sources=setting.sources
                )
        for batch in _batches([samples[seed] for seed in missing], setting.batch_tokens):
            tell(done, total, f"{cell.method} on {cell.hosts}, {cell.task} at {cell.length}")
            records = _answer(asker, subject, cell, batch, setting.max_new_tokens)
            if store is not None:
                store.add(records)
            found += records
            done += len(records)
    tell(done, total, "done")
    return found


def _answer(
    asker: Asker, subject: Subject, cell: Cell, batch: list[Sample], max_new_tokens: int | None
) -> list[Record]:
    """Answer one batch, and score it."""
    task, model = TASKS[cell.task], subject.model
    method = method_for(cell.method, tokens=batch[0].prompt.document.shape[1], hosts=cell.hosts)
    method = method.prepare(model_shape(model.config), model.device, model.dtype)
    answers = asker.ask(batch, method, cell.hosts, max_new_tokens=max_new_tokens or task.max_new_tokens)
    records = []
    for sample, answer in zip(batch, answers, strict=True):
        text = subject.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        records.append(
            Record(
                model=subject.name,
                method=cell.method,
                hosts=cell.hosts,
                length=cell.length,
                task=cell.task,
                seed=sample.seed,
                score=task.score(text, sample.references),
                nll=answer.nll,
                prediction=text,
                references=sample.references,
            )
        )
    return records


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


def _stop_tokens(subject: Subject) -> list[int]:
    stop = subject.model.generation_config.eos_token_id
    found = {subject.tokenizer.eos_token_id} | set(stop if isinstance(stop, list) else [stop])
    return sorted(found - {None})
