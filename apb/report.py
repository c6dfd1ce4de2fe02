"""What a job reports: the answer, and what each host held, computed, sent and spent for it."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from apb.costs import HostCost
from apb.generation import Generation
from apb.parallel import Host
from apb.plan import ContextPlan

__all__ = ["HostReport", "Report", "gather_reports", "report_host"]


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

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "HostReport":
        """Make the report again of what `asdict` made of it, also after a way through JSON."""
        fields: dict[str, Any] = dict(plain)
        fields["cost"] = HostCost(**plain["cost"])
        fields["kept"] = [(block, where) for block, where in plain["kept"]]
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The answer and how it came about; `hosts` in rank order, `generation` as rank 0 saw it.

    Documents that were answered as one batch share its figures. A further question on the same prefill has only its
    own. `sound` is as in `Generation`: False if the caches were made for another question.
    """

    query: str
    answer: str
    tokens: list[int]
    sound: bool
    further: bool
    """Whether it was asked on the prefill of the question before it."""
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


def report_host(host: Host, model: Any, generation: Generation) -> HostReport:
    """Say what this host did for an answer of one row."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    pairs, n = sum(generation.pairs.values()) / layers, generation.plan.tokens
    return HostReport(
        rank=host.rank,
        device=torch.cuda.get_device_name(host.device) if host.device.type == "cuda" else "CPU",
        cost=generation.cost,
        pairs=pairs,
        of_exact=pairs / (heads * n * (n + 1) / 2),
        sent_bytes=dict(generation.counters.sent_bytes),
        prefill_bytes=generation.prefill_bytes,
        messages=dict(generation.counters.messages),
        phase_ms=generation.phase_ms,
        peak_bytes=generation.peak_bytes,
        kept=[(block, where[0, 0].tolist()) for (_, block), where in generation.kept.items()],
    )


def gather_reports(host: Host, mine: list[HostReport]) -> list[list[HostReport]]:
    """Bring every rank's reports together, as plain data: in rank order, one for each answer."""
    gathered = host.all_gather_object([asdict(report) for report in mine], what="report")
    return [[HostReport.from_dict(plain) for plain in theirs] for theirs in gathered]
