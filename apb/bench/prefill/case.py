"""What all three modes have in common: a method at a length, and the row that tells of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from apb.bench import environment
from apb.bench.prefill.memory import host_peak_bytes
from apb.bench.prefill.methods import QUERY_TOKENS
from apb.bench.prefill.record import Mode, PrefillRow
from apb.bench.prefill.shapes import DecoderShape
from apb.bench.prefill.store import Key
from apb.context import Trace
from apb.costs import HostCost
from apb.methods import Method, MInference
from apb.plan import ContextPlan

__all__ = ["Case", "phase_columns"]

_ATTENTION = ("attend", "merge", "index")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method at one length.

    Attributes:
        shape: of the model, with the precision's `bytes_per_value`.
        tokens: n, document tokens.
        hosts: H.
        label: the method's name in the row.
        method: not yet prepared.
        backend: who computes its attention, for the row.
        link: what its messages are charged, for the row.
        device: where the hosts compute: "cuda" is a GPU for each if measured, and the first one if simulated.
        dtype: of weights and activations.
    """

    shape: DecoderShape
    tokens: int
    hosts: int
    label: str
    method: Method
    device: torch.device
    dtype: torch.dtype
    backend: str = ""
    link: str = ""

    @cached_property
    def plan(self) -> ContextPlan:
        """How the document is split.

        Raises:
            ValueError: the method has no plan for these numbers.
        """
        return self.method.plan(tokens=self.tokens, hosts=self.hosts, query=QUERY_TOKENS)

    @cached_property
    def costs(self) -> list[HostCost]:
        """What one layer costs each host."""
        return [self.method.cost(self.plan, rank, self.shape) for rank in range(self.hosts)]

    def key(self, mode: Mode, device: str) -> Key:
        """Return what the row will be known by, on a device of that name."""
        return Key(
            mode=mode,
            shape=self.shape.name,
            tokens=self.tokens,
            hosts=self.hosts,
            method=self.label,
            device=device,
            backend=self.backend,
            dtype=self._precision,
            link=self.link,
        )

    @property
    def _precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def budgets(self) -> str:
        """Lengths of the plan, for the row's notes."""
        plan = self.plan
        return f"anchor {plan.anchor}, passing {plan.passing}, query {plan.query} {plan.query_in}"

    def density_note(self, trace: Trace) -> str:
        """Say of MInference, whose lists follow from the text, which share of the pairs it took in a counted layer."""
        if not isinstance(self.method, MInference):
            return ""
        pairs = self.shape.heads * self.tokens * (self.tokens + 1) // 2
        return f"density {sum(trace.pairs.values()) / pairs:.2f}"

    def wait_note(self, queued_ms: float, layer_ms: float) -> str:
        """Say so if Python takes about as long to queue a layer as a GPU takes to run it, or longer."""
        late = self.device.type == "cuda" and queued_ms > 0.8 * layer_ms
        return f"waits for Python: {queued_ms:.3g} ms a layer" if late else ""

    def blank(self, mode: Mode, notes: str = "") -> PrefillRow:
        """Return a row that says what was to be measured, and nothing of it."""
        return PrefillRow(
            **environment(self.device),
            mode=mode,
            shape=self.shape.name,
            tokens=self.tokens,
            hosts=self.hosts,
            method=self.label,
            backend=self.backend,
            dtype=self._precision,
            link=self.link,
            notes=notes,
        )

    def row(self, mode: Mode, notes: str = "") -> PrefillRow:
        """Return a row with what follows from the plan: operations, bytes, and the formula of the memory."""
        peak = max(host_peak_bytes(self.method, self.plan, rank, self.shape) for rank in range(self.hosts))
        return replace(
            self.blank(mode, notes=", ".join(filter(None, (self.budgets, notes)))),
            formula_gbytes=peak / 1e9,
            tflop=max(cost.flops for cost in self.costs) / 1e12,
            sent_mbytes=max(cost.sent_bytes for cost in self.costs) / 1e6,
        )


def phase_columns(phase_ms: Mapping[str, float], layer_ms: float, messages_ms: float = 0.0) -> dict[str, float]:
    """Sort a layer's phases, as `Trace` calls them, into the row's columns; "other" is what they leave.

    Args:
        phase_ms: of one layer.
        layer_ms: the layer, messages included.
        messages_ms: what messages add to the phase "pass".
    """
    columns = {name: phase_ms.get(name, 0.0) for name in ("qkv", "compress", "o", "ffn")}
    columns["communicate"] = phase_ms.get("pass", 0.0) + messages_ms
    columns["attention"] = sum(phase_ms.get(name, 0.0) for name in _ATTENTION)
    columns["other"] = layer_ms - sum(columns.values())
    return {"layer_ms": layer_ms, **{f"{name}_ms": ms for name, ms in columns.items()}}
