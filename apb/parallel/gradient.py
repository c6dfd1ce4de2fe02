"""A gather with a gradient: what the other hosts make of this host's tensor comes back to it.

    forward    host r receives x₀ … x_{H−1}
    backward   host r receives ∂L/∂x_r = Σₕ gₕᵣ, where gₕᵣ is the gradient that host h has of its copy of x_r

L is the sum of what all hosts differentiate. The backward pass is a collective too, so every host must come to it, and
to several in the same order: `after` says which gather a gather follows, and is gone back through later.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from apb.parallel.host import Handle, Host
from apb.parallel.threads import ThreadHost

__all__ = ["all_gather"]


def all_gather(x: Tensor, host: Host, *, what: str, after: Handle[list[Tensor]] | None = None) -> Handle[list[Tensor]]:
    """Start `host.all_gather(x)`; if x wants a gradient, so does what the handle yields.

    A host that makes nothing of the tensors must still run backward through one of them, with a gradient of zero:
    a slice of no tokens among its keys will do. Differentiable once.

    Args:
        x: this host's tensor; the same shape and dtype on every host, and on every host it wants a gradient or none.
        host: this member of the group.
        what: name of the purpose; the backward pass counts as `what` + " gradient".
        after: an earlier gather of this function, gone back through after this one, on every host.

    Raises:
        HostFailed: (from `wait`, and from backward) another host failed.
        RuntimeError: (from backward) `create_graph=True`; or the host is a thread and goes backward in another one, in
            which the other hosts would have to: on a GPU, unless autograd's multithreading is off (`run_threads` and
            `run_simulated` see to it).
    """
    started = host.all_gather(x, what=what)
    if host.world_size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
        return started
    return Handle(lambda: list(_Gather.apply(started, host, what, x, after and after.wait()[0][:0])))


class _Gather(torch.autograd.Function):
    """(x, something of an earlier gather) → the hosts' tensors."""

    @staticmethod
    def forward(
        ctx: Any, started: Handle[list[Tensor]], host: Host, what: str, x: Tensor, before: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.host, ctx.what, ctx.thread = host, f"{what} gradient", threading.get_ident()
        ctx.before = None if before is None else before.shape
        return tuple(started.wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if isinstance(ctx.host, ThreadHost) and threading.get_ident() != ctx.thread:
            raise RuntimeError(
                f"backward on rank {ctx.host.rank} ({ctx.what!r}): hosts that are threads share the thread in which "
                f"PyTorch goes backward on {ctx.host.device}, and would wait for each other forever; leave autograd's "
                f"multithreading off, as run_threads does on a GPU, or call backward under "
                f"torch.autograd.set_multithreading_enabled(False)"
            )
        if torch.is_grad_enabled() and any(grad.requires_grad for grad in grads):
            raise RuntimeError(
                f"backward on rank {ctx.host.rank} ({ctx.what!r}): a gather is differentiable once, and a second "
                f"derivative would miss the other hosts' parts; call backward without create_graph=True"
            )
        mine = torch.stack(ctx.host.all_to_all(grads, what=ctx.what).wait()).sum(dim=0)
        return None, None, None, mine, None if ctx.before is None else mine.new_zeros(ctx.before)
