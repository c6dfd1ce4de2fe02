"""The benchmarks on a GPU: calls that take turns, peers that must not fail, hosts that are started once."""

import math
import time
import warnings

import pytest
import torch

from apb.attend import choose_backend
from apb.bench import backward, decode, kernel, sparse
from apb.bench.measure import Bench, Timing, time_in_turns
from apb.bench.prefill.run import run_prefill

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def product(size=4096):
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return lambda: a @ a


def test_the_same_call_takes_the_same_time_whoever_comes_first():
    found = time_in_turns({name: product() for name in "abcd"})
    times = [timing.ms for timing in found.values() if isinstance(timing, Timing)]
    assert len(times) == 4 and max(times) < 1.1 * min(times), found
    assert all(timing.low_ms <= timing.ms <= timing.high_ms for timing in found.values())


def test_a_graph_leaves_launching_out():
    x = torch.zeros(16, device="cuda")

    def many():
        for _ in range(100):
            x.add_(1)

    def slow():
        time.sleep(1e-3)
        many()

    found = time_in_turns({"graph": slow, "eager": slow}, graph=["graph"], repeats_ms=50)
    assert found["graph"].ms < 0.8 and found["eager"].ms > 0.9, found


def test_a_peer_without_memory_is_noted_and_the_others_go_on():
    def greedy():
        return torch.empty(1 << 42, device="cuda", dtype=torch.uint8)

    found = time_in_turns({"greedy": greedy, "product": product()}, graph=["greedy"], repeats_ms=50)
    assert str(found["greedy"]).startswith("OutOfMemoryError") and isinstance(found["product"], Timing)


def test_an_index_is_made_in_a_graph():
    """Nothing in it waits for the device; what is replayed is what is made without one, and on the GPU no slower."""
    q, k, _ = sparse._draw(8192, *sparse.GROUPS[-1])
    made = []
    calls = {name: lambda: made.append(sparse.LLAMA.index(q, k)) for name in ("graph", "eager")}
    found = time_in_turns({"graph": calls["graph"]}, graph=calls, repeats_ms=50)
    eager = time_in_turns({"eager": calls["eager"]}, repeats_ms=50)
    graphed, plain = made[3], made[-1]  # behind three calls that warm up, the one that is captured
    assert isinstance(found["graph"], Timing), found
    assert torch.equal(graphed.tiles, plain.tiles) and torch.equal(graphed.columns, plain.columns)
    assert found["graph"].ms < 1.1 * eager["eager"].ms, (found, eager)


def test_exact_attention_is_there_by_every_kernel_of_ours(monkeypatch):
    monkeypatch.setattr(sparse, "CROSSOVER_TOKENS", (2048,))
    monkeypatch.setattr(sparse, "GROUPS", ((4, 1),))
    rows = [row for row in sparse.run(quick=True) if row.backend != "fa3"]
    auto = choose_backend(torch.empty(1, 1, 1, sparse.DIM, device="cuda", dtype=torch.bfloat16))
    assert all(row.ms > 0 for row in rows), [(row.case, row.backend, row.notes) for row in rows]
    assert {row.backend for row in rows if row.case == "crossover 2048"} == {"triton", auto}
    assert all(row.notes.endswith(f"× {auto}") for row in rows if row.backend == "index+sparse")


def test_ceilings(capsys):
    bench = Bench("ceilings")
    assert bench.tflops_ceiling > 10 and bench.gbytes_ceiling > 100
    rows = bench.finish(None)
    print(capsys.readouterr().out)
    assert len(rows) == 6 and all(row.ms > 0 for row in rows)
    for first, last in zip(rows[:3], rows[3:], strict=True):
        assert last.case == f"{first.case}, at the end" and last.ms == pytest.approx(first.ms, rel=0.3)


def test_flex_goes_backward_again_and_again_at_several_shapes(monkeypatch):
    monkeypatch.setattr(backward, "SHAPES", (kernel.Shape(128, 256, 512), kernel.Shape(256, 512, 1024)))
    monkeypatch.setattr(backward, "CAUSAL", kernel.Shape(0, 0, 1024))
    rows = [row for row in backward.run() if row.backend != "cublas"]
    assert len(rows) == 10 and all(math.isfinite(row.ms) for row in rows), [(row.backend, row.notes) for row in rows]


def test_flex_decodes_with_a_kernel_that_shares_out_the_keys():
    """With one program for all keys of a head it takes more than ten times as long as the others."""
    calls = dict(decode._contenders(1, 65536))
    ours, _ = calls["triton"]()
    torch.testing.assert_close(calls["flex"](), ours, atol=2e-4, rtol=2e-2)
    found = time_in_turns(calls, graph=calls, repeats_ms=100)
    assert found["flex"].ms < 4 * found["sdpa"].ms, found


def test_nothing_takes_some_time_and_warns_of_nothing():
    bench = Bench("nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode._measure_nothing(bench)
    assert [row.backend for row in bench.rows] == ["empty graph", "one number"]
    assert all(0 < row.ms < 0.1 for row in bench.rows), bench.rows


@pytest.mark.multigpu
def test_hosts_are_started_once():
    rows, said = [], []
    names = ["flash", "ring-zigzag", "apb:anchor=99999", "apb-balanced", "ulysses"]
    run_prefill("tiny", [4096, 8192], 2, names, "measured", 1, None, set(), rows.append, said.append)
    assert [text for text in said if text.startswith("starting")] == ["starting 1 host", "starting 2 hosts"]
    assert len(rows) == 10
    assert all((row.ttft_ms > 0) == ("99999" not in row.method) for row in rows), [row.notes for row in rows]
