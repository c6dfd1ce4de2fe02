"""Measure masked attention against its peers, all in one run on one GPU.

TFLOP/s count 4 · pairs · dim · q_heads over the pairs that the mask needs. Compare figures of one run only: clocks
and boards differ by more than kernels do.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from apb.attend import masked_attention
from apb.bench import Row, append, environment

__all__ = ["SHAPES", "mask_pairs", "run"]

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
MATMUL = 8192


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
    if not torch.cuda.is_available():
        raise RuntimeError("apb bench kernel needs a CUDA device: these kernels mean nothing on a CPU")
    env = environment()
    ceiling = _matmul_tflops()
    rows = [Row(**env, benchmark="masked_attention", case=f"matmul {MATMUL}", backend="cublas",
                ms=2 * MATMUL**3 / ceiling / 1e9, tflops=ceiling, notes="")]  # fmt: skip
    print(f"{env['device']}, torch {env['torch']}, triton {env['triton']}")
    print(f"{MATMUL}³ bf16 matmul: {ceiling:.0f} TFLOP/s")
    print(f"{'A/P/B':>18} {'backend':>10} {'ms':>9} {'TFLOP/s':>8} {'of matmul':>9}")
    for shape in SHAPES[: 2 if quick else 3]:
        flop = 4 * mask_pairs(shape) * DIM * Q_HEADS
        case = "/".join(map(str, shape))
        for name, call in _contenders(shape):
            try:
                ms = median_ms(call)
                row = Row(**env, benchmark="masked_attention", case=case, backend=name, ms=ms,
                          tflops=flop / ms / 1e9, notes="")  # fmt: skip
                print(f"{case:>18} {name:>10} {ms:9.3f} {row.tflops:8.0f} {row.tflops / ceiling:9.0%}", flush=True)
            except Exception as error:  # a peer's failure is a result, not the end of the run
                notes = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
                row = Row(**env, benchmark="masked_attention", case=case, backend=name, ms=math.nan,
                          tflops=math.nan, notes=notes)  # fmt: skip
                print(f"{case:>18} {name:>10} {notes}", flush=True)
            rows.append(row)
    if out is not None:
        append(out, rows)
    return rows


def median_ms(call: Callable[[], object]) -> float:
    """Time a call on the GPU: the median of triton.testing.do_bench, which flushes L2 before each repeat."""
    from triton.testing import do_bench

    return do_bench(call, warmup=100, rep=300, return_mode="median")


def _matmul_tflops() -> float:
    """Measure the practical ceiling: a large square bf16 matrix product."""
    a, b = (torch.randn(MATMUL, MATMUL, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    return 2 * MATMUL**3 / median_ms(lambda: a @ b) / 1e9


def _contenders(shape: Shape) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name and the call of each backend and peer, on the same random bf16 tensors."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)

    q = draw(Q_HEADS, shape.anchor + shape.block)
    k, v = (draw(KV_HEADS, sum(shape)) for _ in "kv")
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
