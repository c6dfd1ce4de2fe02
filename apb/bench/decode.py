"""Measure decoding: attention of one new token to a long cache, and a whole layer's step, in one run on one GPU.

All calls are replayed from a CUDA graph, since launching them one by one takes Python longer than they take. What a
replay takes by itself is measured, too, as "nothing". The cache (and, of a layer, the weights) is read once: those
bytes a second are set against a large copy's or sum's.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from apb.attend import decode_attention
from apb.bench import Row
from apb.bench.measure import Bench

__all__ = ["KEYS", "Layer", "cache_bytes", "run"]

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
HIDDEN, INTERMEDIATE = 4096, 14336
KEYS = (16384, 34816, 131072)
"""A host's keys: a block of 128K tokens on 8 hosts; with anchor and passing block; all of them on one host."""
BATCHES = (1, 8)


def cache_bytes(batch: int, keys: int) -> int:
    """Count the bytes of K and V in bfloat16.

    >>> cache_bytes(1, 34816)
    142606336
    """
    return 2 * 2 * batch * KV_HEADS * keys * DIM


def run(quick: bool = False, out: Path | None = None) -> list[Row]:
    """Measure nothing, every backend and peer on every size, and a layer, print a table, extend the ledger.

    Args:
        quick: batch 1 only.
        out: CSV file to append to, made if it is not there; None writes nothing.

    Raises:
        RuntimeError: if there is no CUDA device.
    """
    bench = Bench("decode")
    _measure_nothing(bench)
    for batch in BATCHES[: 1 if quick else 2]:
        for keys in KEYS:
            calls = dict(_contenders(batch, keys))
            bench.compare(f"{batch} × {keys}", calls, moved=cache_bytes(batch, keys), graph=calls)
        _measure_layer(bench, batch, KEYS[1])
    return bench.finish(out)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


def _contenders(batch: int, keys: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the name and the call of each backend and peer; ours gives the LSE, too, as FlexAttention can.

    The last, "sum", only reads the cache: short reads do not reach the bytes a second of a large one.
    """
    q, cache = _draw(batch, Q_HEADS, 1, DIM), _draw(2, batch, KV_HEADS, keys, DIM)
    k, v = cache
    lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
    yield "triton", partial(decode_attention, q, k, v, causal=False, backend="triton")
    yield "triton lengths", partial(decode_attention, q, k, v, causal=False, lengths=lengths, backend="triton")
    yield "sdpa", partial(decode_attention, q, k, v, causal=False, backend="sdpa")

    def cudnn() -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    yield "cudnn", cudnn

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention, noop_mask

    # Its decoding kernel shares out the keys of a mask's blocks. Without a mask, one program reads all of a head's.
    mask = create_block_mask(noop_mask, None, None, 1, keys, device="cuda")
    yield "flex", partial(torch.compile(flex_attention, dynamic=False), q, k, v, block_mask=mask, enable_gqa=True)
    yield "sum", cache.view(torch.float32).sum


def _measure_nothing(bench: Bench) -> None:
    """Measure the replay of a graph without a kernel, and of one whose kernel writes a number."""
    calls = {"empty graph": lambda: None, "one number": torch.empty(1, device="cuda").zero_}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA Graph is empty")
        bench.compare("nothing", calls, graph=calls)


def _measure_layer(bench: Bench, batch: int, keys: int) -> None:
    """Measure a layer's step from a CUDA graph, and launched one by one."""
    layer, hidden = Layer(batch, keys), _draw(batch, 1, HIDDEN)
    moved = layer.weight_bytes + cache_bytes(batch, keys)
    calls = dict.fromkeys(("graph", "eager"), partial(layer, hidden))
    bench.compare(f"layer {batch} × {keys}", calls, moved=moved, graph=["graph"])


class Layer:
    """One decoding step of a Llama-3.1-8B-shaped layer: random weights, a cache with room, its length on the device.

    Args:
        batch: rows that decode together.
        keys: tokens in the cache, the new one included; there is room for as many again as fill a page of 128.
    """

    def __init__(self, batch: int, keys: int) -> None:
        self.position = torch.tensor([keys - 1], device="cuda")
        self.lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        self.k, self.v = (_draw(batch, KV_HEADS, keys + -keys % 128 + 128, DIM) for _ in "kv")
        angles = self.position / 500000 ** (torch.arange(0, DIM, 2, device="cuda") / DIM)
        self.cos, self.sin = (x.to(torch.bfloat16).repeat(2) for x in (angles.cos(), angles.sin()))
        self.norms = [torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        sizes = [((Q_HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, Q_HEADS * DIM)]
        sizes += [(2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
        self.weights = [_draw(*size) * size[1] ** -0.5 for size in sizes]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights, each of which is read once a step."""
        return sum(weight.nbytes for weight in self.weights)

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the layer's output for the new token, [batch, 1, hidden], having put it into the cache."""
        qkv, o, gate_up, down = self.weights
        x = F.linear(F.rms_norm(hidden, (HIDDEN,), self.norms[0]), qkv)
        x = x.unflatten(-1, (Q_HEADS + 2 * KV_HEADS, DIM)).transpose(1, 2)
        q, k, v = x.split((Q_HEADS, KV_HEADS, KV_HEADS), dim=1)
        self.k.index_copy_(2, self.position, self._rotate(k))
        self.v.index_copy_(2, self.position, v)
        attended, _ = decode_attention(self._rotate(q), self.k, self.v, causal=False, lengths=self.lengths)
        hidden = hidden + F.linear(attended.transpose(1, 2).flatten(2), o)
        gate, up = F.linear(F.rms_norm(hidden, (HIDDEN,), self.norms[1]), gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, down)

    def _rotate(self, x: Tensor) -> Tensor:
        """Apply RoPE, in halves, at the new token's position."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin
