"""APE (arXiv 2502.05431): chunks encoded alone behind a shared prefix, at the same positions, and mixed when asked.

A question sees all chunks at once, sharper (temperature T) and with their common weight turned down (scale S):

    context   l_c = log Σ exp(s_c / T),  o_c = softmax(s_c / T) · v_c     over all chunks' keys
    other     l_o = log Σ exp(s_o),      o_o = softmax(s_o) · v_o         over the prefix, the question, new tokens
    out       softmax([S · T · l_c, l_o]) · [o_c, o_o]

With T = S = 1 that is plain attention over all keys at their reused positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attend import decode_attention
from apb.context import Context
from apb.merge import merge, merge_pair
from apb.methods.method import Method, check_count
from apb.parallel.decode import refuse_gradient
from apb.plan import ContextPlan, plan_context

__all__ = ["APE"]


@dataclass(frozen=True, kw_only=True)
class APE(Method):
    """Each host runs [prefix, chunk] under a plain causal mask; every chunk begins where the prefix ends.

    The owner keeps the prefix's keys. Nothing is sent in the prefill.

    Attributes:
        prefix: p ≥ 0, document tokens before the chunks; None is the prefix that precedes everything (BOS, system
            prompt), `query_offset` of the plan.
        temperature: T > 0, of the chunks' softmax.
        scale: S > 0, the chunks' weight: the power of their softmax's sum is S · T.
    """

    prefix: int | None = None
    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("prefix", self.prefix)
        for name, value in (("temperature", self.temperature), ("scale", self.scale)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a number > 0, got {value!r}; 1 changes nothing")

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Cut what follows the prefix into one chunk a host; arguments and errors as `Method.plan`."""
        if self.prefix is not None and self.prefix > tokens:
            raise ValueError(f"prefix: {self.prefix} tokens, expected at most the document's {tokens}")
        return plan_context(
            tokens=tokens,
            hosts=hosts,
            anchor=query_offset if self.prefix is None else self.prefix,
            query=query,
            query_in="after",
            shared_prefix=True,
            reuse_positions=True,
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend causally over this host's rows [prefix, chunk]."""
        self.share(q, k, v, context)
        return self.masked(q, k, v, context)[0]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend to all chunks at temperature T, merge over the hosts, then weigh them against the other keys.

        The power S · T belongs to the sum over all chunks, so it comes after the hosts' merge.
        """
        host, chunk = context.host, context.plan.host(context.host.rank).block_rows
        backend = self.dense_backend
        plain = q.shape[-1] ** -0.5 if context.scale is None else context.scale
        parts = list(
            decode_attention(
                q, k[:, :, :chunk], v[:, :, :chunk], causal=False, scale=plain / self.temperature, backend=backend
            )
        )
        # The other keys stand behind the owner's chunk; elsewhere there are none, and this part is (0, −inf).
        owns = host.rank == context.plan.owner
        parts += decode_attention(q, k[:, :, chunk:], v[:, :, chunk:], causal=owns, scale=plain, backend=backend)
        refuse_gradient(parts[0])
        message = torch.cat([x.float() if x.ndim == 4 else x[..., None] for x in parts], dim=-1)
        gathered = torch.stack(host.all_gather(message, what="merge").wait())
        out, lse, other_out, other_lse = gathered.split((q.shape[-1], 1) * 2, dim=-1)
        out, lse = merge(out, lse[..., 0])
        other_out, other_lse = merge(other_out, other_lse[..., 0])
        return merge_pair(out, self.scale * self.temperature * lse, other_out, other_lse)[0].to(q.dtype)
