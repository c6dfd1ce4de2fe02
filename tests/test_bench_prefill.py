"""The prefill benchmark's three modes tell of the same prefill, and a run of them goes on whatever happens."""

import math
from dataclasses import replace

import pytest
import torch
from prefill_cases import CPU, SPREAD, TINY, contender, decoder

from apb.bench.prefill import counted, measured, run, simulated, started
from apb.bench.prefill.case import Case, phase_columns
from apb.bench.prefill.link import NVLINK, Link
from apb.bench.prefill.methods import PRESETS, QUERY_TOKENS, line_up
from apb.bench.prefill.record import PHASES
from apb.bench.prefill.run import cases, run_prefill
from apb.bench.prefill.share import Share
from apb.bench.prefill.store import key
from apb.context import Trace
from apb.parallel import HostFailed, LoneHost, run_processes, run_threads

MS = [f"{name}_ms" for name in PHASES]
LINK = Link(latency_ms=1.0, gbytes_per_s=1e-3)
"""So slow that messages show: 1 ms a message and 1 ms a kilobyte."""


def case(name, tokens=1024, hosts=2, **changes):
    (found,) = line_up([name], tokens, hosts)
    shape = replace(TINY, bytes_per_value=4)
    settings = {"shape": shape, "tokens": tokens, "hosts": found.hosts, "label": name, "device": CPU}
    return Case(method=found.make(), dtype=torch.float32, **(settings | changes))


def run_rows(*arguments, known=(), mode="counted", hosts=2, repeats=1, **more):
    """Run and return the rows, in the order in which they came, and what was said."""
    rows, said = [], []
    shape, tokens, names = arguments
    run_prefill(
        shape, tokens, hosts, names, mode, repeats, None, set(known), rows.append, said.append, device=CPU, **more
    )
    return rows, said


def check_row(row, mode, hosts):
    """Check what holds for every row that was timed."""
    assert (row.mode, row.shape, row.hosts) == (mode, "tiny", hosts)
    assert all(math.isfinite(getattr(row, name)) for name in (*MS, "query_ms", "peak_gbytes", "formula_gbytes"))
    assert sum(getattr(row, name) for name in MS) == pytest.approx(row.layer_ms)
    assert all(getattr(row, name) >= 0 for name in MS if name != "other_ms")
    assert row.ttft_ms == pytest.approx(TINY.layers * row.layer_ms + row.query_ms)
    assert row.low_ms <= row.ttft_ms * (1 + 1e-9) and row.ttft_ms <= row.high_ms * (1 + 1e-9)
    assert row.qkv_ms > 0 and row.attention_ms > 0 and row.o_ms > 0 and row.ffn_ms > 0
    assert len(row.load.split()) == hosts and max(map(float, row.load.split())) <= row.layer_ms * 1.01
    assert row.peak_gbytes > TINY.weight_bytes * 2 / 1e9


# Counted.


@pytest.mark.parametrize("name", PRESETS)
def test_counted_is_the_methods_cost(name):
    one = case(name, tokens=131072, hosts=8)
    row = counted.run_one(one)
    plan = one.method.plan(tokens=131072, hosts=one.hosts, query=QUERY_TOKENS)
    costs = [one.method.cost(plan, rank, one.shape) for rank in range(one.hosts)]
    assert row.tflop == max(cost.flops for cost in costs) / 1e12
    assert row.sent_mbytes == max(cost.sent_bytes for cost in costs) / 1e6
    assert [float(x) for x in row.load.split()] == pytest.approx([c.flops / 1e12 for c in costs], rel=1e-3)
    assert all(math.isnan(getattr(row, name)) for name in (*MS, "ttft_ms", "layer_ms", "query_ms", "peak_gbytes"))
    assert row.formula_gbytes > 0 and f"anchor {plan.anchor}, passing {plan.passing}" in row.notes


# Simulated.


@pytest.mark.parametrize("name", PRESETS)
def test_simulated_rows_are_whole(name):
    said = []
    one = case(name)
    row = simulated.run_one(one, repeats=2, link=LINK, on_progress=said.append)
    check_row(row, "simulated", one.hosts)
    assert said == [f"rank {rank} of {one.hosts}" for rank in range(one.hosts)]
    assert row.compress_ms > 0 or not name.startswith(("apb", "spava"))
    assert (str(LINK) in row.notes) == (one.hosts > 1)
    assert ("density 1.00" in row.notes) == (name == "minference")  # so few tokens are attended to exactly


@pytest.mark.parametrize("name", SPREAD)
def test_simulated_messages_cost_what_thread_hosts_count(name):
    """Each byte and message, in the prefill and the question's pass; as far as they do not hide under attention."""
    one = case(name, tokens=1021, hosts=3)
    model = decoder()
    method, plan = contender(name, 1021, 3, model)

    def body(host):
        share = Share(model, method, plan, host, caches=1)
        share.prefill([Trace()])
        before = host.counters.copy()
        share.ask([Trace()])
        return before, host.counters.since(before)

    found = run_threads(3, body)
    prefill, question = (
        max(sum(c.messages.values()) + sum(c.sent_bytes.values()) / 1e3 for c in counted_)
        for counted_ in zip(*found, strict=True)
    )
    free = Link(latency_ms=0, gbytes_per_s=math.inf)
    hosts = [simulated._time_host(one, model, method, rank, 2) for rank in range(3)]
    costly, gratis = (simulated._put_together(one, hosts, link) for link in (LINK, free))
    hidden = gratis["attention_ms"] if method.sends_under_attention else 0.0
    extra = max(0.0, prefill - hidden)
    assert costly["communicate_ms"] - gratis["communicate_ms"] == pytest.approx(extra)
    assert costly["layer_ms"] - gratis["layer_ms"] == pytest.approx(extra)
    assert costly["query_ms"] - gratis["query_ms"] == pytest.approx(TINY.layers * question)


def test_the_slowest_host_is_the_layer():
    def host(layer, attend):
        phases = [{"layer": ms, "attend": attend, "qkv": 1.0, "pass": 0.5} for ms in (layer, layer + 2, layer - 1)]
        none = simulated.Counters()
        return simulated._Timed(layers=phases, questions=[{"layer": 0.25}], logits_ms=0.5, sent=(none, none),
                                peak_bytes=0, queued_ms=1.0, density="")  # fmt: skip

    columns = simulated._put_together(case("star"), [host(10.0, 4.0), host(20.0, 7.0)], LINK)
    assert (columns["layer_ms"], columns["attention_ms"], columns["other_ms"]) == (20.0, 7.0, 11.5)
    assert (columns["ttft_ms"], columns["low_ms"], columns["high_ms"]) == (41.0, 39.0, 45.0)
    assert columns["load"] == "10 20"


def test_what_python_keeps_waiting_is_said():
    one = replace(case("star"), device=torch.device("cuda", 0))
    assert one.wait_note(9.0, 10.0) == "waits for Python: 9 ms a layer"
    assert not one.wait_note(7.0, 10.0) and not case("star").wait_note(9.0, 10.0)


def test_phases_go_into_the_papers_columns():
    phases = {"qkv": 1.0, "compress": 2.0, "index": 3.0, "attend": 4.0, "merge": 5.0, "pass": 6.0, "o": 7.0, "ffn": 8.0}
    assert phase_columns(phases, 50.0, 10.0) == {
        "layer_ms": 50.0, "qkv_ms": 1.0, "compress_ms": 2.0, "communicate_ms": 16.0, "attention_ms": 12.0, "o_ms": 7.0,
        "ffn_ms": 8.0, "other_ms": 4.0,
    }  # fmt: skip


# Measured.


@pytest.mark.parametrize("name", ["flash", "ring", "apb-balanced", "spava"])
def test_measured_rows_are_whole(name):
    (row,), _ = run_rows("tiny", [1024], [name], mode="measured", repeats=2)
    check_row(row, "measured", 1 if name == "flash" else 2)
    assert "2 repeats" in row.notes


def under_torchrun(host, names, known):
    """Play one rank of torchrun; return the rows that it was given."""
    run.host_from_env = lambda **_: host
    return run_rows("tiny", [512], names, known=known if host.rank == 0 else (), mode="measured")[0]


def test_ranks_of_torchrun_go_through_one_loop():
    """A one-host method, one that is known (to rank 0 only), one that cannot run, one that can: rank 0 tells of all."""
    (row,), _ = run_rows("tiny", [512], ["star"], mode="counted")
    known = {key(replace(row, mode="measured", backend="sdpa", dtype="float32"))}
    names = ["flash", "star", "apb:compressor=retaining-head", "apb:anchor=9999", "ring"]
    with pytest.raises(ValueError, match="heads: the retaining head needs a checkpoint"):
        run_rows("tiny", [512], names)
    names.remove("apb:compressor=retaining-head")
    first, second = run_processes(2, under_torchrun, names, known)
    assert second == [] and [row.method for row in first] == ["flash", "apb:anchor=9999", "ring"]
    flash, infeasible, ring = first
    check_row(flash, "measured", 1)
    check_row(ring, "measured", 2)
    assert math.isnan(infeasible.ttft_ms) and infeasible.notes.startswith("ValueError: anchor: 9999 tokens")


def test_what_fails_in_the_rehearsal_fails_on_all_hosts_alike(monkeypatch):
    """As where one host runs out of memory: the group lives on."""
    rehearse = measured._rehearse

    def too_large(one, rank):
        if one.label == "star" and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nand more")
        return rehearse(one, rank)

    monkeypatch.setattr(measured, "_rehearse", too_large)
    failed, fine = run_processes(2, under_torchrun, ["star", "ape"], ())[0]
    assert "rank 1 of 2 failed: OutOfMemoryError: CUDA out of memory" in failed.notes
    check_row(fine, "measured", 2)


def test_a_failure_between_messages_ends_the_run_of_a_group_and_tells_why(monkeypatch):
    def broken(share, one, repeats):
        if share.host.rank == 1:
            raise ValueError("scores: NaN")
        return [share.host.all_gather_object(None, what="x") for _ in range(2)]

    monkeypatch.setattr(measured, "_time", broken)
    with pytest.raises(Exception, match="scores: NaN"):
        run_processes(2, under_torchrun, ["star", "ape"], (), timeout_s=10)
    (row,), _ = run_rows("tiny", [512], ["star"], mode="measured")  # processes of its own: only a row
    assert "scores: NaN" in row.notes and math.isnan(row.ttft_ms)


def test_a_group_measures_on_all_its_hosts():
    with pytest.raises(ValueError, match=r"hosts: torchrun started 1 ranks, got \[2\]"):
        run_processes(1, under_torchrun, ["ring"], ())
    with pytest.raises(ValueError, match="hosts: the group has 2, got 3"):
        measured._measure(LoneHost(0, 2), case("ring", hosts=3), 1)


# A run of them.


def test_a_run_leaves_out_what_is_known_and_one_host_methods_run_once():
    names = ["flash", "ring", "apb"]
    rows, said = run_rows("tiny", [512, 1024], names, mode="simulated", hosts=[2, 3])
    asked = [(row.tokens, row.hosts, row.method) for row in rows]
    assert asked == [
        (n, hosts, name) for n in (512, 1024) for hosts, name in
        ((1, "flash"), (2, "ring"), (2, "apb"), (3, "ring"), (3, "apb"))
    ]  # fmt: skip
    assert said[0] == "flash, 512 tokens: rank 0 of 1"
    known = {key(row) for row in rows if row.method != "ring"}
    again, _ = run_rows("tiny", [512, 1024], names, known=known, mode="simulated", hosts=[2, 3])
    assert [key(row) for row in again] == [key(row) for row in rows if row.method == "ring"]


def test_rows_are_known_by_backend_precision_and_link():
    """ "auto" is told by what it takes; what is on one host has no link, and what is counted no backend."""
    asked = ("tiny", [512], ["flash", "ring", "star:backend=reference"])
    rows, _ = run_rows(*asked, mode="simulated")
    assert [row.backend for row in rows] == ["sdpa", "sdpa", "reference"]
    assert [row.link for row in rows] == ["", str(NVLINK), str(NVLINK)] and {row.dtype for row in rows} == {"float32"}
    assert all("fitted between 2 hosts" in row.notes for row in rows[1:])
    known = {key(row) for row in rows}
    assert run_rows(*asked, mode="simulated", known=known) == ([], [])
    others, _ = run_rows(*asked, mode="simulated", known=known, backend="reference")
    assert [(row.method, row.backend) for row in others] == [("flash", "reference"), ("ring", "reference")]
    others, _ = run_rows(*asked, mode="simulated", known=known, dtype=torch.bfloat16)
    assert [row.dtype for row in others] == ["bfloat16"] * 3
    assert {(row.backend, row.link, row.dtype) for row in run_rows(*asked)[0]} == {("", "", "bfloat16")}
    cuda = cases("tiny", [512], [2], ["apb", "apb:backend=hopper"], "simulated", LINK, device=CPU)
    assert [found.backend for found in cuda] == ["sdpa", "hopper"] and {found.link for found in cuda} == {str(LINK)}


def test_lists_of_tiles_are_not_said_to_run_in_a_kernel_that_has_none(monkeypatch):
    """Nor are short documents, which MInference attends to exactly, said to run in the lists' one."""
    monkeypatch.setattr(run, "choose_backend", lambda q: "hopper")
    names = ["flash", "minference", "minference:dense_below=64", "minference:backend=hopper", "minference:backend=sdpa"]

    def backends(tokens, **more):
        found = cases("llama-3.1-8b", [tokens], [2], names, "simulated", None, device=CPU, **more)
        return [case.backend for case, _ in found.values()]

    assert backends(8192) == ["hopper", "hopper", "triton", "hopper", "sdpa"]
    assert backends(16384) == ["hopper", "triton", "triton", "triton", "sdpa"]
    assert backends(16384, backend="flex") == ["flex", "triton", "triton", "triton", "sdpa"]


@pytest.mark.parametrize("mode", ["counted", "simulated"])
def test_a_method_that_cannot_run_is_a_row(mode):
    rows, _ = run_rows("tiny", [128], ["apb", "ulysses"], mode=mode)
    assert [row.method for row in rows] == ["apb", "ulysses"]
    assert math.isnan(rows[0].tflop) and math.isnan(rows[0].ttft_ms) and rows[0].notes.startswith("ValueError: query:")
    assert rows[1].tflop > 0


def test_memory_that_runs_out_is_a_row(monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(simulated, "Decoder", run_out)
    (row,), _ = run_rows("tiny", [512], ["ring"], mode="simulated")
    assert row.notes == "OutOfMemoryError: CUDA out of memory" and (row.method, row.hosts) == ("ring", 2)


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("llama", [512], ["ring"]), {}, "shape: expected one of llama-3.1-8b, .* got 'llama'"),
        (("tiny", [0], ["ring"]), {}, "tokens: expected an integer ≥ 1, got 0"),
        (("tiny", [512], ["ring"]), {"hosts": [2, 0]}, "hosts: expected an integer ≥ 1, got 0"),
        (("tiny", [512], ["ring"]), {"repeats": 0}, "repeats: expected an integer ≥ 1, got 0"),
        (("tiny", [512], ["rings"]), {}, "methods: expected one of flash, .* got 'rings'"),
        (("tiny", [512], ["apb:passing=x"]), {}, "passing: expected an integer, got 'x'"),
    ],
)
def test_errors_come_before_anything_runs(arguments, options, error):
    with pytest.raises(ValueError, match=error):
        run_rows(*arguments, **options)


def test_hosts_that_died_are_told_of(monkeypatch):
    def die(*_, **__):
        raise HostFailed("rank 1 of 2 was killed by SIGKILL")

    monkeypatch.setattr(started, "run_processes", die)
    rows, _ = run_rows("tiny", [512], ["ring", "star"], mode="measured")
    assert [row.notes for row in rows] == ["HostFailed: rank 1 of 2 was killed by SIGKILL"] * 2
