"""Measure MInference's sparse attention against exact attention on the same tensors, in one run on one GPU.

The question is whether it is ahead in proportion to its density: speed-up × density = 1 would say that a pair of the
sparse mask costs what a pair of the causal mask costs. Three sets of diagonals of equal number are measured, because
density depends on where they lie: one run ("clustered"), runs of 32 ("runs"), and random ones ("scattered"). All of one
case are timed in turns. Making an index takes dozens of short kernels, so it is replayed from a CUDA graph: its time is
the GPU's, without launching.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from apb.attend import SparseIndex, VerticalSlash, choose_backend, masked_attention, sparse_attention
from apb.attend.sparse_index import slash_index
from apb.bench import Row, append, environment
from apb.bench.measure import Timing, time_in_turns

__all__ = ["CROSSOVER_TOKENS", "GROUPS", "draw_index", "run"]

DIM = 128
GROUPS = ((4, 1), (32, 8))
"""(query heads, KV heads): one group, and a layer of Llama-3.1-8B."""
CROSSOVER_TOKENS = tuple(2**i for i in range(11, 17))
LLAMA = VerticalSlash(vertical=512, slash=2048)  # what MInference ships for every head of Llama-3.1-8B
_REPLAYED = "from a CUDA graph"


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure, print two tables, extend the ledger.

    Args:
        quick: 32K tokens in place of 128K.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Returns:
        The rows: each sparse kernel and its index by kind of diagonals, each exact peer, then the crossover: against
        what "auto" takes for exact attention.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("sparse_attention: needs a CUDA device; these kernels' times mean nothing on a CPU")
    env, rows = environment(), []

    def note(case: str, backend: str, timing: Timing | str, pairs: float, notes: str = "") -> None:
        if isinstance(timing, str):
            timing, notes = Timing(math.nan, math.nan, math.nan), timing
        row = Row(**env, benchmark="sparse_attention", case=case, backend=backend, **timing._asdict(),
                  tflops=4 * pairs * DIM / timing.ms / 1e9 if pairs else math.nan, notes=notes)  # fmt: skip
        rows.append(row)
        print(f"{case:>28} {backend:>12} {timing.ms:9.3f} ms {row.tflops:6.0f} TFLOP/s  {notes}", flush=True)

    print(f"{env['device']}, torch {env['torch']}, triton {env['triton']}")
    tokens = 32768 if quick else 131072
    for q_heads, kv_heads in GROUPS:
        q, k, v = _draw(tokens, q_heads, kv_heads)
        name, exact = f"{tokens} {q_heads}/{kv_heads}", dict(_exact(q, k, v))
        indices = {kind: draw_index(kind, LLAMA, tokens, q_heads) for kind in ("clustered", "runs", "scattered")}
        sparse = {kind: partial(sparse_attention, q, k, v, index) for kind, index in indices.items()}
        times = time_in_turns({**exact, "index": partial(LLAMA.index, q, k), **sparse}, graph=["index"])
        for peer in exact:
            note(name, peer, times[peer], q_heads * tokens * (tokens + 1) / 2)
        note(name, "index", times["index"], 0, f"{LLAMA}, {_REPLAYED}")
        for kind, index in indices.items():
            density = float(index.density().mean())
            ratios = {peer: _ms(times[peer]) / _ms(times[kind]) for peer in exact}
            against = ", ".join(f"{ratio:.2f}× {peer} (× density {ratio * density:.2f})"
                                for peer, ratio in ratios.items() if math.isfinite(ratio))  # fmt: skip
            notes = f"density {density:.4f}: {against}"
            note(f"{name} {kind}", "sparse", times[kind], float(index.pairs().sum()), notes)
        del q, k, v, exact, indices, sparse
    for tokens in CROSSOVER_TOKENS:
        _crossover(tokens, note)
    if out is not None:
        append(out, rows)
    return rows


def _crossover(tokens: int, note: Callable[..., None]) -> None:
    """Measure exact attention, and the index and what it selects together, in a layer."""
    q, k, v = _draw(tokens, *GROUPS[-1])
    exact = dict(_ours(q, k, v))
    calls, densities = exact.copy(), {}
    for pattern in (VerticalSlash(), LLAMA):
        index, label = draw_index("clustered", pattern, tokens, GROUPS[-1][0]), f"{pattern.vertical}/{pattern.slash}"
        calls[f"index {label}"] = partial(pattern.index, q, k)
        calls[f"sparse {label}"] = partial(sparse_attention, q, k, v, index)
        densities[label] = float(index.density().mean())
    times, auto = time_in_turns(calls, graph=[f"index {label}" for label in densities]), choose_backend(q)
    for backend in exact:
        note(f"crossover {tokens}", backend, times[backend], GROUPS[-1][0] * tokens * (tokens + 1) / 2)
    for label, density in densities.items():
        index_ms, sparse_ms = _ms(times[f"index {label}"]), _ms(times[f"sparse {label}"])
        both = Timing(index_ms + sparse_ms, math.nan, math.nan)
        ratio = _ms(times[auto]) / both.ms
        notes = f"density {density:.4f}, index {index_ms:.3f} ms {_REPLAYED}: {ratio:.2f}× {auto}"
        note(f"crossover {tokens} {label}", "index+sparse", both, 0, notes)


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


def _ms(timing: Timing | str) -> float:
    return math.nan if isinstance(timing, str) else timing.ms


def _draw(tokens: int, q_heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)
               for heads in (q_heads, kv_heads, kv_heads))  # fmt: skip
    return q, k, v


def _ours(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield exact causal attention by our portable kernel, and by the one that "auto" takes if it is another."""
    for backend in dict.fromkeys(("triton", choose_backend(q))):
        yield backend, partial(masked_attention, q, k, v, anchor_tokens=0, passing_tokens=0, backend=backend)


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield exact causal attention by our kernels, by PyTorch, and by FlashAttention-3 from the wheel `fa3_fwd`."""
    yield from _ours(q, k, v)
    yield "sdpa", partial(masked_attention, q, k, v, anchor_tokens=0, passing_tokens=0, backend="sdpa")
    tensors = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # batch tokens heads dim

    def fa3() -> object:
        from fa3_fwd_interface import flash_attn_func  # ty: ignore[import-not-found]

        return flash_attn_func(*tensors, causal=True)

    yield "fa3", fa3
