"""FlashAttention: one host, exact causal attention. What every other method is measured against."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from apb.attend import Backend, masked_attention
from apb.compress.compressor import Need
from apb.context import Context
from apb.plan import ContextPlan, plan_context

__all__ = ["Flash"]


@dataclass(frozen=True, kw_only=True)
class Flash:
    """Exact attention on one host.

    Attributes:
        backend: who computes the attention.
    """

    backend: Backend = "auto"

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing beside q, k and v."""
        return frozenset()

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Give all tokens to the one host.

        Raises:
            ValueError: `hosts` is not 1.
        """
        if hosts != 1:
            raise ValueError(f"hosts: flash attention runs on one host, got {hosts}; use APB to split the document")
        return plan_context(tokens=tokens, hosts=1, query=query)

    def attend(
        self,
        q: Float[Tensor, "batch q_heads rows dim"],
        k: Float[Tensor, "batch kv_heads rows dim"],
        v: Float[Tensor, "batch kv_heads rows dim"],
        context: Context,
    ) -> Float[Tensor, "batch q_heads rows dim"]:
        """Attend causally to the whole document."""
        with context.trace.phase("attend"):
            out, _ = masked_attention(
                q, k, v, anchor_tokens=0, passing_tokens=0, scale=context.scale, backend=self.backend
            )
        return out
