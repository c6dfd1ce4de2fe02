"""Decoding on a GPU: lengths on the device, splits that finish in any order, graphs and streams beside each other."""

import pytest
import torch
from attention_cases import assert_attention, draw_inputs

from apb.attend import decode_attention
from apb.bench.decode import Layer
from apb.kernels import decode
from apb.merge import merge, merge_into, merge_pair
from apb.reference import apb_mask

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)


def mask_of(causal, rows, columns):
    return apb_mask(rows, columns, 0, 0) if causal else torch.ones(rows, columns, dtype=torch.bool)


def draw(seed, batch, rows, columns, dtype, dim=128):
    return draw_inputs(seed, (batch, 2, 4), rows, columns, dim, dtype, device="cuda")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 60])
def test_lengths(dtype, rows, causal):
    lengths = [0, 1, 100, 4097, 20000]
    q, k, v = draw(rows, len(lengths), rows, 20000, dtype)
    counts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    for i, n in enumerate(lengths):
        k[i, :, n:] = v[i, :, n:] = torch.nan
    for backend in ("triton", "sdpa") if dtype in HALF else ("triton",):
        out, lse = decode_attention(q, k, v, causal=causal, lengths=counts, backend=backend)
        for i, n in enumerate(lengths):
            each = q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n]
            assert_attention(out[i : i + 1], lse[i : i + 1], *each, mask_of(causal, rows, n), lse_atol=1e-4)


@pytest.mark.parametrize("tiles", [(16, 64, 4, 3), (16, 128, 8, 2), (16, 32, 2, 4), (64, 64, 4, 3)])
@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_any_number_of_splits_twice_the_same(tiles, splits):
    q, k, v = draw(splits, 2, 9, 9001, torch.bfloat16)
    out, lse = decode.launch(q, k, v, True, 128**-0.5, splits, decode.Tiles(*tiles))
    assert_attention(out, lse, q, k, v, mask_of(True, 9, 9001), lse_atol=1e-4)
    for _ in range(200):  # the program that merges is another each time; the result is not
        again, again_lse = decode.launch(q, k, v, True, 128**-0.5, splits, decode.Tiles(*tiles))
        assert torch.equal(out, again) and torch.equal(lse, again_lse)


def test_streams_beside_each_other():
    inputs = [draw(seed, 1, 1, 30000, torch.bfloat16) for seed in range(4)]
    alone = [decode_attention(*each, causal=False) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for each, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(decode_attention(*each, causal=False))
        torch.cuda.synchronize()
        for (out, lse), (truth, truth_lse) in zip(found, alone, strict=True):
            assert torch.equal(out, truth) and torch.equal(lse, truth_lse)


def test_a_graph_replayed_as_the_cache_grows():
    q, k, v = draw(3, 2, 1, 9000, torch.bfloat16)
    lengths = torch.ones(2, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode_attention(q, k, v, causal=False, lengths=lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode_attention(q, k, v, causal=False, lengths=lengths)
        more, _ = decode_attention(out, k, v, causal=False, lengths=lengths)  # takes over what the first one freed
    for columns in (1, 64, 65, 4000, 8999, 9000, 9000, 5, 9000):
        lengths.fill_(columns)
        graph.replay()
        eager, _ = decode_attention(q, k, v, causal=False, lengths=lengths)  # beside the graph's memory
        parts = k[:, :, :columns], v[:, :, :columns]
        assert torch.equal(out, eager)
        assert_attention(out, lse, q, *parts, mask_of(False, 1, columns), lse_atol=1e-4)
        assert torch.equal(more, decode_attention(out, k, v, causal=False, lengths=lengths)[0])


def test_a_layer_from_a_graph_is_the_layer():
    layer, hidden = Layer(2, 1000), torch.randn(2, 1, 4096, dtype=torch.bfloat16, device="cuda")
    eager = layer(hidden)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(hidden)
    graph.replay()
    torch.testing.assert_close(out, eager)


def test_compiled_without_breaks():
    def step(q, k, v, lengths):
        return decode_attention(2 * q, k, v, causal=False, lengths=lengths, backend="triton")

    q, k, v = draw(1, 2, 1, 3000, torch.float16)
    lengths = torch.tensor([3000, 7], dtype=torch.int32, device="cuda")
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k, v, lengths), step(q, k, v, lengths))
    torch.library.opcheck(torch.ops.apb.split_kv_decode.default, (q, k, v, False, 0.1, lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merge_in_place_is_the_pairs(dtype):
    whole, part = (torch.randn(2, 3000, 8, 128, device="cuda").transpose(1, 2) for _ in range(2))
    lse, part_lse = (20 * torch.randn(2, 8, 3000, device="cuda") for _ in range(2))
    part[:, 3], part_lse[:, 3], lse[:, 5] = torch.nan, -torch.inf, -torch.inf
    part, rows = part.to(dtype), slice(1000, 2777)
    out, found = whole.clone(), lse.clone()
    merge_into(out[:, :, rows], found[:, :, rows], part[:, :, rows], part_lse[:, :, rows])
    expected = merge_pair(*(x[:, :, rows].cpu() for x in (whole, lse, part, part_lse)))
    torch.testing.assert_close((out[:, :, rows].cpu(), found[:, :, rows].cpu()), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(out[:, :, :1000], whole[:, :, :1000]) and torch.equal(out[:, :, 2777:], whole[:, :, 2777:])


@pytest.mark.parametrize(("parts", "rows"), [(2, 3000), (8, 1), (9, 5), (33, 1)])
def test_merge_is_the_torch_backends(parts, rows):
    outs = torch.randn(parts, 2, 8, rows, 128, device="cuda")
    lses = 20 * torch.randn(parts, 2, 8, rows, device="cuda")
    lses[-1], outs[-1] = -torch.inf, torch.nan
    torch.testing.assert_close(merge(outs, lses), merge(outs, lses, backend="torch"), atol=2e-5, rtol=2e-5)
