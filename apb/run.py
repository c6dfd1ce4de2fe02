"""Answer one question on the hosts that are here: find or start them, load the model on each, generate, report."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from apb.attend import Backend
from apb.costs import HostCost
from apb.generate import Generation, generate
from apb.hf import model_shape, share_weights
from apb.methods import METHODS, make_method
from apb.models import DEMO_MODEL, demo_model, load_model, load_tokenizer
from apb.parallel import Host, host_from_env, run_processes, run_simulated, run_threads
from apb.plan import ContextPlan
from apb.prompt import build_prompt

__all__ = ["HostKind", "HostReport", "Job", "Report", "check_job", "run_job"]

HostKind = Literal["auto", "processes", "threads", "simulated"]
OnPhase = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run.

    `method` is a name of `apb.methods.METHODS`, with settings if need be ("star:anchor=1024"); `settings` are further
    ones, by name. `hosts` of None is the ranks of torchrun, or one.
    """

    model: str
    document: str = field(repr=False)
    query: str
    answer_prefix: str = ""
    method: str = "apb"
    settings: dict[str, Any] = field(default_factory=dict)
    hosts: int | None = None
    host_kind: HostKind = "auto"
    backend: Backend = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_new_tokens: int = 32
    timeout_s: float = 300.0
    keep_indices: bool = False


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """What one host held, computed, sent and spent.

    `pairs` were scored in a layer of the prefill, summed over the query heads, the mean over the layers; `of_exact` is
    their share of what exact attention on one host scores. `kept` are (block, document positions) that the middle
    layer's first KV head passed on, if the job asked for them.
    """

    rank: int
    device: str
    cost: HostCost
    pairs: float
    of_exact: float
    sent_bytes: dict[str, int]
    prefill_bytes: int
    messages: dict[str, int]
    phase_ms: dict[str, float]
    peak_bytes: int
    kept: list[tuple[int, list[int]]] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The answer and how it came about; `hosts` in rank order, `generation` as rank 0 saw it."""

    answer: str
    tokens: list[int]
    plan: ContextPlan
    title: str
    method: str
    host_kind: str
    layers: int
    wall_s: float
    hosts: list[HostReport]
    generation: Generation = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the tensors."""
        return asdict(replace(self, generation=None))


def run_job(job: Job, *, on_phase: OnPhase | None = None, here: bool = False) -> Report | None:
    """Run `job` on the ranks that torchrun started, or else on hosts started here.

    Args:
        job: what to run.
        on_phase: called on rank 0 with (phase, done, total), as in `generate`; picklable if hosts are spawned.
        here: start hosts in this process even under torchrun.

    Returns:
        The report; under torchrun on rank 0 only, and None elsewhere.

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
            parts = _gather_reports(host, _answer(host, job, on_phase))
        except Exception as error:
            host.announce(error)
            raise
        host.close()
        if host.rank != 0:
            return None
    else:
        kind, parts = _start_hosts(job, on_phase)
    answer, tokens, method, layers, generation, _ = parts[0]
    return Report(
        answer=answer,
        tokens=tokens,
        plan=generation.plan,
        title=METHODS[job.method.partition(":")[0]].title,
        method=method,
        host_kind=kind,
        layers=layers,
        wall_s=time.perf_counter() - started,
        hosts=[part[-1] for part in parts],
        generation=generation,
    )


def check_job(job: Job) -> None:
    """Refuse what cannot be before a host is started or a model is loaded.

    Raises:
        ValueError: naming what came, what was expected and the way out.
    """
    if not 0 < job.timeout_s <= 1e6:
        raise ValueError(f"timeout: expected seconds, more than 0 and at most 1e6, got {job.timeout_s}")
    if job.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {job.max_new_tokens}")
    for name, text in (("document", job.document), ("query", job.query)):
        if not text.strip():
            raise ValueError(f"{name}: expected some text, got {text!r}")
    if job.hosts is not None and job.hosts < 1:
        raise ValueError(f"hosts: expected at least 1, got {job.hosts}")
    method = make_method(job.method, backend=job.backend, **job.settings)
    if method.one_host and job.hosts not in (None, 1):
        raise ValueError(
            f"hosts: {job.method} runs on one host, got {job.hosts}; leave hosts out, or take a method that splits the "
            f"document (ring, apb, …)"
        )


def _start_hosts(job: Job, on_phase: OnPhase | None) -> tuple[str, list[Any]]:
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
        parts = run_processes(n, _answer, job, on_phase, backend=backend, timeout_s=job.timeout_s)
        return f"{n} processes, {backend}", parts
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    run = run_simulated if kind == "simulated" else run_threads
    model = _load(job, device) if n > 1 else None
    parts = run(n, _answer, job, on_phase, model, device=device, timeout_s=job.timeout_s)
    name = {"simulated": "simulated host", "threads": "thread"}[kind]
    return "one host in this process" if n == 1 else f"{n} {name}s on {device}", parts


def _load(job: Job, device: torch.device) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # one for every host would be noise; `on_phase` says what goes on
    dtype = job.dtype if job.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    return load_model(job.model, device=device, dtype=getattr(torch, dtype))


def _answer(
    host: Host, job: Job, on_phase: OnPhase | None = None, model: Any = None
) -> tuple[str, list[int], str, int, Generation, HostReport]:
    """Do one host's share; the same on every host."""
    tell = on_phase if host.rank == 0 and on_phase else lambda name, done, total: None
    tell("load", 0, 0)
    with host.together("load"):
        tokenizer = load_tokenizer(job.model)
        model = _load(job, host.device) if model is None else share_weights(model)
        prompt = build_prompt(tokenizer, job.document, job.query, answer_prefix=job.answer_prefix)
        method = make_method(job.method, backend=job.backend, **job.settings)
        method = method.prepare(model_shape(model.config), host.device, model.dtype)
    layers = model.config.num_hidden_layers
    stop = model.generation_config.eos_token_id
    result: Generation = generate(
        model,
        method,
        host,
        prompt,
        max_new_tokens=job.max_new_tokens,
        stop_tokens=[] if stop is None else [stop] if isinstance(stop, int) else stop,
        on_phase=tell,
        keep_indices=job.keep_indices,
        keep_layer=layers // 2,
    )
    tokens = result.tokens[0].tolist()
    cuda = host.device.type == "cuda"
    heads, n = model.config.num_attention_heads, result.plan.tokens
    pairs = sum(result.pairs.values()) / layers
    report = HostReport(
        rank=host.rank,
        device=torch.cuda.get_device_name(host.device) if cuda else "CPU",
        cost=result.cost,
        pairs=pairs,
        of_exact=pairs / (heads * n * (n + 1) / 2),
        sent_bytes=dict(result.counters.sent_bytes),
        prefill_bytes=result.prefill_bytes,
        messages=dict(result.counters.messages),
        phase_ms=result.phase_ms,
        peak_bytes=result.peak_bytes,
        kept=[(block, where[0, 0].tolist()) for (_, block), where in result.kept.items()],
    )
    text = job.answer_prefix + tokenizer.decode(tokens, skip_special_tokens=True)
    return text.strip(), tokens, repr(method), layers, result.to("cpu"), report


def _gather_reports(host: Host, mine: tuple[Any, ...]) -> list[Any]:
    """Bring every rank's report together, as plain data."""
    *shared, report = mine
    plain = report.__dict__ | {"cost": report.cost.__dict__}
    parts = []
    for other in host.all_gather_object(plain, what="report"):
        parts.append((*shared, HostReport(**(other | {"cost": HostCost(**other["cost"])}))))
    return parts
