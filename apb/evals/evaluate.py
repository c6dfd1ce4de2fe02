"""Run an evaluation: every method on the same samples, batch by batch, into a store."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import floor
from pathlib import Path
from typing import Any

from apb.device import pick_device, pick_dtype
from apb.evals.ask import Asker
from apb.evals.record import Key, Record
from apb.evals.sample import Sample, Sources
from apb.evals.store import Store
from apb.evals.tasks import TASKS, make_sample
from apb.hf import model_shape
from apb.methods import METHODS, Method, make_method, split_method
from apb.models import load_model, load_tokenizer, stop_tokens

__all__ = [
    "SAMPLES_VERSION",
    "Cell",
    "Evaluation",
    "PreparedMethods",
    "Subject",
    "cells",
    "evaluate",
    "load_subject",
    "method_for",
]

SAMPLES_VERSION = 2
"""Of the samples that one seed gives: to be raised when a task's generator changes, so that old records stay apart."""


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
        ValueError: no such method.
    """
    names = {method: split_method(method)[0] for method in setting.methods}
    if strangers := [method for method, name in names.items() if name not in METHODS]:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {strangers[0]!r}")
    found: dict[Cell, None] = {}
    for length in setting.lengths:
        for task in setting.tasks:
            for method in setting.methods:
                for hosts in (1,) if METHODS[names[method]].one_host else setting.hosts:
                    found[Cell(length=length, task=task, method=method, hosts=hosts)] = None
    return list(found)


def method_for(text: str, *, tokens: int, hosts: int) -> Method:
    """Make a method of its text, in which a fraction is one of a block: "apb:anchor=1/4,passing=1/8".

    Fractions are rounded down, but to no less than 1.

    >>> method_for("star:anchor=1/4", tokens=4096, hosts=4).anchor
    256
    >>> method_for("star:anchor=1/2000", tokens=4096, hosts=4).anchor
    1

    Args:
        text: as `make_method` reads it, but for the fractions.
        tokens: n, the document's.
        hosts: H; a block is n / H tokens, in zigzag half of that.

    Raises:
        ValueError: as `make_method`.
    """
    name, settings = split_method(text)
    layout = settings.get("layout", "zigzag" if name in ("ring-zigzag", "spava") else "contiguous")
    blocks = hosts * (2 if layout == "zigzag" else 1)
    block = -(-tokens // blocks)
    for key, value in settings.items():
        if key == "heads" or "/" not in value:  # a file's name may have a slash
            continue
        try:
            share = Fraction(value)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{key}: expected an integer or a fraction of a block (1/8), got {value!r}") from None
        settings[key] = str(max(1, floor(share * block)) if share > 0 else floor(share * block))
    return make_method(f"{name}:{','.join('='.join(pair) for pair in settings.items())}")


class PreparedMethods:
    """Makes methods of their texts and prepares them for a model; the last few are remembered, with their weights.

        prepared = PreparedMethods(model)
        prepared("apb:passing=1/8", tokens=4096, hosts=4)       # made, checkpoint and all
        prepared("apb:passing=1/8", tokens=4096, hosts=4)       # the same again

    Args:
        model: that they are for.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._shape = model, model_shape(model.config)
        self._make = lru_cache(maxsize=8)(self._prepare)

    def __call__(self, text: str, *, tokens: int, hosts: int) -> Method:
        """Return the method; arguments and errors as `method_for`."""
        return self._make(text, tokens, hosts)

    def _prepare(self, text: str, tokens: int, hosts: int) -> Method:
        method = method_for(text, tokens=tokens, hosts=hosts)
        return method.prepare(self._shape, self._model.device, self._model.dtype)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is evaluated, loaded; `name` is how records know it."""

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)


def load_subject(setting: Evaluation) -> Subject:
    """Load the model that `setting` names; errors as `pick_device`, `pick_dtype` and `load_model`."""
    device = pick_device(setting.device)
    dtype = pick_dtype(setting.dtype, device)
    model = load_model(setting.model, device=device, dtype=dtype, adapter=setting.adapter)
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
        ValueError: something in `setting` that cannot be, before the model is loaded where it can be known; or a
            sample that cannot be made, with its task, length and seed.
    """
    todo = cells(setting)
    for method in setting.methods:  # refused now rather than behind the first one's answers
        method_for(method, tokens=min(setting.lengths, default=1), hosts=1)
    subject = subject or load_subject(setting)
    asker = Asker(subject.model, stop_tokens=stop_tokens(subject.model, subject.tokenizer))
    prepared = PreparedMethods(subject.model)
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
                samples[seed] = _sample(setting, subject, cell, seed, kept=store is not None)
        for batch in _batches([samples[seed] for seed in missing], setting.batch_tokens):
            tell(done, total, f"{cell.method} on {cell.hosts}, {cell.task} at {cell.length}")
            method = prepared(cell.method, tokens=batch[0].prompt.document.shape[1], hosts=cell.hosts)
            records = _answer(asker, subject, cell, method, batch, setting.max_new_tokens)
            if store is not None:
                store.add(records)
            found += records
            done += len(records)
    tell(done, total, "done")
    return found


def _sample(setting: Evaluation, subject: Subject, cell: Cell, seed: int, *, kept: bool) -> Sample:
    """Make a sample, or say which one cannot be made."""
    try:
        return make_sample(cell.task, subject.tokenizer, length=cell.length, seed=seed, sources=setting.sources)
    except ValueError as error:
        but = "; the answers so far are kept" if kept else ""
        raise ValueError(
            f"{cell.task} at {cell.length} tokens with seed {seed} cannot be made: {error}{but}"
        ) from error


def _answer(
    asker: Asker, subject: Subject, cell: Cell, method: Method, batch: list[Sample], max_new_tokens: int | None
) -> list[Record]:
    """Answer one batch, and score it."""
    task = TASKS[cell.task]
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
