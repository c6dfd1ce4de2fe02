"""Answer questions on the hosts that are here: find or start them, load the model on each, generate, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apb.adapter import check_adapter
from apb.attend import Backend
from apb.compress.retaining_head import warn_of_another_model
from apb.conversation import Conversation
from apb.decoding import check_new_tokens
from apb.device import pick_device, pick_dtype
from apb.generate import generate_batch
from apb.generation import Generation
from apb.hf import model_shape, share_weights
from apb.methods import METHODS, Method, make_method
from apb.models import DEMO_MODEL, demo_model, load_model, load_tokenizer, stop_tokens
from apb.parallel import Host, host_from_env, run_processes, run_simulated, run_threads
from apb.prompt import Prompt, build_prompt
from apb.report import HostReport, Report, gather_reports, report_host
from apb.sampling import Sampling
from apb.stream import TextStreams

__all__ = ["HostKind", "HostReport", "Job", "OnText", "Report", "check_job", "run_job", "run_jobs"]

HostKind = Literal["auto", "processes", "threads", "simulated"]
OnPhase = Callable[[str, int, int], None]
OnText = Callable[[int, str], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run.

    `method` is a name of `apb.methods.METHODS`, with settings if need be ("star:anchor=1024"); `settings` are further
    ones, by name. `hosts` of None is the ranks of torchrun, or one. `more` are further documents, each with its
    question; `follow_ups` are further questions about the one document, on the same prefill, each of them behind the
    document alone. `adapter` is a directory with a LoRA that is merged into the weights. An answer ends at the model's
    stop tokens, and at any text of `stop`.
    """

    model: str
    document: str = field(repr=False)
    query: str
    more: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    follow_ups: tuple[str, ...] = ()
    answer_prefix: str = ""
    method: str = "apb"
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    hosts: int | None = None
    host_kind: HostKind = "auto"
    backend: Backend = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_new_tokens: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    timeout_s: float = 300.0
    keep_indices: bool = False

    @property
    def queries(self) -> list[str]:
        """The questions in the order of their answers."""
        return [self.query, *(query for _, query in self.more), *self.follow_ups]


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """What one host has of a job: for each question the text, what came of it, and what this host did for it."""

    method: str
    layers: int
    texts: list[str]
    generations: list[Generation]
    hosts: list[HostReport]


def run_job(
    job: Job, *, on_phase: OnPhase | None = None, on_text: OnText | None = None, here: bool = False
) -> Report | None:
    """Run a job of one question; arguments and errors as `run_jobs`.

    Returns:
        Its report; under torchrun on rank 0 only, and None elsewhere.
    """
    reports = run_jobs(job, on_phase=on_phase, on_text=on_text, here=here)
    return reports[0] if reports else None


def run_jobs(
    job: Job, *, on_phase: OnPhase | None = None, on_text: OnText | None = None, here: bool = False
) -> list[Report]:
    """Run `job` on the ranks that torchrun started, or else on hosts started here.

    Args:
        job: what to run.
        on_phase: called on rank 0 with (phase, done, total), as in `generate`; picklable if hosts are spawned.
        on_text: called on rank 0 with (question's number, piece) as the answers are written; an answer's pieces put
            together are its text, and an empty one ends it. Picklable if hosts are spawned.
        here: start hosts in this process even under torchrun.

    Returns:
        A report for each question, in the order of `job.queries`; under torchrun on rank 0 only, and none elsewhere.

    Raises:
        ValueError: something in the job that cannot be.
        HostFailed: a host died or did not answer in time.
    """
    check_job(job)
    started = time.perf_counter()
    host = None if here else host_from_env(timeout_s=job.timeout_s)
    if host is not None:
        kind = f"{host.world_size} ranks of torchrun"
        if job.hosts not in (None, host.world_size):
            raise ValueError(f"hosts: torchrun started {host.world_size} ranks, got {job.hosts}; leave --hosts out")
        try:
            mine = _answer(host, job, on_phase, on_text)
            by_rank = gather_reports(host, mine.hosts)
        except Exception as error:
            host.announce(error)
            raise
        host.close()
        if host.rank != 0:
            return []
    else:
        kind, parts = _start_hosts(job, on_phase, on_text)
        mine, by_rank = parts[0], [part.hosts for part in parts]
    wall_s = time.perf_counter() - started
    return [
        Report(
            query=query,
            answer=mine.texts[i],
            tokens=mine.generations[i].tokens[0].tolist(),
            sound=mine.generations[i].sound,
            further=i > 0 and bool(job.follow_ups),
            plan=mine.generations[i].plan,
            title=METHODS[job.method.partition(":")[0]].title,
            method=mine.method,
            host_kind=kind,
            layers=mine.layers,
            wall_s=wall_s,
            hosts=[hosts[i] for hosts in by_rank],
            generation=mine.generations[i],
        )
        for i, query in enumerate(job.queries)
    ]


def check_job(job: Job) -> None:
    """Refuse what cannot be before a host is started or a model is loaded, and warn of heads for another model.

    Raises:
        ValueError: naming what came, what was expected and the way out.
        ImportError: an adapter is given and peft is not installed.
    """
    if not 0 < job.timeout_s <= 1e6:
        raise ValueError(f"timeout: expected seconds, more than 0 and at most 1e6, got {job.timeout_s}")
    check_new_tokens(job.max_new_tokens)
    documents = [("document", document) for document in (job.document, *(document for document, _ in job.more))]
    for name, text in (*documents, *(("query", query) for query in job.queries)):
        if not text.strip():
            raise ValueError(f"{name}: expected some text, got {text!r}")
    if job.more and job.follow_ups:
        raise ValueError(
            f"follow_ups: they are about one document, got {1 + len(job.more)} documents; ask them document by document"
        )
    if "" in job.stop:
        raise ValueError("stop: expected some text, got ''; leave it out to end at the model's stop tokens")
    if job.adapter is not None:
        check_adapter(job.adapter)
    if job.hosts is not None and job.hosts < 1:
        raise ValueError(f"hosts: expected at least 1, got {job.hosts}")
    method = make_method(job.method, backend=job.backend, **job.settings)
    if method.one_host and job.hosts not in (None, 1):
        raise ValueError(
            f"hosts: {job.method} runs on one host, got {job.hosts}; leave hosts out, or take a method that splits the "
            f"document (ring, apb, …)"
        )
    warn_of_another_model(getattr(method, "compressor", None), model=job.model, adapter=job.adapter)


def _start_hosts(job: Job, on_phase: OnPhase | None, on_text: OnText | None) -> tuple[str, list[_Answered]]:
    if job.model == DEMO_MODEL:
        demo_model()  # once, before the hosts start
    gpus, n = torch.cuda.device_count(), 1 if job.hosts is None else job.hosts
    if n < 1:
        raise ValueError(f"hosts: expected at least 1, got {n}")
    kind = job.host_kind
    if kind == "auto":
        kind = "threads" if n == 1 or 0 < gpus < n else "processes"
    if kind == "processes":
        backend = "nccl" if gpus >= n else "gloo"
        parts = run_processes(n, _answer, job, on_phase, on_text, backend=backend, timeout_s=job.timeout_s)
        return f"{n} processes, {backend}", parts
    device = pick_device()
    run = run_simulated if kind == "simulated" else run_threads
    model = _load(job, device) if n > 1 else None
    parts = run(n, _answer, job, on_phase, on_text, model, device=device, timeout_s=job.timeout_s)
    name = {"simulated": "simulated host", "threads": "thread"}[kind]
    return "one host in this process" if n == 1 else f"{n} {name}s on {device}", parts


def _load(job: Job, device: torch.device) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for every host would be noise; `on_phase` says what goes on
    return load_model(job.model, device=device, dtype=pick_dtype(job.dtype, device), adapter=job.adapter)


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What one host answers with: the model, and the job's documents and questions in tokens."""

    model: Any
    tokenizer: Any
    method: Method
    prompts: list[Prompt]
    """Of each document."""
    follow_ups: list[Prompt]
    """Only their questions and suffixes count."""


def _prepare(host: Host, job: Job, model: Any) -> _Loaded:
    """Load the model, or share the one that is there, and tokenise the job."""
    with host.together("load"):
        tokenizer = load_tokenizer(job.model)
        model = _load(job, host.device) if model is None else share_weights(model)
        pairs = [(job.document, job.query), *job.more]
        prompts = [build_prompt(tokenizer, *pair, answer_prefix=job.answer_prefix) for pair in pairs]
        # What is asked is tokenised without the document: any document would do.
        asked = [build_prompt(tokenizer, "-", query, answer_prefix=job.answer_prefix) for query in job.follow_ups]
        method = make_method(job.method, backend=job.backend, **job.settings)
        method = method.prepare(model_shape(model.config), host.device, model.dtype)
    return _Loaded(model=model, tokenizer=tokenizer, method=method, prompts=prompts, follow_ups=asked)


def _answer(
    host: Host, job: Job, on_phase: OnPhase | None = None, on_text: OnText | None = None, model: Any = None
) -> _Answered:
    """Do one host's share; the same on every host."""
    tell = on_phase if host.rank == 0 and on_phase else lambda name, done, total: None
    tell("load", 0, 0)
    loaded = _prepare(host, job, model)
    model = loaded.model
    show = on_text if host.rank == 0 else None
    streams = TextStreams(loaded.tokenizer, len(job.queries), stop=job.stop, head=job.answer_prefix, show=show)
    watches: dict[str, Any] = {
        "on_phase": tell,
        "keep_indices": job.keep_indices,
        "keep_layer": model.config.num_hidden_layers // 2,
    }
    answering: dict[str, Any] = {
        "max_new_tokens": job.max_new_tokens,
        "stop_tokens": stop_tokens(model, loaded.tokenizer),
        "sampling": job.sampling,
    }
    if job.follow_ups:
        conversation = Conversation(model, loaded.method, host, **watches)
        found = _converse(conversation, loaded, streams, answering)
    else:
        options = answering | watches
        found = generate_batch(model, loaded.method, host, loaded.prompts, on_token=streams.push, **options)
        for question in range(len(found)):
            streams.end(question)
    return _Answered(
        method=repr(loaded.method),
        layers=model.config.num_hidden_layers,
        texts=streams.texts,
        generations=[generation.to("cpu") for generation in found],
        hosts=[report_host(host, model, generation) for generation in found],
    )


def _converse(
    conversation: Conversation, loaded: _Loaded, streams: TextStreams, answering: dict[str, Any]
) -> list[Generation]:
    """Ask the document's question and the further ones on its prefill."""
    (first,), found = loaded.prompts, []
    conversation.prefill(first.document, first.query, prefix_tokens=first.prefix_tokens)
    for question, prompt in enumerate([first, *loaded.follow_ups]):

        def on_token(number: int, ids: Tensor, question: int = question) -> list[bool]:
            return [streams.push(question, number, int(ids[0]))]

        found.append(conversation.ask(prompt.query, prompt.suffix, on_token=on_token, **answering))
        streams.end(question)
    return found
