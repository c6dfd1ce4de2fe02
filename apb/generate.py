"""The walk of one question: agree on a plan, prefill, ask, decode greedily. The same code on every host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apb.context import Trace
from apb.costs import HostCost
from apb.hf import model_shape
from apb.memory import PeakMemory
from apb.methods import Method
from apb.parallel.host import Counters, Host
from apb.plan import ContextPlan
from apb.prompt import Prompt
from apb.session import Session

__all__ = ["Generation", "generate"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one host saw of a generation; `tokens` are the same on every host.

    Attributes:
        tokens: `[batch, new]`, chosen greedily; after a stop token a row repeats it.
        plan: how the document was split.
        cost: what the plan says one layer costs this host.
        counters: what this host sent in this generation.
        prefill_bytes: of that, the bytes it sent in the prefill.
        logits: `[batch, vocab]`, after the question: what the first new token is chosen by.
        pairs: query–key pairs that this host scored in each layer of the prefill, summed over the query heads.
        phase_ms: time by phase; "prefill" contains "compress", "pass" and "attend".
        peak_bytes: most memory in use beyond what was when the generation began, as `PeakMemory` counts it.
        kept: per (layer, block) of this host, the kept document positions.
        indices: per layer, the sparse index of a method that builds one.
    """

    tokens: Int[Tensor, "batch new"]
    plan: ContextPlan
    cost: HostCost
    counters: Counters
    prefill_bytes: int
    logits: Float[Tensor, "batch vocab"] = field(repr=False)
    pairs: dict[int, int]
    phase_ms: dict[str, float]
    peak_bytes: int
    kept: dict[tuple[int, int], Tensor] = field(repr=False)
    indices: dict[int, Any] = field(repr=False)

    def to(self, device: torch.device | str) -> "Generation":
        """Return the same with its tensors on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            logits=self.logits.to(device),
            kept={key: kept.to(device) for key, kept in self.kept.items()},
            indices={layer: index.to(device) for layer, index in self.indices.items()},
        )


def generate(
    model: Any,
    method: Method,
    host: Host,
    prompt: Prompt,
    *,
    max_new_tokens: int = 32,
    stop_tokens: Sequence[int] = (),
    on_token: Callable[[int, Tensor], None] | None = None,
    on_phase: Callable[[str, int, int], None] | None = None,
    timed: bool = True,
    keep_indices: bool = False,
    keep_layer: int | None = None,
) -> Generation:
    """Answer greedily: prefill the document over all hosts, then the question and each new token against all caches.

    Args:
        model: a transformers causal language model, on this host's device.
        method: how to attend to the document.
        host: this member of the group; every host calls with the same arguments.
        prompt: the same on every host.
        max_new_tokens: most tokens to generate, ≥ 1.
        stop_tokens: a row ends at the first of these.
        on_token: called with (number, `[batch]` ids) of each new token.
        on_phase: called with (phase, 0, 0) as each phase starts, and with ("prefill", done, total) after each layer.
        timed: measure the phases.
        keep_indices: note in `kept` and `indices` what each layer chose.
        keep_layer: note it of this layer only.

    Raises:
        ValueError: an argument out of range, or a plan that is not possible.
        PlanMismatch: the hosts came with different prompts, methods or models.
        HostFailed: another host failed.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    for name in ("document", "query"):
        if getattr(prompt, name).shape[-1] == 0:
            raise ValueError(f"{name}: it is empty; expected at least 1 token")
    device = host.device
    trace = Trace(timed=timed, keep_indices=keep_indices, keep_layer=keep_layer, counted=True, device=device)
    started = on_phase or (lambda name, done, total: None)
    before = host.counters.copy()

    started("plan", 0, 0)
    with trace.phase("plan"), host.together("plan"):
        shape = replace(model_shape(model.config), bytes_per_value=model.dtype.itemsize)
        plan = method.plan(
            tokens=prompt.document.shape[-1],
            hosts=host.world_size,
            query=prompt.query.shape[-1],
            query_offset=prompt.prefix_tokens,
        )
    host.agree((plan, method, shape, _digest(prompt), max_new_tokens), what="plan")

    memory = PeakMemory(device)
    session = Session(model, method, plan, host, trace=trace, on_layer=partial(started, "prefill"))
    started("prefill", 0, 0)
    with trace.phase("prefill"):
        hidden = session.prefill(prompt.document, prompt.query)
    prefill_bytes = sum(host.counters.since(before).sent_bytes.values())
    started("query", 0, 0)
    with trace.phase("query"):
        if plan.host(host.rank).query_rows:  # it has run along with the prefill
            logits = session.extend(prompt.suffix) if prompt.suffix.shape[-1] else session.logits(hidden[:, -1])
        else:
            logits = session.extend(torch.cat((prompt.query, prompt.suffix), dim=-1))
    started("decode", 0, 0)
    with trace.phase("decode"):
        tokens = _decode(session, logits, max_new_tokens, stop_tokens, on_token)
    return Generation(
        tokens=tokens,
        plan=plan,
        cost=method.cost(plan, host.rank, shape),
        counters=host.counters.since(before),
        prefill_bytes=prefill_bytes,
        logits=logits,
        pairs=trace.pairs,
        phase_ms=trace.phase_ms,
        peak_bytes=memory.bytes,
        kept=trace.kept,
        indices=trace.indices,
    )


def _decode(
    session: Session,
    logits: Tensor,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    on_token: Callable[[int, Tensor], None] | None,
) -> Tensor:
    host, plan = session.host, session.plan
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=logits.device)
    chosen: list[Tensor] = []
    stopped = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    while True:
        token = logits.argmax(dim=-1)
        if chosen:
            token = torch.where(stopped, chosen[-1], token)
        # Unlike machines may round a tie apart, so the owner's choice holds for all.
        token = host.all_gather(token, what="token").wait()[plan.owner]
        chosen.append(token)
        stopped = stopped | torch.isin(token, stops)
        if on_token:
            on_token(len(chosen) - 1, token)
        if len(chosen) == max_new_tokens or bool(stopped.all()):
            return torch.stack(chosen, dim=-1)
        logits = session.extend(token[:, None])


def _digest(prompt: Prompt) -> str:
    text = repr([ids.tolist() for ids in (prompt.document, prompt.query, prompt.suffix)])
    return sha256(text.encode()).hexdigest()[:16]
