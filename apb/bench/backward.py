"""Measure the backward pass of masked attention against its peers, and of plain causal attention, on one GPU.

TFLOP/s count 2.5 times the forward pass's 4 · pairs · dim · q_heads: five matrix products where that has two, whoever
recomputes what. Every call goes backward once through a graph that is kept, so what is compiled must not write over
what the forward pass saved: `donated_buffer` is off.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from apb.attend import masked_attention
from apb.bench import Row
from apb.bench.kernel import DIM, Q_HEADS, SHAPES, Shape, draw, mask_pairs
from apb.bench.measure import Bench

__all__ = ["CAUSAL", "run"]

CAUSAL = Shape(0, 0, 16384)
"""No anchor and nothing passed: plain causal attention."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure every backend and peer on every shape, print a table, extend the ledger.

    Args:
        quick: take the first shape, and plain causal attention.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Returns:
        The rows, one for each backend and shape; a peer that could not run has no time, and says why in its notes.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    bench = Bench("backward")
    for shape in (*SHAPES[: 1 if quick else 2], CAUSAL):
        flop = 2.5 * 4 * mask_pairs(shape) * DIM * Q_HEADS
        calls = {name: _Backward(shape, forward, name == "cudnn") for name, forward in _contenders(shape)}
        with functorch_config.patch(donated_buffer=False):
            bench.compare(str(shape), calls, flop=flop)
    return bench.finish(out)


class _Backward:
    """Go backward from a random gradient; the forward pass runs on the first call, so that its failure is noted.

    `repeated`: with keys and values repeated for every query head, for a peer that wants as many of both.
    """

    def __init__(self, shape: Shape, forward: Forward, repeated: bool) -> None:
        self.shape, self.forward, self.repeated = shape, forward, repeated
        self.graph: tuple[Tensor, Tensor, tuple[Tensor, ...]] | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        if self.graph is None:
            q, k, v = draw(self.shape)
            if self.repeated:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            inputs = tuple(x.requires_grad_() for x in (q, k, v))
            out = self.forward(*inputs)
            self.graph = out, torch.randn_like(out), inputs
        out, grad, inputs = self.graph
        return torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _contenders(shape: Shape) -> Iterator[tuple[str, Forward]]:
    """Yield the name and the forward pass of each backend and peer."""
    lengths = {"anchor_tokens": shape.anchor, "passing_tokens": shape.passing}
    for backend in ("triton", "flex"):
        yield backend, partial(_ours, backend=backend, **lengths)
    yield "flash-2", partial(_two_calls, anchor=shape.anchor)
    if shape.anchor == 0:
        yield "cudnn", _cudnn


def _ours(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> Tensor:
    return masked_attention(q, k, v, **settings)[0]  # ty: ignore[invalid-argument-type]


def _two_calls(q: Tensor, k: Tensor, v: Tensor, *, anchor: int) -> Tensor:
    """Attend A × A and B × [A, P, B] through PyTorch's FlashAttention-2, causal at the bottom right."""
    outs = []
    for rows, columns in ((slice(0, anchor), slice(0, anchor)), (slice(anchor, None), slice(None))):
        part = q[:, :, rows], k[:, :, columns], v[:, :, columns]
        if part[0].shape[2]:
            mask = causal_lower_right(part[0].shape[2], part[1].shape[2])
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                outs.append(scaled_dot_product_attention(*part, attn_mask=mask, enable_gqa=True))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)
