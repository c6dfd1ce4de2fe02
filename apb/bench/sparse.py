"""Measure MInference's sparse attention against exact attention on the same tensors, in one run on one GPU.

The question is whether it is ahead in proportion to its density: speed-up × density = 1 would say that a pair of the
sparse mask costs what a pair of the causal mask costs. Three sets of diagonals of equal number are measured, because
density depends on where they lie: one run ("clustered"), runs of 32 ("runs"), and random ones ("scattered").
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from apb.attend import SparseIndex, VerticalSlash, masked_attention, sparse_attention
from apb.attend.sparse_index import slash_index
from apb.bench import Row, append, environment
from apb.bench.measure import time_call

__all__ = ["CROSSOVER_TOKENS", "GROUPS", "draw_index", "run"]

DIM = 128
GROUPS = ((4, 1), (32, 8))
"""(query heads, KV heads): one group, and a layer of Llama-3.1-8B."""
CROSSOVER_TOKENS = tuple(2**i for i in range(11, 17))
LLAMA = VerticalSlash(vertical=512, slash=2048)  # what MInference ships for every head of Llama-3.1-8B


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure, print two tables, extend the ledger.

    Args:
        quick: 32K tokens in place of 128K.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Returns:
        The rows: each sparse kernel and its index by kind of diagonals, each exact peer, then the crossover.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("sparse_attention: needs a CUDA device; these kernels' times mean nothing on a CPU")
    env, rows = environment(), []

    def note(case: str, backend: str, ms: float, pairs: float, notes: str = "") -> None:
        row = Row(**env, benchmark="sparse_attention", case=case, backend=backend, ms=ms,
                  tflops=4 * pairs * DIM / ms / 1e9 if pairs else math.nan, notes=notes)  # fmt: skip
        rows.append(row)
        print(f"{case:>28} {backend:>12} {ms:9.3f} ms {row.tflops:6.0f} TFLOP/s  {notes}", flush=True)

    print(f"{env['device']}, torch {env['torch']}, triton {env['triton']}")
    tokens = 32768 if quick else 131072
    for q_heads, kv_heads in GROUPS:
        q, k, v = _draw(tokens, q_heads, kv_heads)
        name = f"{tokens} {q_heads}/{kv_heads}"
        exact = {}
        for peer, call in _exact(q, k, v):
            try:
                exact[peer] = _ms(call)
                note(name, peer, exact[peer], q_heads * tokens * (tokens + 1) / 2)
            except Exception as error:  # a peer's failure is a result, not the end of the run
                note(name, peer, math.nan, 0, f"{type(error).__name__}: {error}"[:120])
        note(name, "index", _ms(partial(LLAMA.index, q, k)), 0, str(LLAMA))
        for kind in ("clustered", "runs", "scattered"):
            index = draw_index(kind, LLAMA, tokens, q_heads)
            ms, density = _ms(partial(sparse_attention, q, k, v, index)), float(index.density().mean())
            against = ", ".join(f"{dense / ms:.2f}× {peer} (× density {dense / ms * density:.2f})"
                                for peer, dense in exact.items())  # fmt: skip
            note(f"{name} {kind}", "sparse", ms, float(index.pairs().sum()), f"density {density:.4f}: {against}")
        del q, k, v
    for tokens in CROSSOVER_TOKENS:
        q, k, v = _draw(tokens, *GROUPS[-1])
        name = f"crossover {tokens}"
        exact_ms = _ms(partial(masked_attention, q, k, v, anchor_tokens=0, passing_tokens=0))
        note(name, "triton", exact_ms, GROUPS[-1][0] * tokens * (tokens + 1) / 2)
        for pattern in (VerticalSlash(), LLAMA):
            index = draw_index("clustered", pattern, tokens, GROUPS[-1][0])
            parts = _ms(partial(pattern.index, q, k)), _ms(partial(sparse_attention, q, k, v, index))
            note(f"{name} {pattern.vertical}/{pattern.slash}", "index+sparse", sum(parts), 0,
                 f"density {float(index.density().mean()):.4f}, index {parts[0]:.3f} ms: "
                 f"{exact_ms / sum(parts):.2f}× triton")  # fmt: skip
    if out is not None:
        append(out, rows)
    return rows


def draw_index(kind: str, pattern: VerticalSlash, tokens: int, q_heads: int) -> SparseIndex:
    """Make an index of the pattern's size on the GPU whose diagonals lie as `kind` says; offset 0 among them."""
    generator = torch.Generator().manual_seed(0)
    slash, vertical = min(pattern.slash, tokens), min(pattern.vertical, tokens)

    def some(count: int, of: int) -> Tensor:
        """Draw `count` of 0 .. of − 1 for each head, 0 among them, ascending."""
        drawn = [1 + torch.randperm(of - 1, generator=generator)[: count - 1] for _ in range(q_heads)]
        return torch.nn.functional.pad(torch.stack(drawn), (1, 0)).sort(dim=1).values[None]

    if kind == "clustered":
        offsets = torch.arange(slash).expand(1, q_heads, -1)
    elif kind == "runs":
        offsets = (32 * some(-(-slash // 32), tokens // 32)[..., None] + torch.arange(32)).flatten(2)
    else:
        offsets = some(slash, tokens)
    return slash_index(offsets.cuda(), some(vertical, tokens).cuda(), tokens)


def _ms(call: Callable[[], object]) -> float:
    return time_call(call).ms


def _draw(tokens: int, q_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)
               for heads in (q_heads, kv_heads, kv_heads))  # fmt: skip
    return q, k, v


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield exact causal attention by our kernel, by PyTorch, and by FlashAttention-3 from the wheel `fa3_fwd`."""
    for backend in ("triton", "sdpa"):
        yield backend, partial(masked_attention, q, k, v, anchor_tokens=0, passing_tokens=0, backend=backend)
    tensors = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # batch tokens heads dim

    def fa3() -> object:
        from fa3_fwd_interface import flash_attn_func  # ty: ignore[import-not-found]

        return flash_attn_func(*tensors, causal=True)

    yield "fa3", fa3
