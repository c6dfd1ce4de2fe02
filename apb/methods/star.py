"""Star Attention (arXiv 2411.17116): every block attends to the document's start and to itself. No communication."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apb.attend.check import DIFFERENTIABLE, Backend
from apb.context import Context
from apb.methods.method import Method, check_count
from apb.plan import ContextPlan, plan_context

__all__ = ["Star"]


@dataclass(frozen=True, kw_only=True)
class Star(Method):
    """Each host but the first runs [first l_a tokens, block] under a plain causal mask, at true positions.

    The anchor's keys are dropped after the prefill; the question then attends to all blocks exactly. It is APB with
    nothing passed and no question in the anchor.

    Attributes:
        anchor: l_a ≥ 0, document tokens in the anchor, at most a block; None is a whole block, the paper's setting.
    """

    differentiable: ClassVar[tuple[Backend, ...]] = DIFFERENTIABLE

    anchor: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("anchor", self.anchor)

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Cut one block a host, each but the first behind the anchor; arguments and errors as `Method.plan`."""
        anchor = -(-tokens // max(1, hosts)) if self.anchor is None else self.anchor
        return plan_context(tokens=tokens, hosts=hosts, anchor=anchor, query=query, query_in="after")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend causally over this host's rows [anchor, block]."""
        self.share(q, k, v, context)
        return self.masked(q, k, v, context)[0]
