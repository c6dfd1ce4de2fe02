"""FlashAttention: one host, exact causal attention. What every other method is measured against."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from apb.attend.check import DIFFERENTIABLE, Backend
from apb.context import Context
from apb.methods.method import Method
from apb.plan import ContextPlan, plan_context

__all__ = ["Flash"]


@dataclass(frozen=True, kw_only=True)
class Flash(Method):
    """Exact attention on one host: n(n + 1)/2 pairs."""

    exact: ClassVar[bool] = True
    one_host: ClassVar[bool] = True
    differentiable: ClassVar[tuple[Backend, ...]] = DIFFERENTIABLE

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Give all tokens to the one host.

        Raises:
            ValueError: `hosts` is not 1.
        """
        if hosts != 1:
            raise ValueError(f"hosts: flash attention runs on one host, got {hosts}; use Ring to split the document")
        return plan_context(tokens=tokens, hosts=1, query=query, query_in="after")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend causally to the whole document."""
        self.share(q, k, v, context)
        return self.masked(q, k, v, context)[0]
