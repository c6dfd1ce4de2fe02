"""Attend from replicated rows to keys that are spread over the hosts: the query's pass, and every decode step."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from apb.attend import Backend, decode_attention
from apb.merge import merge
from apb.parallel.host import Handle, Host

__all__ = ["refuse_gradient", "start_attend_over_hosts"]


def start_attend_over_hosts(
    q: Float[Tensor, "batch q_heads rows dim"],
    k: Float[Tensor, "batch kv_heads columns dim"],
    v: Float[Tensor, "batch kv_heads columns dim"],
    host: Host,
    *,
    owner: int,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Handle[Float[Tensor, "batch q_heads rows dim"]]:
    """Attend to this host's keys, start gathering the partial results; the handle yields the exact merge.

    Only on the owner are the rows' own keys among `k`, as its last ones, and only there is the attention causal: all
    other keys lie before every row. (Calling it causal everywhere hides the end of each block from the first rows.)

    Args:
        q: the same rows on every host.
        k, v: this host's cache; on the owner, followed by the rows' own keys and values.
        host: this member of the group.
        owner: rank that holds the rows' own keys.
        scale: softmax scale; None is 1/√dim.
        backend: who computes, as in `decode_attention`.
    """
    out, lse = decode_attention(q, k, v, causal=host.rank == owner, scale=scale, backend=backend)
    if host.world_size == 1:
        return Handle(lambda: out)
    refuse_gradient(out)
    gather = host.all_gather(torch.cat((out.float(), lse[..., None]), dim=-1), what="merge")

    def finish() -> Tensor:
        parts = torch.stack(gather.wait())
        merged, _ = merge(parts[..., :-1], rearrange(parts[..., -1:], "p b h n 1 -> p b h n"))
        return merged.to(q.dtype)

    return Handle(finish)


def refuse_gradient(x: Tensor) -> None:
    """Raise if x wants a gradient, which the merge over hosts would lose."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "attention over all hosts' caches has no gradient: run under torch.no_grad(), or, where it is the question "
            "that runs along with the prefill, plan with query_in='anchor' or 'after'"
        )
