"""What the overlap benchmark counts and draws; the benchmark itself on two processes of a CPU."""

import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.bench import hosts as bench_hosts
from apb.bench import overlap, ring
from apb.bench.hosts import Heads, Times, find_hosts, report, slowest_ms, time_layer
from apb.bench.measure import Timing
from apb.bench.plots import read_ledger
from apb.bench.timeline import timeline
from apb.bench.trace import Span, common, gather_ms, hidden, profile, read_spans, spans_of, union, write_spans
from apb.parallel import LoneHost, run_processes, run_threads

SMALL = Heads(4, 2, 16)
ENV = {"date": "2026-01-02", "device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}
KINDS = ["select", "attend", "gather", "copy", "other"]


def span(kind, start, stop, stream=7):
    return Span(stream=stream, kind=kind, name=kind, start_us=start, us=stop - start)


@st.composite
def spans_in_whole_microseconds(draw):
    found = []
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.integers(0, 40))
        found.append(span(draw(st.sampled_from(KINDS)), start, start + draw(st.integers(0, 15))))
    return found


@given(spans_in_whole_microseconds())
def test_hidden_counts_microseconds(spans):
    def runs(at, wanted):
        return any(one.start_us <= at < one.stop_us and (one.kind == "gather") == wanted for one in spans)

    gathering = [at for at in range(60) if runs(at, True)]
    assert gather_ms(spans) == pytest.approx(len(gathering) / 1e3)
    if not gathering:
        assert math.isnan(hidden(spans))
    else:
        assert hidden(spans) == pytest.approx(sum(runs(at, False) for at in gathering) / len(gathering))


INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8)


@given(INTERVALS, INTERVALS)
def test_unions_and_common_times(some, others):
    def covered(intervals):
        return {at for start, stop in intervals for at in range(start, stop)}

    a, b = union(some), union(others)
    assert covered(a) == covered(some) and covered(common(a, b)) == covered(some) & covered(others)
    assert all(one[1] < after[0] for one, after in pairwise(a))


def test_a_trace_is_reduced_to_what_ran_on_the_device_in_the_last_step():
    def event(name, cat, ts, dur=2.0, stream=7):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}

    trace = {"traceEvents": [
        {"ph": "M", "name": "process_name"},
        event("ProfilerStep#1", "user_annotation", 90.0, 100.0),
        event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", "kernel", 80.0, stream=21),
        event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", "kernel", 110.5, 8.25, stream=21),
        event("retaining_head_kernel", "kernel", 100.5),
        event("aten::cat", "cpu_op", 95.0),
        event("hopper_flash_kernel", "kernel", 112.5),
        event("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 103.0),
        event("void at::native::CatArrayBatchedCopy<c10::BFloat16>", "kernel", 104.0),
        event("gather_kernel", "kernel", 102.0),
        event("at::cuda::(anonymous namespace)::spin_kernel(long)", "kernel", 96.0),  # what it was queued behind
        event("void at::native::elementwise<x>", "kernel", 115.0),
    ]}  # fmt: skip
    found = spans_of(trace)
    kinds = ["select", "select", "copy", "copy", "gather", "attend", "other"]
    assert [one.kind for one in found] == kinds
    assert [one.start_us for one in found] == [0.0, 1.5, 2.5, 3.5, 10.0, 12.0, 14.5]
    assert (found[4].stream, found[4].us) == (21, 8.25) and {one.stream for one in found if one.kind != "gather"} == {7}
    assert spans_of({"traceEvents": []}) == []


SPANS = [span("select", 0, 120.5), span("gather", 121, 250, 21), span("select", 121, 200), span("attend", 210, 4000)]


def test_spans_are_written_and_the_newest_run_read_back(tmp_path):
    path = tmp_path / "spans.csv"
    older = {**ENV, "date": "2026-01-01"}
    write_spans(path, older, "contiguous 512 on 2", SPANS[:2])
    named = [replace(one, name={"gather": "ncclAllGather", "attend": "flash"}.get(one.kind, "score")) for one in SPANS]
    write_spans(path, ENV, "zigzag 512 on 2", named)
    line, read = read_spans(path)
    assert read == named and line.case == "zigzag 512 on 2" and line.date == "2026-01-02"
    with pytest.raises(ValueError, match="expected the spans of a run, got none"):
        read_spans(tmp_path / "nothing.csv")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    text = timeline(SPANS, tmp_path / "spans.svg", title="zigzag 512").read_text()
    drawn = [line for line in text.splitlines() if "<!--" in line]
    for words in ("zigzag 512", "stream 7", "stream 21", "gather, hidden", "gather, exposed", "attention", "µs",
                  "92% of the gathers' time", "enlarged below"):  # fmt: skip
        assert any(words in line for line in drawn), (words, drawn)
    assert not any("copy" in line for line in drawn)
    assert timeline(SPANS[:1], tmp_path / "one.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="at least 1 to draw"):
        timeline([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="svg"):
        timeline(SPANS, tmp_path / "spans.txt")


def test_the_plot_is_drawn_from_beside_the_ledger(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="only a GPU's run has some"):
        overlap.plot(tmp_path / "ledger.csv", tmp_path / "overlap.svg")
    write_spans(tmp_path / "overlap_trace.csv", ENV, "balanced 512 on 2", SPANS)
    text = overlap.plot(tmp_path / "ledger.csv", tmp_path / "overlap.svg").read_text()
    assert "balanced 512 on 2 hosts" in text and "a GPU, torch 2, triton 3, abc, 2026-01-02" in text


def test_times_and_their_rows(capsys):
    times = Times(
        Timing(10.0, 9.5, 11.0), Timing(9.0, 8.0, 9.5), Timing(4.0, 3.0, 5.0), Timing(1.0, 0.5, 1.25),
        gathers=Timing(2.0, 2.0, 2.0), exposed=Timing(0.5, 0.25, 0.5),
    )  # fmt: skip
    rows = report(ENV, "overlap", "zigzag", 512, 2, times, flop=5e12)
    assert [(row.backend, row.ms) for row in rows] == [
        ("layer", 10.0), ("compute alone", 9.0), ("send alone", 4.0), ("longer", 1.0), ("gathers", 2.0),
        ("exposed", 0.5),
    ]  # fmt: skip
    assert (rows[0].low_ms, rows[0].high_ms, rows[0].tflops) == (9.5, 11.0, 500.0) and math.isnan(rows[1].tflops)
    assert (rows[3].low_ms, rows[3].high_ms) == (0.5, 1.25) and "96 %" in rows[3].notes and math.isnan(rows[3].tflops)
    assert {row.case for row in rows} == {"zigzag 512 on 2"} and times.hidden == 0.75
    said = "longer for its sending by 1.000 (0.500 – 1.250) ms; 75% of 2.000 ms of gathers hidden"
    assert rows[0].notes.endswith(said) and said in capsys.readouterr().out and not rows[1].notes


@pytest.mark.parametrize(("low", "high", "apart"), [(-0.5, 0.5, False), (-0.5, -0.1, True), (0.1, 2.0, True)])
def test_what_cannot_be_told_apart_from_nothing_is_said(low, high, apart):
    one = Timing(1.0, 1.0, 1.0)
    notes = Times(one, one, one, Timing((low + high) / 2, low, high)).notes
    assert ("not told apart from 0" in notes) is not apart and "hidden" not in notes


def test_the_slowest_host_counts_each_time():
    def body(host):
        return slowest_ms([lambda: None, lambda: time.sleep(0.02 * host.rank)], host, repeats=3)

    quick, slow = run_threads(3, body)[0]
    assert len(quick) == len(slow) == 3 and min(slow) >= 40 and max(quick) < 40


def test_calls_take_turns_there_and_back():
    order = []
    slowest_ms([lambda: order.append("a"), lambda: order.append("b")], LoneHost(0, 1), repeats=3)
    assert "".join(order) == "abbaabba"


@given(st.lists(st.integers(1, 1000), min_size=15, max_size=15), st.lists(st.integers(0, 9), min_size=15, max_size=15))
def test_a_layer_is_compared_with_the_one_timed_next_to_it(alone, more):
    """However far the clocks go, what is more each time is found."""
    times = [one + m for one, m in zip(alone, more, strict=True)], alone, [1] * 15
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_hosts, "slowest_ms", lambda calls, host: times)
        found, spans = time_layer(*[lambda: None] * 3, LoneHost(0, 2))
    assert found.longer == (sorted(more)[7], sorted(more)[3], sorted(more)[11]) and spans == []
    assert found.compute == Timing.of(alone) and math.isnan(found.hidden)


def test_what_traces_tell(monkeypatch):
    host = LoneHost(1, 2)
    host.device = torch.device("cuda", 0)
    traces = iter([SPANS[:1], *([*SPANS, span("gather", 4000, 4000 + 100 * n, 21)] for n in (0, 1, 2, 3))])
    monkeypatch.setattr(bench_hosts, "slowest_ms", lambda calls, host: [[1.0] * 15] * 3)
    monkeypatch.setattr(bench_hosts, "profile", lambda call, host, rank: next(traces))
    found, spans = time_layer(*[lambda: None] * 3, host)
    assert found.gathers.ms == pytest.approx(0.229) and found.exposed.ms == pytest.approx(0.11)
    assert len(spans) == 5 and spans[-1].us == 300


def test_a_cpu_has_no_kernels_to_look_at():
    assert profile(lambda: torch.ones(2) + 1, LoneHost(0, 1)) == []


def test_who_can_be_measured(monkeypatch):
    monkeypatch.setattr(bench_hosts.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match=r"apb bench ring needs two or more CUDA devices .* has 1"):
        find_hosts("ring")
    with pytest.raises(ValueError, match="hosts: expected at least 2, which send to each other, got 1"):
        find_hosts("overlap", 1)
    assert find_hosts("overlap", 3)[:2] == (3, "gloo")
    monkeypatch.setattr(bench_hosts.torch.cuda, "device_count", lambda: 4)
    assert find_hosts("overlap")[:2] == (4, "nccl") and find_hosts("overlap", 2)[:2] == (2, "nccl")


@pytest.mark.parametrize("layout", overlap.LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_sent_alone_is_what_the_layer_sends(layout, world_size):
    def body(host):
        layer = overlap._Layer(host, layout, 1024, SMALL)
        noting = overlap._Noting(host)
        layer(noting)
        out = layer(host)
        assert out.shape == layer.q.shape and out.isfinite().all()
        noted = sum((world_size - 1) * x.nbytes for x, _ in noting.gathered)
        cost = layer.method.cost(layer.plan, host.rank, replace(layer.shape, bytes_per_value=4))
        assert noted == sum(host.counters.sent_bytes.values()) == cost.sent_bytes
        assert len(noting.gathered) == cost.messages == (1 if layout == "contiguous" else 2)

    run_threads(world_size, body)


def test_ring_on_two_processes(monkeypatch):
    monkeypatch.setattr(ring, "HEADS", SMALL)
    ((times,), _) = run_processes(2, ring._measure, [("zigzag", 64)])
    assert isinstance(times, Times) and all(timing.ms > 0 for timing in times[:3])


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there it is measured on the GPUs: tests/gpu")
def test_on_two_processes_of_a_cpu(tmp_path, capsys):
    rows = overlap.run(quick=True, out=tmp_path / "ledger.csv", heads=SMALL, tokens=(512, 1024), hosts=2)
    assert [row.case for row in rows[::4]] == [f"{layout} 512 on 2" for layout in overlap.LAYOUTS]
    assert all(row.ms > 0 for row in rows if row.backend != "longer") and all(row.tflops > 0 for row in rows[::4])
    assert {row.backend for row in rows} == {"layer", "compute alone", "send alone", "longer"}  # a CPU is not traced
    assert len(read_ledger(tmp_path / "ledger.csv")) == len(rows) == 12
    printed = capsys.readouterr().out
    assert "4/2 heads of 16, fp32" in printed and "balanced     512" in printed
    assert not (tmp_path / "overlap_trace.csv").exists()  # a CPU has no kernels
