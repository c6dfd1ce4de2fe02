"""The benchmark core without a GPU: rows, failures, the ledger, and pictures that are drawn from it."""

import csv
import itertools
import math
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch._functorch import config as functorch_config

from apb.bench import Row, append, backward, kernel, measure
from apb.bench.measure import Bench, Timing, time_in_turns
from apb.bench.plots import _ceiling, bars, newest_run, read_ledger

LEDGER = Path(__file__).parents[1] / "benchmarks" / "ledger.csv"


def take(call, repeats, *, warm=0):
    return [call() for _ in range(warm + repeats)][warm:]


class Ceiling:
    """A call that takes `ms`."""

    def __init__(self, ms):
        self.ms = ms

    def __call__(self):
        return self.ms


@pytest.fixture
def ceiling():
    """Return what large products and copies call."""
    return Ceiling(1.0)


@pytest.fixture
def bench(monkeypatch, ceiling, capsys):
    """Return a Bench whose calls "take" the milliseconds that they return; the ceilings are 800 and 3000 at first."""
    products = [measure._Most("matmul", "cublas", ceiling, 800e9)]
    copies = [measure._Most("copy", "cuda", ceiling, 2e9), measure._Most("sum", "cuda", ceiling, 3e9)]
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "environment", lambda: {
        "date": "2026-01-02", "device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"
    })  # fmt: skip
    monkeypatch.setattr(measure, "_event_ms", take)
    monkeypatch.setattr(measure, "_captured", lambda call: call)
    monkeypatch.setattr(measure, "_products", lambda: products)
    monkeypatch.setattr(measure, "_copies", lambda: copies)
    return Bench("merge")


def fail():
    raise RuntimeError("no kernel image\nand a long trace")


def test_rows_have_rates_and_spread(bench, capsys):
    times = itertools.cycle([2.0, 1.0, 3.0])
    bench.compare("2 parts", {"triton": lambda: next(times), "eager": lambda: 4.0}, moved=3e9)
    bench.compare("2 parts", {"torch": lambda: 4.0}, flop=2e12, notes="as it is")
    first, second, third = (row for row in bench.rows if row.backend not in ("cublas", "cuda"))
    assert (first.benchmark, first.case, first.backend, first.device) == ("merge", "2 parts", "triton", "a GPU")
    assert (first.ms, first.low_ms, first.high_ms) == pytest.approx((2.0, 1.0, 3.0))
    assert first.gbytes == pytest.approx(1500) and math.isnan(first.tflops) and second.gbytes == pytest.approx(750)
    assert third.tflops == pytest.approx(500) and math.isnan(third.gbytes) and third.notes == "as it is"
    printed = capsys.readouterr().out
    assert "1500 GB/s" in printed and " 50%" in printed and "500 TFLOP/s" in printed and "62%" in printed


def test_a_failure_is_a_row_and_not_the_end(bench):
    bench.compare("2 parts", {"peer": fail, "triton": lambda: 1.0}, moved=1e9)
    peer, triton = bench.rows[-2:]
    assert (peer.notes, triton.notes) == ("RuntimeError: no kernel image", "")
    assert math.isnan(peer.ms) and math.isnan(peer.gbytes) and triton.ms == 1.0


def test_a_call_that_fails_later_has_no_part_in_later_rounds(bench):
    calls = iter([1.0] * 6)
    tried = []

    def failing():
        tried.append(len(tried))
        return next(calls)

    found = time_in_turns({"a": failing, "b": lambda: 2.0}, repeats_ms=10)
    assert str(found["a"]).startswith("StopIteration") and found["b"] == Timing(2.0, 2.0, 2.0)
    assert len(tried) == 7


@pytest.mark.parametrize("count", range(2, 10))
def test_none_comes_right_behind_the_same_one_in_most_rounds(monkeypatch, count):
    order = []
    monkeypatch.setattr(measure, "_event_ms", lambda call, repeats, warm=0: [call()] * (repeats if warm else 1))
    calls = {str(number): lambda number=number: order.append(number) or 1.0 for number in range(count)}
    time_in_turns(calls, repeats_ms=5)
    turns = order[2 * count :]  # behind the first calls and the estimates
    rounds = [turns[start : start + count] for start in range(0, len(turns), count)]
    assert len(rounds) == 5 and all(sorted(one) == list(range(count)) for one in rounds)
    within = Counter(pair for one in rounds for pair in pairwise(one))
    assert max(within.values()) <= (3 if count == 2 else 2)  # of five rounds; two can only alternate
    assert (
        max(Counter(pairwise(turns)).values()) <= 3
    )  # the end of one round and the beginning of the next counted, too
    assert len({one[0] for one in rounds}) >= min(count, 3)


@given(st.lists(st.floats(0.5, 50), min_size=2, max_size=6), st.floats(-0.9, 0.9), st.floats(0.2, 5))
def test_clocks_that_drift_one_way_leave_what_lies_in_one_round(bases, drift, bend):
    turns = 0

    def slower(turn):
        return 1 + drift * (turn / (5 * len(bases))) ** bend

    def event_ms(call, repeats, *, warm=0):
        nonlocal turns
        turns += bool(warm)
        return [call() * slower(turns)] * repeats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_event_ms", event_ms)
        found = time_in_turns({str(n): lambda base=base: base for n, base in enumerate(bases)})
    least, most = sorted((slower(2 * len(bases) + 1), slower(3 * len(bases))))  # of the round in the middle
    for n, base in enumerate(bases):
        timing = found[str(n)]
        assert isinstance(timing, Timing) and least * (1 - 1e-9) <= timing.ms / base <= most * (1 + 1e-9)


def test_the_ceilings_are_measured_when_they_are_needed_and_at_the_end(bench, ceiling, capsys):
    bench.compare("2 parts", {"triton": lambda: 1.0}, moved=1.5e9)
    ceiling.ms = 1.25  # the clocks have gone down
    bench.finish(None)
    rows = [(row.case, row.backend, round(row.gbytes)) for row in bench.rows]
    assert rows == [
        ("copy", "cuda", 2000), ("sum", "cuda", 3000), ("2 parts", "triton", 1500),
        ("copy, at the end", "cuda", 1600), ("sum, at the end", "cuda", 2400),
    ]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert "50%" in printed[-3] and "80%" in printed[-1] and bench.gbytes_ceiling == 3000
    assert "tflops_ceiling" not in vars(bench)


def test_the_ceiling_of_a_picture_is_the_greatest(bench):
    rows = [
        replace(_row(bench), case=case, backend="cuda", gbytes=rate) for case, rate in (("copy", 2e3), ("sum", 3e3))
    ]
    assert _ceiling([*rows, replace(rows[0], gbytes=math.nan)], "gbytes") == 3e3 and math.isnan(_ceiling([], "tflops"))


def test_graphs_that_are_kept_go_backward_again(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "compare", lambda case, calls, flop: seen.append(functorch_config.donated_buffer))
    monkeypatch.setattr(backward, "Bench", lambda name: bench)
    backward.run(quick=True)
    assert seen == [False, False]


def test_no_gpu_no_benchmark(monkeypatch):
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="merge: needs a CUDA device"):
        Bench("merge")


def test_the_ledger_grows_and_reads_back(bench, tmp_path):
    path = tmp_path / "new" / "ledger.csv"
    bench.compare("2, and a comma", {"triton": lambda: 1.2345678, "peer": fail})
    assert bench.finish(path) == bench.rows and bench.finish(None) == bench.rows
    bench.finish(path)
    lines = list(csv.reader(path.open()))
    assert lines[0] == [field.name for field in fields(Row)] and len(lines) == 5
    assert lines[1][lines[0].index("ms")] == "1.235" and lines[2][lines[0].index("ms")] == ""
    rows = read_ledger(path)
    assert rows[1].case == "2, and a comma" and math.isnan(rows[1].ms) and rows[0].ms == 1.235


def test_the_newest_run(bench):
    row = _row(bench)
    rows = [
        row,
        replace(row, commit="newer"),
        replace(row, commit="newer", backend="eager"),
        replace(row, commit="newer", ms=2.0),
        replace(row, benchmark="decode"),
    ]
    assert newest_run(rows, "merge") == [rows[3], rows[2]]
    with pytest.raises(ValueError, match=r"no row of 'ring'; it has decode, merge"):
        newest_run(rows, "ring")


def test_bars_show_every_row_the_spread_and_the_ceiling(bench, tmp_path):
    pytest.importorskip("matplotlib")
    bench.compare("2 parts", {"triton": lambda: 1.0, "peer": fail}, moved=2e9)
    bench.compare("8 parts", {"triton": lambda: 1.0}, moved=1e9)
    bench.compare("a product", {"triton": lambda: 1.0}, flop=1e12)
    bench.finish(tmp_path / "ledger.csv")
    text = bars(tmp_path / "ledger.csv", "merge", tmp_path / "bars.svg").read_text()
    drawn = [line for line in text.splitlines() if "<!--" in line]
    for words in ("2 parts  triton", "2 parts  peer", "8 parts  triton", "a product  triton", "GB/s (dashed", "TFLOP/s",
                  "RuntimeError: no kernel image", "merge: a GPU", "torch 2, triton 3, abc, 2026-01-02"):  # fmt: skip
        assert any(words in line for line in drawn), (words, drawn)
    assert not any("copy" in line for line in drawn)


def test_bars_of_the_ledger_of_this_repository(tmp_path):
    pytest.importorskip("matplotlib")
    for benchmark in {row.benchmark for row in read_ledger(LEDGER)}:
        assert bars(LEDGER, benchmark, tmp_path / f"{benchmark}.png").stat().st_size > 1000


def test_long_calls_are_repeated_and_warmed_up_too(monkeypatch):
    """What one call leaves behind must not be in most of another's times, however long they are."""
    seen = []

    def event_ms(call, repeats, *, warm=0):
        seen.append((repeats, warm))
        return [call()] * repeats

    monkeypatch.setattr(measure, "_event_ms", event_ms)
    time_in_turns({"a": lambda: 500.0})
    assert seen[1:] == [(3, 2)] * 5  # behind the estimate


def test_nobody_of_that_name():
    with pytest.raises(ValueError, match=r"by: expected some of hopper, triton, .*, cudnn, got nobody"):
        kernel.run(by=["fa3", "nobody"])


def test_errors(bench, tmp_path):
    pytest.importorskip("matplotlib")
    bench.compare("2 parts", {"triton": lambda: 1.0})
    append(tmp_path / "ledger.csv", bench.rows)
    with pytest.raises(ValueError, match="'merge' has no rates to draw"):
        bars(tmp_path / "ledger.csv", "merge", tmp_path / "bars.svg")
    with pytest.raises(ValueError, match="svg"):
        bars(tmp_path / "ledger.csv", "merge", tmp_path / "bars.txt")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"expected the columns .*got \['a', 'b'\]"):
        read_ledger(tmp_path / "other.csv")


def _row(bench):
    bench.compare("2 parts", {"triton": lambda: 1.0})
    return bench.rows.pop()
