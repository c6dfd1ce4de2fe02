"""Measure one layer's compression step by step, each against the least time that its bytes or FLOPs could take.

Every call is replayed from a CUDA graph. The floor in the notes is bytes over the rate of a large copy or sum, or FLOPs
over the rate of a large matmul, of the same run: each input read once, each output written once, nothing else.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from apb.bench import Row
from apb.bench.measure import Bench
from apb.compress import MaxPool, Projections
from apb.compress.query_aware import mean_logits
from apb.compress.retaining_head import head_scores
from apb.compress.select import gather, pool_and_select

__all__ = ["SHAPES", "Inputs", "Shape", "draw", "run"]

Q_HEADS, KV_HEADS, DIM, QUERY, WIDTH = 32, 8, 128, 32, 1024
_POOL = MaxPool(kernel=5)


class Shape(NamedTuple):
    """Tokens of the block, and how many of them each KV head keeps."""

    tokens: int
    keep: int


class Inputs(NamedTuple):
    """One layer's block, its question, and a retaining head."""

    query: Tensor
    k: Tensor
    v: Tensor
    projections: Projections
    fc1: Tensor
    fc2: Tensor


class Step(NamedTuple):
    """A step by each who computes it, and what it must move (bytes) or compute (FLOPs)."""

    name: str
    calls: dict[str, Callable[[], object]]
    moved: float = float("nan")
    flop: float = float("nan")


SHAPES = (Shape(16384, 2048), Shape(65536, 8192))
"""Llama-3.1-8B on 8 hosts: 128K and 512K tokens."""


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure every step on every shape, print a table, extend the ledger.

    Args:
        quick: take the first shape only.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Returns:
        The rows, one for each step, shape and backend.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    bench = Bench("compress")
    with torch.inference_mode():
        for shape in SHAPES[: 1 if quick else 2]:
            for step in _steps(shape, draw(shape.tokens)):
                if step.flop == step.flop:
                    floor = step.flop / bench.tflops_ceiling / 1e9
                else:
                    floor = step.moved / bench.gbytes_ceiling / 1e6
                bench.compare(
                    f"{step.name} {shape.tokens} keep {shape.keep}", step.calls,
                    moved=step.moved, flop=step.flop, graph=step.calls, notes=f"floor {floor:.4f} ms",
                )  # fmt: skip
    return bench.finish(out)


def draw(tokens: int) -> Inputs:
    """Draw everything in random bf16 on the GPU; tokens lie as a model's projections write them."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (QUERY, Q_HEADS), *((tokens, heads) for heads in (KV_HEADS, KV_HEADS, Q_HEADS, KV_HEADS, KV_HEADS))
    query, k, v, *before = (_normal(generator, 1, *size, DIM).transpose(1, 2) for size in sizes)
    inputs = (Q_HEADS + 2 * KV_HEADS) * DIM
    fc1, fc2 = _normal(generator, WIDTH, inputs) / inputs**0.5, _normal(generator, KV_HEADS, WIDTH)
    return Inputs(query, k, v, Projections(q=before[0], k=before[1], v=before[2]), fc1, fc2)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)


def _steps(shape: Shape, x: Inputs) -> Iterator[Step]:
    """Yield the two scorers, the selection from given scores, the gather, and these together."""
    tokens, keep = shape
    scores = mean_logits(x.query, x.k)
    indices, _ = pool_and_select(scores, keep, _POOL)
    score_bytes, index_bytes = 4 * KV_HEADS * tokens, 8 * KV_HEADS * keep
    row_bytes = 2 * KV_HEADS * keep * (2 * DIM) * 2  # K and V, read and written
    k_bytes = 2 * KV_HEADS * tokens * DIM

    def both(call: Callable[..., object]) -> dict[str, Callable[[], object]]:
        return {backend: partial(call, backend=backend) for backend in ("torch", "triton")}

    def after(backend: Literal["torch", "triton"], given: Tensor = scores) -> Tensor:
        chosen, _ = pool_and_select(given, keep, _POOL, backend=backend)
        return gather(x.k, x.v, chosen, backend=backend)

    def whole(backend: Literal["torch", "triton"]) -> Tensor:
        return after(backend, mean_logits(x.query, x.k, backend=backend))

    inputs = x.fc1.shape[1]
    flop = 2 * tokens * WIDTH * (inputs + KV_HEADS)
    yield Step("retaining head", both(partial(head_scores, x.projections, x.fc1, x.fc2)), flop=flop)
    yield Step("query-aware", both(partial(mean_logits, x.query, x.k)), k_bytes + score_bytes)
    select = both(partial(pool_and_select, scores, keep, _POOL))
    yield Step("select", select | {"topk": partial(_topk, scores, keep)}, score_bytes + index_bytes)
    yield Step("gather", both(partial(gather, x.k, x.v, indices)), row_bytes + index_bytes)
    yield Step("select + gather", both(after), score_bytes + row_bytes)
    yield Step("query-aware path", both(whole), k_bytes + row_bytes)


def _topk(scores: Tensor, keep: int) -> Tensor:
    """Select as most code does: equal scores go as the device likes, so this is no selection of ours."""
    return _POOL(scores).topk(keep, dim=-1, sorted=False).indices.sort(dim=-1).values
