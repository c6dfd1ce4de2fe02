"""Run every kernel on small ragged shapes, each tensor an allocation of its own, for CUDA's memory checker:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py

Without the checker it shows only that the kernels launch. With `cpu` behind it, Triton's interpreter runs them.
"""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch

from apb.attend import VerticalSlash, decode_attention, masked_attention, sparse_attention
from apb.device import GLUON_INSTALLED
from apb.kernels.merge import merge_into_rows, merge_partials
from apb.kernels.retaining_head import retaining_head_scores
from apb.kernels.score import score_keys
from apb.kernels.select import gather_kept, select_kept

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SHAPES = ((33, 70, 129), (0, 0, 257), (129, 0, 1), (0, 129, 65))  # anchor, passing, block


def draw(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE)


def attend(backend: str, dim: int, gradient: bool) -> None:
    for anchor, passing, block in SHAPES:
        q, k, v = (draw(1, h, n, dim) for h, n in ((4, anchor + block), *((2, anchor + passing + block),) * 2))
        for x in (q, k, v):
            x.requires_grad_(gradient)
        out, lse = masked_attention(q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend=backend)
        if gradient:
            (out.float().sum() + lse.sum()).backward()
    k, v = (draw(2, 2, 333, dim) for _ in "kv")
    decode_attention(draw(2, 4, 300, dim), k, v, causal=False, backend=backend)  # many rows, all of which see all keys
    decode_attention(draw(2, 300, 4, dim).transpose(1, 2), k[:, :, 1:], v[:, :, 1:], causal=False, backend=backend)


def decode(dim: int) -> None:
    for rows, columns in product((1, 5), (1, 130, 3001)):
        q, k, v = draw(2, 8, rows, dim), *(draw(2, 2, columns, dim) for _ in "kv")
        decode_attention(q, k, v, causal=columns >= rows, backend="triton")
        lengths = torch.tensor([columns, max(1, columns // 2)], dtype=torch.int32, device=DEVICE)
        decode_attention(q, k, v, causal=False, lengths=lengths, backend="triton")


def compress(dim: int) -> None:
    for tokens, keep in ((1, 1), (130, 7), (3001, 700), (20001, 2000)):
        q, k, v = draw(1, 4, tokens, dim), *(draw(1, 2, tokens, dim) for _ in "kv")
        scores = score_keys(k, draw(1, 4, 3, dim))
        indices, _ = select_kept(scores, keep, 7, False)
        gather_kept(k, v, indices)
        retaining_head_scores(q, k, v, draw(48, 8 * dim), draw(2, 48))


def merge(dim: int) -> None:
    outs, lses = draw(5, 1, 3, 77, dim), draw(5, 1, 3, 77, dtype=torch.float32)
    out, lse = merge_partials(outs, lses, torch.float32)
    merge_into_rows(out, lse, outs[1], lses[1])


def sparse(dim: int) -> None:
    q, k, v = draw(1, 4, 333, dim), *(draw(1, 2, 333, dim) for _ in "kv")
    sparse_attention(q, k, v, VerticalSlash(vertical=40, slash=70).index(q, k), backend="triton")


def runs() -> Iterator[tuple[str, Callable[[], None]]]:
    hopper = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0) and GLUON_INSTALLED
    for dim in (64, 80, 128):
        yield f"portable {dim}", lambda dim=dim: attend("triton", dim, gradient=True)
        if hopper and dim != 80:
            yield f"hopper {dim}", lambda dim=dim: attend("hopper", dim, gradient=False)
        for run in (decode, compress, merge, sparse):
            yield f"{run.__name__} {dim}", lambda run=run, dim=dim: run(dim)


if __name__ == "__main__":
    for name, run in runs():
        start = time.monotonic()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
