"""What the sparse benchmark compares with what, without a GPU: calls that "take" what their names say."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from apb.attend import VerticalSlash
from apb.bench import sparse
from apb.bench.measure import Timing
from apb.bench.plots import read_ledger

MS = {"triton": 6.0, "hopper": 4.0, "sdpa": 9.0, "fa3": 3.0, "index": 0.5, "sparse": 1.5}


@pytest.fixture
def engine(monkeypatch):
    """Return what was to be timed in turns: the calls, and the names of those from a graph."""
    seen = []

    def time_in_turns(calls, *, graph=()):
        seen.append((dict(calls), list(graph)))
        times = {name: MS.get(name.split()[0], MS["sparse"]) for name in calls}
        return {name: Timing(ms, ms, ms) for name, ms in times.items()}

    def draw(tokens, q_heads, kv_heads):
        return tuple(torch.randn(1, heads, 128, 16) for heads in (q_heads, kv_heads, kv_heads))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sparse, "environment", lambda: dict.fromkeys(("date", "device", "torch", "triton", "commit"), "x")
    )
    monkeypatch.setattr(sparse, "time_in_turns", time_in_turns)
    monkeypatch.setattr(sparse, "_draw", draw)
    monkeypatch.setattr(
        sparse, "draw_index", lambda kind, pattern, tokens, heads: pattern.index(*draw(0, heads, 1)[:2])
    )
    monkeypatch.setattr(sparse, "CROSSOVER_TOKENS", (2048,))
    return seen


@pytest.mark.parametrize("auto", ["triton", "hopper"])
def test_the_crossover_is_against_what_auto_takes(engine, monkeypatch, tmp_path, auto):
    monkeypatch.setattr(sparse, "choose_backend", lambda q: auto)
    sparse.run(quick=True, out=tmp_path / "ledger.csv")
    ours = ["triton"] if auto == "triton" else ["triton", "hopper"]
    rows = read_ledger(tmp_path / "ledger.csv")
    exact = {row.backend: row.ms for row in rows if row.case == "crossover 2048"}
    assert exact == {backend: MS[backend] for backend in ours}
    for row in (row for row in rows if row.backend == "index+sparse"):
        assert row.ms == 2 and row.notes.endswith(f"from a CUDA graph: {MS[auto] / 2:.2f}× {auto}")
    for row in (row for row in rows if row.backend == "sparse"):
        assert all(f"{MS[peer] / 1.5:.2f}× {peer} (" in row.notes for peer in (*ours, "sdpa", "fa3")), row.notes
    for calls, graph in engine:
        assert {calls[name].keywords["backend"] for name in calls if name in ours} == set(ours)
        assert graph == [name for name in calls if name.startswith("index")] and graph


@pytest.mark.parametrize("pattern", [VerticalSlash(), sparse.LLAMA])
@pytest.mark.parametrize("tokens", [2048, 131072])
def test_making_an_index_waits_for_nothing(pattern, tokens):
    """So a CUDA graph can replay it: of tensors without contents nothing can be read."""
    with FakeTensorMode():
        q, k = (torch.empty(1, heads, tokens, 128) for heads in (32, 8))
        index = pattern.index(q, k)
    assert index.tiles.shape[:3] == (1, 32, 1)
