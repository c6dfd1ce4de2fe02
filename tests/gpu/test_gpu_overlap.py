"""Gathers run beside computing, on a stream of their own, and their memory is safe; the benchmarks of it run."""

import math
from functools import partial

import pytest
import torch

from apb.bench import end_to_end, overlap
from apb.bench.plots import bars
from apb.bench.trace import hidden, profile, read_spans
from apb.parallel import run_processes

pytestmark = [pytest.mark.gpu, pytest.mark.multigpu, pytest.mark.timeout(300)]


LAYOUTS = list(overlap.LAYOUTS)


def look(host):
    """Return what rank 1's device did in a gather beside products, and in one layer of each layout."""
    a = torch.randn(4096, 4096, device=host.device, dtype=torch.bfloat16)
    x = torch.randn(1 << 26, device=host.device)

    def beside_products():
        gather = host.all_gather(x, what="x")
        for _ in range(30):
            a @ a
        gather.wait()

    layers = {layout: overlap._Layer(host, layout, 65536, overlap.HEADS) for layout in LAYOUTS}
    calls = {"products": beside_products} | {layout: partial(layer, host) for layout, layer in layers.items()}
    return {name: profile(call, host, rank=1) for name, call in calls.items()}


@pytest.fixture(scope="module")
def seen():
    return run_processes(2, look, backend="nccl")[1]


def test_a_gather_runs_beside_later_kernels_on_a_stream_of_its_own(seen):
    gathers = [span for span in seen["products"] if span.kind == "gather"]
    products = [span for span in seen["products"] if span.kind == "other"]
    assert len(gathers) == 1 and len(products) >= 30
    assert gathers[0].stream not in {span.stream for span in products}
    assert hidden(seen["products"]) > 0.5, seen["products"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_layer_sends_runs_beside_its_kernels(seen, layout):
    spans = seen[layout]
    gathers = [span for span in spans if span.kind == "gather"]
    assert len(gathers) == (1 if layout == "contiguous" else 2)
    assert {span.stream for span in gathers}.isdisjoint(span.stream for span in spans if span.kind == "attend")
    kinds = {span.kind for span in spans}
    assert "attend" in kinds and ("select" in kinds or layout == "contiguous")  # where it has the last block
    if layout == "zigzag":  # under the second block's selection and the first one's attention
        assert hidden(spans) > 0, spans


def memory(host):
    """Give up what is sent, and once what comes, while it is under way; memory used again would show."""
    n = host.world_size
    for step in range(20):
        torch.cuda._sleep(2_000_000 * ((host.rank + step) % 7))  # hosts are late in turn
        gather = host.all_gather(torch.full((1 << 22,), float(step * 10 + host.rank), device=host.device), what="x")
        host.all_gather(torch.full((1 << 20,), 1.0, device=host.device), what="never waited for")
        junk = [torch.full((1 << 22,), -1.0, device=host.device) for _ in range(2 * n)]
        got = [part.double().mean() for part in gather.wait()]
        assert torch.stack(got).tolist() == [step * 10 + rank for rank in range(n)]
        assert all(float(part.mean()) == -1 for part in junk)


def test_memory_of_gathers_under_way_is_not_used_again():
    run_processes(2, memory, backend="nccl")


def test_the_overlap_benchmark(tmp_path):
    pytest.importorskip("matplotlib")
    ledger = tmp_path / "ledger.csv"
    rows = overlap.run(quick=True, out=ledger, tokens=(16384, 32768), hosts=2)
    assert all(row.ms > 0 for row in rows if row.backend not in ("longer", "exposed")) and len(rows) == 18
    line, spans = read_spans(tmp_path / "overlap_trace.csv")
    assert line.case == "balanced 16384 on 2" and 0 <= hidden(spans) <= 1
    assert overlap.plot(ledger, tmp_path / "overlap.svg").stat().st_size > 1000
    assert bars(ledger, "overlap", tmp_path / "bars.svg").stat().st_size > 1000


def test_end_to_end_on_two_devices(tmp_path):
    names = ("apb-balanced", "ring-zigzag", "ulysses")
    rows = end_to_end.run(out=tmp_path / "ledger.csv", shape="tiny", tokens=4096, new_tokens=8, hosts=2, methods=names)
    firsts = rows[::2]
    assert [row.backend for row in firsts] == list(names)
    assert all(math.isfinite(row.ms) and "peak" in row.notes for row in firsts)
    assert "ring-zigzag" in firsts[-1].notes and "first logits at most" in firsts[-1].notes


def test_more_than_the_memory_holds_is_a_row():
    """Its 4 million rows a host want 34 GB for each of a layer's hidden states in bfloat16, twice that in float32."""
    (row,) = end_to_end.run(tokens=8_000_000, new_tokens=2, hosts=2, repeats=1, methods=("ring-zigzag",))
    assert math.isnan(row.ms) and "OutOfMemory" in row.notes
