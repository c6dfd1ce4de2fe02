"""What is counted beside what the ledgers hold."""

import math
from pathlib import Path

import pytest

from apb.bench.counted import attention_points, layer_points, picture, table
from apb.bench.plots import newest_run, read_ledger
from apb.bench.prefill.record import PrefillRow

LEDGER = Path(__file__).parents[1] / "benchmarks" / "ledger.csv"
RUN = {"date": "2026-01-02T03:04", "device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}


def row(method, **columns):
    return PrefillRow(**RUN, mode="measured", shape="s", tokens=2**15, hosts=2, method=method, **columns)


ROWS = [
    row("star", ttft_ms=9.0, layer_ms=4.0, tflop=2.0, sent_mbytes=0.0, communicate_ms=0.0, peak_gbytes=5.5),
    row("ring", notes="ValueError: no"),
    row("apb", ttft_ms=8.0, layer_ms=2.0, tflop=1.0, sent_mbytes=7.0, communicate_ms=0.1, formula_gbytes=5.0),
]


def test_the_ledgers_rates_are_of_the_counted_operations():
    rows = read_ledger(LEDGER)
    points, ceiling = attention_points(rows)
    rates = {(r.backend, r.ms): r.tflops for r in newest_run(rows, "masked_attention")}
    assert len(points) > 5 and ceiling > max(rates.values()) / 2
    for point in points:
        assert 1e3 * point.tflop / point.ms == pytest.approx(rates[point.name, point.ms], rel=2e-3)


def test_the_table_has_what_was_timed():
    lines = table(ROWS).splitlines()
    assert lines[0] == "**s, measured, , a GPU, torch 2, triton 3, 2026-01-02, commit abc**"
    assert lines[4:] == [
        "| star | 2 | 32K | 2.00 | 4.00 | 500 | 0 | 0 | – | 5.50 |",
        "| apb | 2 | 32K | 1.00 | 2.00 | 500 | 7.00 | 0.100 | 5.00 | – |",
    ]
    assert layer_points(ROWS) == [("star", 2.0, 4.0), ("apb", 1.0, 2.0)]


@pytest.mark.parametrize("rows", [[], ROWS[1:2]])
def test_where_nothing_was_timed_it_says_so(rows, tmp_path):
    assert table(rows) == "No prefill has been measured yet."
    assert "<svg" in picture(read_ledger(LEDGER), rows, tmp_path / "a.svg").read_text()


def test_the_picture_has_both(tmp_path):
    rows = [r for r in read_ledger(LEDGER) if r.backend != "cublas"]
    assert math.isnan(attention_points(rows)[1])
    assert "<svg" in picture(rows, ROWS, tmp_path / "a.svg").read_text()
