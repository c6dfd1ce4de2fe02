"""Measure masked attention against its peers, all in one run on one GPU.

TFLOP/s count 4 · pairs · dim · q_heads over the pairs that the mask needs.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attend import masked_attention
from apb.bench import Row
from apb.bench.measure import Bench

__all__ = ["SHAPES", "Shape", "draw", "mask_pairs", "run"]

Q_HEADS, KV_HEADS, DIM = 32, 8, 128


class Shape(NamedTuple):
    """Tokens of the anchor, the passing block and the block."""

    anchor: int
    passing: int
    block: int


SHAPES = (Shape(1024, 3584, 4096), Shape(4096, 14336, 16384), Shape(8192, 28672, 65536))
"""Llama-3.1-8B on the last of 8 hosts: 32K, 128K and 512K tokens."""


def mask_pairs(shape: Shape) -> int:
    """Count the (row, column) pairs of the mask: A(A+1)/2 + B(A+P) + B(B+1)/2.

    >>> mask_pairs(Shape(anchor=2, passing=3, block=4))
    33
    """
    a, p, b = shape
    return a * (a + 1) // 2 + b * (a + p) + b * (b + 1) // 2


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure every backend and peer on every shape, print a table, extend the ledger.

    Args:
        quick: take the first two shapes only.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Returns:
        The rows, one for each backend and shape; a peer that could not run has no time, and says why in its notes.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    bench = Bench("masked_attention")
    for shape in SHAPES[: 2 if quick else 3]:
        flop = 4 * mask_pairs(shape) * DIM * Q_HEADS
        for name, call in _contenders(shape):
            bench.measure("/".join(map(str, shape)), name, call, flop=flop)
    return bench.finish(out)


def draw(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the queries of [A, B] and the keys and values of [A, P, B], random bf16, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((Q_HEADS, shape.anchor + shape.block), (KV_HEADS, sum(shape)), (KV_HEADS, sum(shape)))
    q, k, v = (torch.randn(1, *size, DIM, dtype=torch.bfloat16, device="cuda", generator=generator) for size in sizes)
    return q, k, v


def _contenders(shape: Shape) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name and the call of each backend and peer, on the same random bf16 tensors."""
    q, k, v = draw(shape)
    lengths = {"anchor_tokens": shape.anchor, "passing_tokens": shape.passing}
    for backend in ("triton", "flex", "sdpa"):
        yield backend, partial(masked_attention, q, k, v, **lengths, backend=backend)
    yield "fa3", _FlashAttention3(q, k, v, shape.anchor)


class _FlashAttention3:
    """FlashAttention-3 from the wheel `fa3_fwd`: two causal launches aligned at the bottom right."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, anchor: int) -> None:
        self.anchor = anchor
        self.tensors = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # batch tokens heads dim

    def __call__(self) -> tuple[object, object]:
        from fa3_fwd_interface import flash_attn_func  # ty: ignore[import-not-found]

        q, k, v = self.tensors
        a = self.anchor
        anchor = flash_attn_func(q[:, :a], k[:, :a], v[:, :a], causal=True)
        return anchor, flash_attn_func(q[:, a:], k, v, causal=True)
