"""What came of an answer, as one host saw it: its tokens, and what they took."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apb.attend.sparse_index import SparseIndex
from apb.costs import HostCost
from apb.parallel.host import Counters
from apb.plan import ContextPlan

__all__ = ["Generation"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one host saw of an answer; `tokens` are the same on every host.

    The prefill's figures belong to the first answer; of a further question on the same prefill there are none.

    Attributes:
        tokens: `[batch, new]`; a row that has ended repeats its last token.
        lengths: how many tokens each row has until it ended, its stop token among them.
        sound: whether the caches are what a prefill for this very question makes. If not, they were made for the
            first question, and the answer is an approximation beyond the method's own.
        plan: how the document was split.
        cost: what the plan says one layer costs this host.
        counters: what this host sent for this answer.
        prefill_bytes: of that, the bytes it sent in the prefill.
        logits: `[batch, vocab]`, after the question: what the first new token is chosen by.
        pairs: query–key pairs that this host scored in each layer of the prefill, summed over the query heads.
        phase_ms: time by phase; "prefill" contains "compress", "pass" and "attend".
        peak_bytes: most memory in use beyond what was when the work began, as `PeakMemory` counts it.
        kept: per (layer, block) of this host, the kept document positions.
        indices: per layer, the sparse index of a method that builds one.
    """

    tokens: Int[Tensor, "batch new"]
    lengths: list[int]
    sound: bool
    plan: ContextPlan
    cost: HostCost
    counters: Counters
    prefill_bytes: int
    logits: Float[Tensor, "batch vocab"] = field(repr=False)
    pairs: dict[int, int]
    phase_ms: dict[str, float]
    peak_bytes: int
    kept: dict[tuple[int, int], Tensor] = field(repr=False)
    indices: dict[int, SparseIndex] = field(repr=False)

    def to(self, device: torch.device | str) -> "Generation":
        """Return the same with its tensors on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            logits=self.logits.to(device),
            kept={key: kept.to(device) for key, kept in self.kept.items()},
            indices={layer: index.to(device) for layer, index in self.indices.items()},
        )

    def row(self, i: int) -> "Generation":
        """Return the answer of batch entry `i`, without what others took longer; the figures are the whole batch's."""
        return replace(
            self,
            tokens=self.tokens[i : i + 1, : self.lengths[i]],
            lengths=[self.lengths[i]],
            logits=self.logits[i : i + 1],
            kept={key: kept[i : i + 1] for key, kept in self.kept.items()},
            indices={layer: index.entry(i) for layer, index in self.indices.items()},
        )
