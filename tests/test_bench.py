"""The benchmark core without a GPU: rows, failures, the ledger, and pictures that are drawn from it."""

import csv
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from apb.bench import Row, append, measure
from apb.bench.measure import Bench, Timing
from apb.bench.plots import bars, newest_run, read_ledger

LEDGER = Path(__file__).parents[1] / "benchmarks" / "ledger.csv"


@pytest.fixture
def bench(monkeypatch, capsys):
    """Return a Bench whose calls "take" the milliseconds that they return; large products and copies take one."""

    def stand_in(call, *, graph=False, repeats_ms=300):
        ms = call()
        return Timing(ms, 0.9 * ms, 1.2 * ms)

    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "environment", lambda: {
        "date": "2026-01-02", "device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"
    })  # fmt: skip
    monkeypatch.setattr(measure, "time_call", stand_in)
    bench = Bench("merge")
    bench.__dict__ |= {"tflops_ceiling": 800.0, "gbytes_ceiling": 3000.0}
    return bench


def fail():
    raise RuntimeError("no kernel image\nand a long trace")


def test_rows_have_rates_and_spread(bench, capsys):
    assert bench.measure("2 parts", "triton", lambda: 2.0, moved=3e9) == 2.0
    assert bench.measure("2 parts", "eager", lambda: 4.0, flop=2e12, notes="as it is") == 4.0
    first, second = bench.rows
    assert (first.benchmark, first.case, first.backend, first.device) == ("merge", "2 parts", "triton", "a GPU")
    assert (first.ms, first.low_ms, first.high_ms) == pytest.approx((2.0, 1.8, 2.4))
    assert first.gbytes == pytest.approx(1500) and math.isnan(first.tflops)
    assert second.tflops == pytest.approx(500) and math.isnan(second.gbytes) and second.notes == "as it is"
    printed = capsys.readouterr().out
    assert "1500 GB/s" in printed and " 50%" in printed and "500 TFLOP/s" in printed and "62%" in printed


def test_a_failure_is_a_row_and_not_the_end(bench):
    assert math.isnan(bench.measure("2 parts", "peer", fail, moved=1.0))
    bench.measure("2 parts", "triton", lambda: 1.0, moved=1e9)
    assert [row.notes for row in bench.rows] == ["RuntimeError: no kernel image", ""]
    assert math.isnan(bench.rows[0].ms) and math.isnan(bench.rows[0].gbytes)


def test_no_gpu_no_benchmark(monkeypatch):
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="merge: needs a CUDA device"):
        Bench("merge")


def test_the_ledger_grows_and_reads_back(bench, tmp_path):
    path = tmp_path / "new" / "ledger.csv"
    bench.measure("2 parts", "triton", lambda: 1.2345678, moved=3e9)
    bench.measure("2, and a comma", "peer", fail)
    assert bench.finish(path) == bench.rows and bench.finish(None) == bench.rows
    bench.finish(path)
    lines = list(csv.reader(path.open()))
    assert lines[0] == [field.name for field in fields(Row)] and len(lines) == 5
    assert lines[1][lines[0].index("ms")] == "1.235" and lines[2][lines[0].index("ms")] == ""
    rows = read_ledger(path)
    assert rows[1].case == "2, and a comma" and math.isnan(rows[1].ms) and rows[0].ms == 1.235
    assert rows[0].gbytes == pytest.approx(bench.rows[0].gbytes, rel=1e-3)


def test_the_newest_run(bench):
    bench.measure("2 parts", "triton", lambda: 1.0, moved=1e9)
    (row,) = bench.rows
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
    bench.rows.append(replace(_row(bench), case="copy of 2 GiB", backend="cuda", gbytes=3000.0))
    bench.measure("2 parts", "triton", lambda: 1.0, moved=2e9)
    bench.measure("2 parts", "peer", fail, moved=2e9)
    bench.measure("8 parts", "triton", lambda: 1.0, moved=1e9)
    bench.measure("a product", "triton", lambda: 1.0, flop=1e12)
    bench.finish(tmp_path / "ledger.csv")
    text = bars(tmp_path / "ledger.csv", "merge", tmp_path / "bars.svg").read_text()
    drawn = [line for line in text.splitlines() if "<!--" in line]
    for words in ("2 parts  triton", "2 parts  peer", "8 parts  triton", "a product  triton", "GB/s (dashed", "TFLOP/s",
                  "RuntimeError: no kernel image", "merge: a GPU, torch 2, triton 3, abc, 2026-01-02"):  # fmt: skip
        assert any(words in line for line in drawn), (words, drawn)
    assert not any("copy of 2 GiB" in line for line in drawn)


def test_bars_of_the_ledger_of_this_repository(tmp_path):
    pytest.importorskip("matplotlib")
    for benchmark in {row.benchmark for row in read_ledger(LEDGER)}:
        assert bars(LEDGER, benchmark, tmp_path / f"{benchmark}.png").stat().st_size > 1000


def test_errors(bench, tmp_path):
    pytest.importorskip("matplotlib")
    bench.measure("2 parts", "triton", lambda: 1.0)
    append(tmp_path / "ledger.csv", bench.rows)
    with pytest.raises(ValueError, match="'merge' has no rates to draw"):
        bars(tmp_path / "ledger.csv", "merge", tmp_path / "bars.svg")
    with pytest.raises(ValueError, match="svg"):
        bars(tmp_path / "ledger.csv", "merge", tmp_path / "bars.txt")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"expected the columns .*got \['a', 'b'\]"):
        read_ledger(tmp_path / "other.csv")


def _row(bench):
    bench.measure("", "", lambda: 1.0)
    return bench.rows.pop()
