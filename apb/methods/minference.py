"""MInference (arXiv 2407.02490): one host; each head attends to the few tiles and columns that its pattern lists."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from apb.attend import AShape, Pattern, SparseIndex, VerticalSlash, sparse_attention
from apb.attend.sparse_index import TILE, join_heads
from apb.context import Context
from apb.costs import HostCost, ModelShape, host_cost
from apb.methods.method import Method, check_count
from apb.plan import ContextPlan, plan_context

__all__ = ["MInference"]


@dataclass(frozen=True, kw_only=True)
class MInference(Method):
    """Sparse prefill on one host; decoding is dense.

    What a document takes is known once its lists are made, and `Trace.pairs` counts it; `cost` says the most it can be.

    Attributes:
        pattern: one for all heads, or `[layer][query head]`; the default is what MInference ships for Llama-3.1-8B.
        dense_below: shorter documents are attended to exactly: there, choosing costs more than it saves.
    """

    one_host: ClassVar[bool] = True
    pattern: Pattern | tuple[tuple[Pattern, ...], ...] = field(
        default_factory=lambda: VerticalSlash(vertical=512, slash=2048)
    )
    dense_below: int = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("dense_below", self.dense_below)
        layers = self.pattern if isinstance(self.pattern, tuple) else ((self.pattern,),)
        if not all(isinstance(heads, tuple) and all(isinstance(p, Pattern) for p in heads) for heads in layers):
            raise ValueError(
                f"pattern: expected a Pattern such as VerticalSlash(), or one for each layer and query head as a tuple "
                f"of tuples, got {self.pattern!r}"
            )

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Give all tokens to the one host.

        Raises:
            ValueError: `hosts` is not 1.
        """
        if hosts != 1:
            raise ValueError(f"hosts: MInference runs on one host, got {hosts}; use APB to split the document")
        return plan_context(tokens=tokens, hosts=1, query=query, query_in="after")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """List what each head attends to, and attend; with `trace.keep_indices`, `trace.indices[layer]` is the list.

        Raises:
            ValueError: the rows are not the plan's, or there is no pattern for this layer and these heads.
        """
        self.share(q, k, v, context)
        if q.shape[2] < self.dense_below:
            return self.masked(q, k, v, context)[0]
        with context.trace.phase("index"):
            index = self._index(q, k, context)
        with context.trace.phase("attend"):
            out, _ = sparse_attention(q, k, v, index, scale=context.scale, backend=self.dense_backend)
        if context.trace.counted:
            context.trace.count_pairs(context.layer, index.pairs().sum() // max(1, q.shape[0]))
        if context.trace.keeps(context.layer):
            context.trace.indices[context.layer] = index
        return out

    def mask(self, plan: ContextPlan, rows: Tensor, kept: Mapping[int, Tensor], index: Any = None) -> Tensor:
        """Say what the first head's list lets each row see; without a list the attention was exact."""
        if index is None:
            return torch.arange(plan.tokens) <= rows[:, None]
        first = index.head(0, 0)
        return torch.cat([first.mask(row // TILE * TILE, row + 1)[0, 0, -1:] for row in rows.tolist()])

    def cost(self, plan: ContextPlan, rank: int, shape: ModelShape) -> HostCost:
        """Count what the lists of an A-shape hold; other lists depend on the text, and take at most all pairs."""
        if plan.tokens < self.dense_below or not isinstance(self.pattern, AShape):
            return super().cost(plan, rank, shape)
        one = torch.empty(1, 1, plan.tokens, 0)
        pairs = shape.heads * int(self.pattern.index(one, one).pairs())
        return host_cost(plan, rank, shape, pairs=pairs)

    def _index(self, q: Tensor, k: Tensor, context: Context) -> SparseIndex:
        """Ask every head's pattern; heads with the same pattern are asked together."""
        if isinstance(self.pattern, Pattern):
            return self.pattern.index(q, k, context.scale)
        shared = q.shape[1] // k.shape[1]
        groups, parts = self._groups(q.shape[1], context.layer), []
        if len(groups) == 1:
            return next(iter(groups)).index(q, k, context.scale)
        for pattern, heads in groups.items():
            read = [head // shared for head in heads]  # any heads may share a pattern: their keys are copied to ask
            parts.append((heads, pattern.index(q[:, heads], k[:, read], context.scale)))
        return join_heads(parts)

    def _groups(self, q_heads: int, layer: int) -> dict[Pattern, list[int]]:
        """Return the heads of a layer by pattern."""
        assert isinstance(self.pattern, tuple)
        if layer >= len(self.pattern) or len(self.pattern[layer]) != q_heads:
            sizes = [len(heads) for heads in self.pattern]
            raise ValueError(f"pattern: layer {layer} has {q_heads} query heads; patterns are given for {sizes}")
        groups: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(self.pattern[layer]):
            groups.setdefault(pattern, []).append(head)
        return groups
