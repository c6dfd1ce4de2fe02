"""A decoder with random weights, one layer standing for all: what a prefill computes, without a checkpoint.

Norm → QKV → RoPE → attention → O, norm → gated FFN, each added to the residual stream where it lies. A layer's weights
exceed any cache, so running the same ones again reads as much memory as another layer's would.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from apb.bench.prefill.shapes import DecoderShape
from apb.compress.compressor import Projections
from apb.context import Trace

__all__ = ["Attend", "Decoder", "Rope", "ffn_rows"]

FFN_ROWS = 16384
"""Most rows in the FFN at once: no tensor of all rows × ffn ever stands. A large product gains nothing beyond."""

_EPSILON = 1e-5

Rope = tuple[Tensor, Tensor]
"""Cosines and sines, `[rows, 1, dim / 2]` each."""
Attend = Callable[[Tensor, Tensor, Tensor, Projections | None], Tensor]
"""(q, k, v after RoPE, the projections before it if wanted) → out, all `[1, heads, rows, dim]`."""


class Decoder:
    """Embedding, one layer for all layers, the last norm and the output embedding, with random weights.

    Args:
        shape: of the model.
        device, dtype: of the weights and of all that is computed.
        seed: starts the draw of the weights; the same on every host.
    """

    def __init__(self, shape: DecoderShape, device: torch.device, dtype: torch.dtype, *, seed: int = 0) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*sizes: int, scale: float) -> Tensor:
            return torch.randn(*sizes, device=device, dtype=dtype, generator=generator).mul_(scale)

        hidden, ffn, wide = shape.hidden, shape.ffn, shape.heads * shape.head_dim
        narrow, depth = shape.kv_heads * shape.head_dim, (2 * shape.layers) ** -0.5  # so that the stream stays small
        self.qkv = tuple(draw(size, hidden, scale=hidden**-0.5) for size in (wide, narrow, narrow))
        self.bias = tuple(draw(len(w), scale=0.1) if shape.qkv_bias else None for w in self.qkv)
        self.o = draw(wide, hidden, scale=depth * wide**-0.5)
        self.gate_up = draw(2 * ffn, hidden, scale=hidden**-0.5)
        self.down = draw(ffn, hidden, scale=depth * ffn**-0.5)
        self.norms = tuple(1 + draw(hidden, scale=0.1) for _ in range(3))
        self.embedding = draw(shape.vocab, hidden, scale=1.0)
        self.head = draw(shape.vocab, hidden, scale=hidden**-0.5)
        pieces = _elementwise("inductor" if device.type == "cuda" else None)
        self._norm, self._rotate_q, self._rotate_k, self._gate = pieces

    def embed(self, ids: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
        """Return the rows that a prefill begins with."""
        return F.embedding(ids.to(self.device), self.embedding)

    def rope(self, positions: Int[Tensor, " rows"]) -> Rope:
        """Return the rotations of these positions, in float32 at least."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        pair = torch.arange(0, self.shape.head_dim, 2, device=self.device, dtype=dtype)
        inverse = self.shape.rope_theta ** (-pair / self.shape.head_dim)
        angles = positions.to(self.device, dtype)[:, None, None] * inverse
        return angles.cos(), angles.sin()

    def layer(
        self, x: Float[Tensor, "rows hidden"], rope: Rope, attend: Attend, trace: Trace, *, projections: bool = False
    ) -> None:
        """Run rows through a layer; `x`, contiguous, becomes its output.

        Args:
            x: the residual stream.
            rope: of the rows' positions.
            attend: who attends.
            trace: gets the times of "qkv", "o" and "ffn"; whoever attends notes its own.
            projections: give them to `attend`, too.
        """
        with trace.phase("qkv"):
            q, k, v, before = self._project(x, rope, projections)
        out = attend(q, k, v, before)
        del q, k, v, before
        with trace.phase("o"):
            x.addmm_(rearrange(out, "1 h n d -> n (h d)"), self.o)
        del out
        with trace.phase("ffn"):
            for rows in x.split(ffn_rows(len(x))):
                inside = self._gate(F.linear(self._norm(rows, self.norms[1]), self.gate_up))
                rows.addmm_(inside, self.down)
                del inside

    def logits(self, x: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Apply the last norm and the output embedding."""
        return F.linear(rms_norm(x, self.norms[2]), self.head)

    def _project(self, x: Tensor, rope: Rope, projections: bool) -> tuple[Tensor, Tensor, Tensor, Projections | None]:
        normed = self._norm(x, self.norms[0])
        q, k, v = (
            rearrange(F.linear(normed, weight, bias), "n (h d) -> 1 n h d", d=self.shape.head_dim)
            for weight, bias in zip(self.qkv, self.bias, strict=True)
        )
        del normed
        before = None
        if projections:
            before = Projections(q=q.transpose(1, 2), k=k.transpose(1, 2), v=v.transpose(1, 2))
        q = self._rotate_q(q, *rope)
        k = self._rotate_k(k, *rope)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), before


def ffn_rows(rows: int) -> int:
    """Return how many of so many rows pass the FFN at once, in chunks that are as even as they go."""
    return -(-rows // max(1, -(-rows // FFN_ROWS)))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / √(mean x² + ε) · weight."""
    return F.rms_norm(x, weight.shape, weight, _EPSILON)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + dim / 2) of `[1, rows, heads, dim]`, computed in the precision of the angles."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def gate(x: Tensor) -> Tensor:
    """silu(g) · u of [g, u]."""
    g, u = x.chunk(2, dim=-1)
    return F.silu(g) * u


@cache
def _elementwise(backend: str | Callable[..., Any] | None) -> tuple[Callable[..., Tensor], ...]:
    """Return `rms_norm`, `rotate` for q and for k, and `gate`, compiled by `torch.compile`'s backend; None as they are.

    What is compiled follows from the model's shape alone, not from which number of rows came first.
    """
    if backend is None:
        return rms_norm, rotate, rotate, gate

    # PyTorch compiles by a function's text: q and k, which differ in heads, have a text of their own each.
    def rotate_q(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin)

    def rotate_k(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin)

    pieces = ((rms_norm, (0, None)), (rotate_q, (1, 0, 0)), (rotate_k, (1, 0, 0)), (gate, (0,)))
    return tuple(_fused(piece, backend, rows) for piece, rows in pieces)


def _fused(
    piece: Callable[..., Tensor], backend: str | Callable[..., Any], rows: tuple[int | None, ...]
) -> Callable[..., Tensor]:
    """Compile a function for any number of rows; `rows` says which dimension of each argument they are."""
    compiled = torch.compile(piece, backend=backend)

    def call(*tensors: Tensor) -> Tensor:
        for x, dim in zip(tensors, rows, strict=True):
            if dim is not None:
                torch._dynamo.maybe_mark_dynamic(x, dim)
        return compiled(*tensors)

    return call
