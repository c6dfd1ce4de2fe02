"""Simulated: each host's share timed alone, in turn, on one device; messages by their counted bytes and a link.

    layer = slowest host's compute + most messages of a host
    time to first token = layers · layer + the question's pass

A host waits for no other in here, as it may inside a real layer. Messages are charged in full, as if nothing ran under
them, but for methods that send while they attend: there the larger of attention and messages is charged. That is a
little kind to APB, whose first gather has only the second block's compressor to hide under, and the question's gather
nothing; nor is charged what NCCL takes from attention. The embedding of the rows, one copy, is left out, and so is what
a GPU waits for Python.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from apb.bench.clock import queue_ahead
from apb.bench.prefill.case import Case, phase_columns
from apb.bench.prefill.layer import Decoder
from apb.bench.prefill.link import Link
from apb.bench.prefill.memory import cache_bytes, weight_bytes
from apb.bench.prefill.record import PrefillRow
from apb.bench.prefill.share import Share
from apb.context import Trace
from apb.memory import PeakMemory
from apb.methods import Method
from apb.parallel import LoneHost
from apb.parallel.host import Counters

__all__ = ["run_one"]

_ENOUGH_S = 0.5  # of the prefill's layers, after half as long a warm-up
_ENOUGH_ASKED_S = 0.1  # of the question's pass
_MOST = 200  # layers, where they are short


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """One host alone.

    Attributes:
        layers: of each repeat, a layer's phases in milliseconds, "layer" the whole.
        questions: the same of the question's pass, without messages.
        logits_ms: the last norm and the output embedding.
        sent: what a layer of the prefill sends, and what one of the question's pass.
        peak_bytes: with one layer's cache, beyond the weights.
        queued_ms: what Python takes to queue a layer of the prefill.
        density: a note on what the method attends to, if its text decides.
    """

    layers: list[dict[str, float]]
    questions: list[dict[str, float]]
    logits_ms: float
    sent: tuple[Counters, Counters]
    peak_bytes: int
    queued_ms: float
    density: str


def run_one(case: Case, *, repeats: int, link: Link, on_progress: Callable[[str], None]) -> PrefillRow:
    """Time every host of a case on one device and put them together; `load` is each host's layer.

    Args:
        case: what to run.
        repeats: layers to time on each host at least, ≥ 1; others warm up.
        link: what messages cost.
        on_progress: told which host's turn it is.

    Raises:
        ValueError: the method cannot run with these numbers.
        torch.OutOfMemoryError: a host's share of one layer does not fit.
    """
    decoder = Decoder(case.shape, case.device, case.dtype)
    method = case.method.prepare(case.shape, case.device, case.dtype)
    hosts = []
    for rank in range(case.hosts):
        on_progress(f"rank {rank} of {case.hosts}")
        hosts.append(_time_host(case, decoder, method, rank, repeats))
    columns = _put_together(case, hosts, link)
    slowest = max(hosts, key=lambda host: _middle(host.layers)["layer"])
    notes = [
        f"{len(slowest.layers)} repeats",
        slowest.density,
        case.wait_note(slowest.queued_ms, _middle(slowest.layers)["layer"]),
        _link_note(case, link),
        _room_note(columns["peak_gbytes"], case.device),
    ]
    return replace(case.row("simulated", notes=", ".join(filter(None, notes))), **columns)


def _time_host(case: Case, decoder: Decoder, method: Method, rank: int, repeats: int) -> _Timed:
    """Run one host's share, a layer after the other, and the question's pass."""
    host, memory = LoneHost(rank, case.hosts, case.device), PeakMemory(case.device)
    share = Share(decoder, method, case.plan, host, caches=1)
    counted = Trace(counted=True)
    share.prefill([counted]).check()
    sent = [host.counters.copy()]
    share.ask([Trace()])
    sent.append(host.counters.since(sent[0]))
    layers, queued_ms = _time_layers(share.prefill, case.device, repeats, _ENOUGH_S)
    questions, _ = _time_layers(share.ask, case.device, repeats, _ENOUGH_ASKED_S)
    last = Trace(timed=True, device=case.device)
    queue_ahead(case.device)
    with last.phase("logits"):
        share.ask([])
    return _Timed(
        layers=layers,
        questions=questions,
        logits_ms=last.phase_ms["logits"],
        sent=(sent[0], sent[1]),
        peak_bytes=max(0, memory.bytes - host.noise_bytes),
        queued_ms=queued_ms,
        density=case.density_note(counted),
    )


def _time_layers(
    run: Callable[[list[Trace]], object], device: torch.device, repeats: int, enough_s: float
) -> tuple[list[dict[str, float]], float]:
    """Return the phases of single layers, and what Python takes to queue one.

    On a GPU, `enough_s` of layers, or `repeats` of them, after half as long a warm-up. If Python takes more than half
    as long as the device, that waits before each layer, so that all of it is queued when it begins.
    """
    queued_ms = math.inf

    def once(ahead_ms: float = 0.0) -> Trace:
        nonlocal queued_ms
        trace = Trace(timed=True, device=device)
        if ahead_ms:
            queue_ahead(device, ahead_ms)
        began = time.perf_counter()
        run([trace])
        queued_ms = min(queued_ms, 1e3 * (time.perf_counter() - began))
        return trace

    ahead_ms = 0.0
    if device.type == "cuda":
        until, layer_ms = time.perf_counter() + enough_s / 2, once().phase_ms.get("layer", math.inf)
        while math.isfinite(layer_ms) and time.perf_counter() < until:  # it is not, where the question has run along
            layer_ms = min(layer_ms, once().phase_ms["layer"])
        repeats = max(repeats, min(_MOST, math.ceil(1e3 * enough_s / layer_ms)))
        ahead_ms = 2 * queued_ms if queued_ms > 0.5 * layer_ms else 0.0
        queue_ahead(device)
    traces = [once(ahead_ms) for _ in range(repeats)]
    return [trace.phase_ms for trace in traces], queued_ms


def _put_together(case: Case, hosts: list[_Timed], link: Link) -> dict[str, Any]:
    """Return the row's columns from what each host took alone."""
    layers = [_middle(host.layers) for host in hosts]
    slowest = max(layers, key=lambda phases: phases["layer"])
    messages = max(_messages_ms(host.sent[0], link) for host in hosts)
    if case.method.sends_under_attention:
        messages = max(0.0, messages - sum(slowest.get(name, 0.0) for name in ("attend", "merge")))
    columns = phase_columns(slowest, slowest["layer"] + messages, messages)
    question = max(_middle(host.questions).get("layer", 0.0) for host in hosts)
    question += max(_messages_ms(host.sent[1], link) for host in hosts)
    asked = any(phases for host in hosts for phases in host.questions)  # else it has run along with the prefill
    query_ms = case.shape.layers * question * asked + max(host.logits_ms for host in hosts)

    def total(pick: Callable[..., float]) -> float:
        layer = max(pick(phases["layer"] for phases in host.layers) for host in hosts)
        return case.shape.layers * (layer + messages) + query_ms

    kept = [cache_bytes(case.plan, rank, case.shape) for rank in range(case.hosts)]
    more = [host.peak_bytes + (case.shape.layers - 1) * cache for host, cache in zip(hosts, kept, strict=True)]
    return {
        **columns,
        "query_ms": query_ms,
        "ttft_ms": case.shape.layers * columns["layer_ms"] + query_ms,
        "low_ms": total(min),
        "high_ms": total(max),
        "peak_gbytes": (weight_bytes(case.method, case.shape) + max(more)) / 1e9,
        "load": " ".join(f"{phases['layer']:.4g}" for phases in layers),
    }


def _link_note(case: Case, link: Link) -> str:
    """Say what messages were charged."""
    if case.hosts == 1:
        return ""
    return f"{link.note}{', sends under the attention' * case.method.sends_under_attention}"


def _room_note(peak_gbytes: float, device: torch.device) -> str:
    """Say so if all layers together would not fit on the device."""
    if device.type != "cuda":
        return ""
    room = torch.cuda.get_device_properties(device).total_memory / 1e9
    return f"needs more than the device's {room:.0f} GB" if peak_gbytes > room else ""


def _messages_ms(counted: Counters, link: Link) -> float:
    """Price a host's messages; it receives as much as it sends."""
    return link.ms(sum(counted.messages.values()), sum(counted.sent_bytes.values()))


def _middle(repeats: list[dict[str, float]]) -> dict[str, float]:
    """Return the phases of the repeat whose layer took the median time, so that they belong together."""
    ordered = sorted(repeats, key=lambda phases: phases.get("layer", 0.0))
    return ordered[len(ordered) // 2]
