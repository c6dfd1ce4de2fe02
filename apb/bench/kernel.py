"""Measure masked attention against its peers, all in one run on one GPU.

TFLOP/s count 4 · pairs · dim · q_heads over the pairs that the mask needs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attend import masked_attention
from apb.bench import Row
from apb.bench.measure import Bench
from apb.bench.peers import CuDNN, FlashAttention3

__all__ = ["SHAPES", "Shape", "draw", "mask_pairs", "run"]

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
_BACKENDS, _PEERS = ("hopper", "triton", "flex", "sdpa"), {"fa3": FlashAttention3, "cudnn": CuDNN}


class Shape(NamedTuple):
    """Tokens of the anchor, the passing block and the block; whether the anchor's rows are among the queries."""

    anchor: int
    passing: int
    block: int
    anchor_rows: bool = True

    def __str__(self) -> str:
        return "/".join(map(str, self[:3])) + ("" if self.anchor_rows else ", rows of the block")


SHAPES = (
    Shape(1024, 7 * 512, 4096),  # the last of 8 hosts, with the paper's anchor and passing lengths: 32K tokens
    Shape(4096, 7 * 2048, 16384),  # 128K
    Shape(2048, 7 * 1024, 8192),  # 64K
    Shape(8192, 7 * 4096, 32768),  # 256K
    Shape(8192, 7 * 8192, 65536),  # 512K
    Shape(4096, 3 * 1024, 8192),  # 128K in zigzag, the two blocks of host 3
    Shape(4096, 12 * 1024, 8192, anchor_rows=False),
    Shape(0, 0, 16384),  # plain causal
)
"""Of one layer with Llama-3.1-8B's heads; the first two are the quick run's."""


def mask_pairs(shape: Shape) -> int:
    """Count the (row, column) pairs of the mask: A(A+1)/2 + B(A+P) + B(B+1)/2.

    >>> mask_pairs(Shape(anchor=2, passing=3, block=4)), mask_pairs(Shape(2, 3, 4, anchor_rows=False))
    (33, 30)
    """
    a, p, b, anchor_rows = shape
    return anchor_rows * a * (a + 1) // 2 + b * (a + p) + b * (b + 1) // 2


def run(quick: bool = False, out: Path | None = None, by: Sequence[str] = ()) -> list[Row]:
    """Measure every backend and peer on every shape, print a table, extend the ledger.

    Args:
        quick: take the first two shapes only.
        out: CSV file to append to, made if it is not there; None writes nothing.
        by: who is to compute, of all in the table; nobody named is everybody. The ledger keeps such runs apart.

    Returns:
        The rows, one for each backend and shape; a peer that could not run has no time, and says why in its notes.

    Raises:
        ValueError: there is nobody of that name.
        RuntimeError: if there is no CUDA device.
    """
    if unknown := [name for name in by if name not in (*_BACKENDS, *_PEERS)]:
        raise ValueError(f"by: expected some of {', '.join((*_BACKENDS, *_PEERS))}, got {', '.join(unknown)}")
    bench = Bench(f"masked_attention by {' and '.join(by)}" if by else "masked_attention")
    cases = [(str(shape), shape, False) for shape in SHAPES[: 2 if quick else None]]
    if not quick:
        cases.append((f"{SHAPES[1]}, growing", SHAPES[1], True))
    for case, shape, growing in cases:
        calls = {name: call for name, call in _contenders(shape, growing) if not by or name in by}
        bench.compare(case, calls, flop=4 * mask_pairs(shape) * DIM * Q_HEADS)
    return bench.finish(out)


def draw(shape: Shape, growing: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the queries of [A, B] and the keys and values of [A, P, B], random bf16, on the GPU.

    With `growing` keys, each 128 of them have scores far above those before: the worst case of an online softmax.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    rows, columns = shape.anchor_rows * shape.anchor + shape.block, shape.anchor + shape.passing + shape.block
    sizes = ((Q_HEADS, rows), (KV_HEADS, columns), (KV_HEADS, columns))
    q, k, v = (torch.randn(1, *size, DIM, dtype=torch.bfloat16, device="cuda", generator=generator) for size in sizes)
    if growing:
        k *= 1 + 3 * torch.arange(columns, device="cuda")[:, None].div(128, rounding_mode="floor")
    return q, k, v


def _contenders(shape: Shape, growing: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name and the call of each backend and peer, on the same random bf16 tensors."""
    q, k, v = draw(shape, growing)
    lengths = {"anchor_tokens": shape.anchor, "passing_tokens": shape.passing}
    for backend in _BACKENDS:
        yield backend, partial(masked_attention, q, k, v, **lengths, backend=backend)
    anchor_rows = shape.anchor if shape.anchor_rows else 0
    for name, peer in _PEERS.items():
        yield name, peer(q, k, v, anchor_rows)
