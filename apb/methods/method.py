"""What every method is: a way to plan and a way to attend. What the methods share lives here, once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apb.attend import Backend, decode_attention, masked_attention
from apb.attend.check import check_inputs
from apb.blocks import HostPlan
from apb.compress.compressor import Need
from apb.context import Context
from apb.costs import HostCost, ModelShape, host_cost
from apb.parallel.decode import start_attend_over_hosts
from apb.plan import ContextPlan

__all__ = ["Method", "check_choice", "check_count"]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_count(name: str, value: int | None) -> None:
    """Raise unless `value` is None or an integer ≥ 0."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ValueError(f"{name}: expected an integer ≥ 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to split a document over hosts and to attend to it.

    A method says `plan` and `attend`; it may say better than the defaults what it costs, what it reads, and how later
    rows attend to what the prefill left.

    Attributes:
        exact: whether it equals exact attention.
        one_host: whether it runs on one host only.
        differentiable: backends whose gradients it keeps.
        backend: who computes the attention; where "flex" or "hopper" has no answer (decoding, lists of tiles), "auto"
            gives it.
    """

    exact: ClassVar[bool] = False
    one_host: ClassVar[bool] = False
    differentiable: ClassVar[tuple[Backend, ...]] = ("reference", "flex")
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_choice("backend", self.backend, get_args(Backend))

    @property
    def needs(self) -> frozenset[Need]:
        """What `attend` reads from the context beside q, k and v."""
        return frozenset()

    @property
    def sends_under_attention(self) -> bool:
        """Whether its messages travel while hosts attend: they take time of their own only where they outlast that."""
        return False

    @property
    def dense_backend(self) -> Backend:
        """Who computes what "flex" and "hopper" have no answer for: rectangles, decoding, and lists of tiles."""
        return "auto" if self.backend in ("flex", "hopper") else self.backend

    def prepare(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> "Method":
        """Return the method ready for a model: weights of its own are checked and moved.

        Raises:
            ValueError: weights that were made for another model.
        """
        return self

    @abstractmethod
    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Split `tokens` document tokens over `hosts` hosts.

        Args:
            tokens: n ≥ 1, document tokens.
            hosts: H ≥ 1.
            query: l_q ≥ 0, tokens of the question.
            query_offset: s, the document's first tokens (BOS, system prompt) that precede everything else.

        Raises:
            ValueError: naming the argument, what came, what was expected and the way out.
        """

    @abstractmethod
    def attend(
        self,
        q: Float[Tensor, "batch q_heads rows dim"],
        k: Float[Tensor, "batch kv_heads rows dim"],
        v: Float[Tensor, "batch kv_heads rows dim"],
        context: Context,
    ) -> Float[Tensor, "batch q_heads rows dim"]:
        """Run one layer's attention on this host's rows, as many as the plan gives it, after RoPE at its positions.

        Raises:
            ValueError: the rows are not the plan's.
            HostFailed: another host failed.
        """

    def decode(
        self,
        q: Float[Tensor, "batch q_heads rows dim"],
        k: Float[Tensor, "batch kv_heads held dim"],
        v: Float[Tensor, "batch kv_heads held dim"],
        context: Context,
    ) -> Float[Tensor, "batch q_heads rows dim"]:
        """Let new rows, the same on every host, attend to all hosts' caches: exact, whatever the prefill was.

        Args:
            q: the question's rows, or a new token's.
            k, v: this host's cache, in the order of `HostPlan.held_tokens`; on the owner, followed by all new rows.
            context: the plan, the host and the layer.

        Raises:
            HostFailed: another host failed.
        """
        started = start_attend_over_hosts(
            q, k, v, context.host, owner=context.plan.owner, scale=context.scale, backend=self.dense_backend
        )
        return started.wait()

    def cost(self, plan: ContextPlan, rank: int, shape: ModelShape) -> HostCost:
        """Return what one layer of the prefill costs host `rank`."""
        return host_cost(plan, rank, shape)

    def mask(
        self, plan: ContextPlan, rows: Int[Tensor, " rows"], kept: Mapping[int, Tensor], index: Any = None
    ) -> Bool[Tensor, "rows tokens"]:
        """Say which document tokens each of the document's `rows` attends to in the prefill, for pictures.

        Args:
            plan: made by this method.
            rows: document positions.
            kept: per block, the document positions `[kept]` that it passed on (of one layer and head).
            index: what `Trace.indices` holds of that layer.
        """
        column = torch.arange(plan.tokens)
        seen = (column < plan.anchor).repeat(len(rows), 1)  # the anchor's own rows, if they are a shared prefix
        passed = torch.zeros(plan.tokens, dtype=torch.bool)
        for block in plan.blocks:
            mine = (block.start <= rows) & (rows < block.stop)
            seen[mine] = passed | (column >= block.start) | (block.sees_anchor & (column < plan.anchor))
            passed[kept.get(block.index, [])] = True
        return (seen | self.exact) & (column <= rows[:, None])

    def masked(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, *, anchor_tokens: int = 0, passing_tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Call `masked_attention` — plain causal without anchor and passing tokens — and note time and pairs."""
        with context.trace.phase("attend"):
            out, lse = masked_attention(
                q,
                k,
                v,
                anchor_tokens=anchor_tokens,
                passing_tokens=passing_tokens,
                scale=context.scale,
                backend=self.backend,
            )
        rows, columns = q.shape[2], k.shape[2]
        anchor_rows = max(0, rows - (columns - anchor_tokens - passing_tokens))
        pairs = rows * (columns - rows) + rows * (rows + 1) // 2 - anchor_rows * passing_tokens
        context.trace.count_pairs(context.layer, q.shape[1] * pairs)
        return out, lse

    def full(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Let every row see every key, and note time and pairs."""
        with context.trace.phase("attend"):
            out, lse = decode_attention(q, k, v, causal=False, scale=context.scale, backend=self.dense_backend)
        context.trace.count_pairs(context.layer, q.shape[1] * q.shape[2] * k.shape[2])
        return out, lse

    def share(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> HostPlan:
        """Return this host's share of the plan, after checking that plan, group and rows belong together."""
        plan = context.plan
        plan.check_group(context.host.world_size)
        self.check_plan(plan)
        share = plan.host(context.host.rank)
        if all(x.ndim == 4 for x in (q, k, v)) and (q.shape[2], k.shape[2], v.shape[2]) != (share.rows,) * 3:
            raise ValueError(
                f"q, k, v: {q.shape[2]}, {k.shape[2]} and {v.shape[2]} rows, expected {share.rows}, the plan's rows of "
                f"rank {share.rank}"
            )
        legal = get_args(Backend)[1:]
        check_inputs(q, k, v, context.scale, self.backend, legal, differentiable=self.differentiable)
        return share

    def check_plan(self, plan: ContextPlan) -> None:
        """Raise unless `plan` is of the kind that this method makes: another's rows would be attended to wrongly."""
        own = _own_plan(self, plan.tokens, plan.hosts, plan.query)
        for name in ("layout", "shared_prefix", "reuse_positions", "split_anchor", "split_anchor_cache"):
            if getattr(own, name) != getattr(plan, name):
                raise ValueError(
                    f"plan: {type(self).__name__} takes {name}={getattr(own, name)!r}, got {getattr(plan, name)!r}; "
                    f"make the plan with this method's plan(…)"
                )
        asks = plan.query > 0 and (plan.query_in == "prefill" or plan.anchor_rows > plan.anchor)
        if asks or (self.exact and plan.anchor):
            raise ValueError(
                f"plan: {type(self).__name__} takes {'no anchor and ' * self.exact}no query in the prefill, got an "
                f"anchor of {plan.anchor} and query_in={plan.query_in!r}; make the plan with this method's plan(…)"
            )


@lru_cache(maxsize=64)
def _own_plan(method: Method, tokens: int, hosts: int, query: int) -> ContextPlan:
    """Return a method's own plan; every layer asks for it."""
    return method.plan(tokens=tokens, hosts=hosts, query=query)
