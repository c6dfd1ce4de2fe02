"""The prefill benchmark's ledger, tables and pictures, of rows that are made up."""

import math
import re
from collections import Counter
from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.bench import Row, append, read_rows
from apb.bench.plots import bars, read_ledger
from apb.bench.prefill.plots import breakdown, scaling, speed
from apb.bench.prefill.record import PHASES, PrefillRow
from apb.bench.prefill.store import done, failed, key, newest, read
from apb.bench.prefill.table import balance, blocks, by_hosts, figure_text, length_text, markdown
from apb.cli.bench_prefill import describe

RUN = {"date": "2026-01-02T03:04+00:00", "device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}
ONE_HOST = ("flash", "minference")


def row(method="apb", *, hosts=8, layer_ms=10.0, mode="simulated", tokens=2**17, **more):
    columns = {
        **{f"{phase}_ms": layer_ms * (1 + i) / 28 for i, phase in enumerate(PHASES)},
        "layer_ms": layer_ms, "ttft_ms": 32 * layer_ms + 8, "query_ms": 8.0, "peak_gbytes": 30.0,
        "formula_gbytes": 29.0, "tflop": 5.0, "sent_mbytes": 25.0, "load": " ".join(["9"] * hosts),
    }  # fmt: skip
    if mode == "counted":
        columns |= dict.fromkeys((name for name in columns if name.endswith("_ms")), math.nan)
    given = {"mode": mode, "shape": "tiny", "tokens": tokens, "hosts": hosts, "method": method}
    return PrefillRow(**(RUN | given | columns | more))


def lost(method="flash", *, notes="OutOfMemoryError: too long", **more):
    given = {"mode": "simulated", "shape": "tiny", "tokens": 2**17, "hosts": 1, "method": method, "notes": notes}
    return PrefillRow(**(RUN | given | more))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.one_of(st.sampled_from([math.nan, math.inf]), st.floats(-1e9, 1e9))
ROWS = st.builds(
    PrefillRow,
    **{f.name: {str: TEXTS, int: st.integers(), float: NUMBERS}[f.type] for f in fields(PrefillRow)},
)


# The ledger.


@given(st.lists(ROWS, max_size=4), st.booleans())
def test_rows_come_back_a_line_each(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("store") / "prefill.csv"
    assert read(path) == []
    for one in rows:
        append(path, [one])
        if cut:  # someone's editor took the last line's end
            path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    assert not rows or len(path.read_bytes().rstrip(b"\n").split(b"\n")) == 1 + len(rows)
    for found, one in zip(read(path), rows, strict=True):
        for name, value in asdict(one).items():
            if isinstance(value, float):
                assert getattr(found, name) == pytest.approx(value, rel=5.1e-4, nan_ok=True)
            else:
                expected = " ".join(value.splitlines()) if isinstance(value, str) else value
                assert getattr(found, name) == expected


BROKEN = {
    "cells are missing": (lambda line: line.rsplit(b",", 3)[0], "line 3: expected .* cells, got"),
    "cells are too many": (lambda line: line + b",1,2", "line 3: expected .* cells, got"),
    "no number": (lambda line: line.replace(b",7,", b",seven,"), "line 3: expected a number as ms, got 'seven'"),
    "a quote that is not closed": (lambda line: line + b'"', "expected a ledger in CSV, got"),
    "not a text": (lambda line: line + b"\xff\xfe", "expected a ledger in CSV, got"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_ledger_is_one_error_that_says_where(tmp_path, name):
    pytest.importorskip("matplotlib")
    breaks, said = BROKEN[name]
    path = tmp_path / "ledger.csv"
    one = Row(**RUN, benchmark="merge", case="c", backend="b", ms=7.0, tflops=1.0, notes="one, two")
    append(path, [one, one])
    head, first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join((head, first, breaks(second))) + b"\n")
    for look in (read_ledger, lambda path: bars(path, "merge", tmp_path / "bars.svg")):
        try:
            look(path)
            message = "no error"
        except ValueError as error:
            message = str(error)
        assert re.search(said, message) and str(path) in message


def test_a_file_of_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "ledger.csv"
    append(path, [Row(**RUN, benchmark="merge", case="c", backend="b", ms=7.0, tflops=1.0)])
    before = path.read_bytes()
    for use in (read, lambda path: append(path, [row()])):
        with pytest.raises(ValueError, match=r"ledger.csv: expected the columns \['date', .*'load', 'notes'\], got"):
            use(path)
    assert path.read_bytes() == before and len(read_rows(path, Row)) == 1
    append(path, [])
    assert path.read_bytes() == before


def test_what_is_done_has_figures_and_is_of_this_device():
    rows = [row(), row(hosts=4), lost(), row("star"), lost("star", hosts=8), lost("ape"), row("ape", hosts=1)]
    rows += [row("ring", device="another"), row("ring", mode="counted"), lost("ulysses", mode="counted")]
    found = {(one.mode, one.hosts, one.method) for one in done(rows, "a GPU")}
    assert found == {("simulated", 8, "apb"), ("simulated", 4, "apb"), ("simulated", 1, "ape"), ("counted", 8, "ring")}
    assert done(rows, "another") == {key(rows[7])} and failed(rows[2]) and not failed(rows[8])
    assert newest([row(), lost(), row(layer_ms=1.0)]) == [row(layer_ms=1.0), newest([lost()])[0]]


# The tables.

METHOD = st.sampled_from(["flash", "minference", "ring", "apb"])


@given(st.lists(st.builds(lambda m, h: (m, 1 if m in ONE_HOST else h), METHOD, st.sampled_from([1, 2, 8])), max_size=9))
def test_by_hosts_leaves_nobody_out_and_shows_nobody_twice(settings):
    rows = [row(method, hosts=hosts) for method, hosts in dict.fromkeys(settings)]
    groups = by_hosts(rows)
    assert {key(one) for group in groups.values() for one in group} == {key(one) for one in rows}
    for hosts, group in groups.items():
        assert set(Counter(one.method for one in group).values()) <= {1}
        assert {one.method for one in rows if one.method in ONE_HOST} <= {one.method for one in group}
        assert all(one.hosts in (1, hosts) for one in group)


@given(st.floats(-1e9, 1e9))
def test_a_figure_is_the_number_to_half_a_percent(value):
    text = figure_text(value)
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.0051 if abs(value) >= 0.01 else 0.06)
    assert "e" not in text or abs(value) < 0.01
    assert len(text) <= len("-1,000,000,000")


@given(st.integers(1, 2**40))
def test_a_length_is_read_as_it_was_written(tokens):
    from apb.cli.bench_prefill import _tokens

    assert _tokens(length_text(tokens).replace(",", "")) == tokens


def test_the_figures_of_a_block():
    rows = [
        row("flash", hosts=1, layer_ms=100.0, notes="5 repeats"), row("apb", load="10 20 30 20", notes="a link"),
        row("ring", notes="a link"), row("apb", load="1 1"), lost("ulysses", hosts=8, notes="ValueError: no"),
        row("apb", load="10 20 30 20", notes="a link"),
    ]  # fmt: skip
    (block,) = blocks(rows)
    totals, phases = block.tables
    assert block.title == "tiny, 128K tokens, 8 hosts, simulated"
    assert "in turn on one a GPU" in block.about and "torch 2, triton 3, commit abc, 2026-01-02" in block.about
    flash, apb, ring, ulysses = totals.rows
    assert apb == ("apb", "8", "328", "8.00", "399,610", "9.78×", "30.0 (29.0)", "1.50", "25.0")
    assert flash[5] == "1.00×" and ring[0] == "ring" and set(ulysses[2:]) == {"–"}
    assert [line[0] for line in phases.rows] == ["flash", "apb", "ring"]
    assert phases.head[1:] == ("in all", *PHASES) and phases.rows[1][1:3] == ("10.0", "0.357")
    assert block.notes == ("flash: 5 repeats", "apb, ring: a link", "ulysses: ValueError: no")
    assert blocks([row(notes="a link"), row("ring", notes="a link")])[0].notes == ("a link",)
    assert blocks([lost(), row()])[0].tables[0].rows[1][5] == "–"  # flash has no time


def test_one_method_by_two_backends_is_two_lines():
    rows = [row("flash", hosts=1, dtype="bfloat16"), row(backend="triton", dtype="bfloat16")]
    rows += [row(backend="hopper", dtype="bfloat16"), row("ring", link="a", dtype="bfloat16"), row(dtype="float32")]
    block, single = blocks([*rows, row("ring", link="b", dtype="bfloat16", notes="slow")])
    names = ["flash", "apb (triton)", "apb (hopper)", "ring (a)", "ring (b)"]
    assert [line[0] for line in block.tables[0].rows] == [line[0] for line in block.tables[1].rows] == names
    assert block.about.endswith("bfloat16, attention by hopper and triton") and block.notes == ("ring (b): slow",)
    assert len(single.tables[0].rows) == 1 and single.about.endswith(", float32")


def test_counted_rows_have_operations_for_times_whatever_the_device():
    rows = [row("flash", hosts=1, mode="counted", tflop=40.0), row(mode="counted"), row(mode="counted", device="b")]
    (block,) = blocks(rows)
    assert [line[2:4] for line in block.tables[0].rows] == [("40.0", "1.00×"), ("5.00", "8.00×")]
    assert "nothing timed" in block.about and "no speed-up" in block.legend and len(block.tables) == 1


def test_a_block_for_each_mode_length_and_number_of_hosts():
    rows = [row(), row(hosts=4), row("flash", hosts=1), row(tokens=2**15), row(mode="measured"), row(device="b")]
    titles = [block.title.removeprefix("tiny, ") for block in blocks(rows)]
    assert titles == [
        "128K tokens, 8 hosts, measured", "32K tokens, 8 hosts, simulated", "128K tokens, 4 hosts, simulated",
        "128K tokens, 8 hosts, simulated", "128K tokens, 8 hosts, simulated",
    ]  # fmt: skip


def test_the_text_fits_100_columns_and_markdown_has_the_same_cells():
    names = ("flash", "minference", "apb-balanced", "ring-zigzag")
    rows = [row(name, hosts=1 if name in ONE_HOST else 8, layer_ms=123456.0) for name in names]
    rows += [lost("apb", hosts=8, notes="OutOfMemoryError: " + "a | long story " * 20), row("star", mode="counted")]
    text, page = describe(rows), markdown(rows)
    assert max(map(len, text.splitlines())) <= 100
    for block in blocks(rows):
        assert block.title in text and f"**{block.title}**" in page
        for table in block.tables:
            assert f"| {' | '.join(table.head)} |" in page
            for line in table.rows:
                assert f"| {' | '.join(line)} |" in page and all(cell in text for cell in line)
    assert describe([]) == "" and markdown([]) == ""


def test_the_load_is_the_busiest_over_the_mean():
    assert balance(row(load="10 20 30 20")) == 1.5 and math.isnan(balance(row(load="")))
    with pytest.raises(ValueError, match="load: expected numbers separated by spaces, got '1 x'"):
        balance(row(load="1 x"))


# The pictures.


def ledger():
    rows = [row(m, hosts=h, tokens=n, layer_ms=t * n / 2**17 * 8 / h)
            for m, t in (("apb", 10.0), ("ring", 30.0)) for h in (2, 8) for n in (2**15, 2**17)]  # fmt: skip
    rows += [row("flash", hosts=1, tokens=2**15, layer_ms=30.0), lost(), lost("ape", hosts=8, notes="ValueError: no")]
    return [*rows, row("apb", layer_ms=20.0)]  # again


@pytest.fixture
def figures(monkeypatch):
    """Return the list of the figures that would have been saved."""
    figure = pytest.importorskip("matplotlib.figure")
    found = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, path: found.append(self))
    return found


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_speed_has_a_line_a_method(figures, tmp_path):
    speed(ledger(), tmp_path / "a.svg")
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in figures[0].axes[0].lines}
    assert lines["apb"] == [(2**15, pytest.approx(1e3 * 2**15 / 88)), (2**17, pytest.approx(1e3 * 2**17 / 648))]
    assert len(lines["flash"]) == 1 and lines.keys() == {"flash", "apb", "ring"}
    assert {"tiny, simulated on a GPU, 8 hosts", "32K", "128K"} <= set(texts(figures[0]))
    listed = [row("minference", hosts=1, tokens=n) for n in (2**15, 2**17)]
    for leave_out, drawn in (({}, False), ({"leave_out": ()}, True)):
        speed(ledger() + listed, tmp_path / "a.svg", **leave_out)
        assert ("minference" in {line.get_label() for line in figures.pop().axes[0].lines}) == drawn
    speed(ledger(), tmp_path / "a.svg", hosts=2)
    assert "tiny, simulated on a GPU, 2 hosts" in texts(figures[1])


def test_scaling_has_hosts_across_and_one_host_methods_dashed(figures, tmp_path):
    scaling(ledger(), tmp_path / "a.svg", tokens=2**15)
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert lines.keys() == {"apb", "ring", "flash (1 host)"} and lines["flash (1 host)"].get_linestyle() == "--"
    assert list(lines["ring"].get_xdata()) == [2, 8]
    assert list(lines["ring"].get_ydata()) == pytest.approx([0.968, 0.248])
    assert "tiny, simulated on a GPU, 32K tokens" in texts(figures[0])


def test_breakdown_stacks_the_phases_to_the_layer(figures, tmp_path):
    breakdown(ledger(), tmp_path / "a.svg")
    several, alone = figures[0].axes
    ends = {}
    for bar in several.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_x() == pytest.approx(ends.get(place, 0.0))
        ends[place] = bar.get_x() + bar.get_width()
    labels = [tick.get_text() for tick in several.get_yticklabels()]
    assert {labels[place]: end for place, end in ends.items()} == pytest.approx({"apb": 20.0, "ring": 30.0})
    shown = {text.strip() for text in texts(figures[0])}
    assert {"ape", "ValueError: no", "OutOfMemoryError: too long", "20.0", "30.0", *PHASES} <= shown
    assert "tiny, simulated on a GPU, 128K tokens" in shown and "ms in a layer, slowest of 8 hosts" in shown
    assert not alone.patches and "ms in a layer, 1 host" in shown


def test_pictures_are_written_and_what_cannot_be_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    for draw in (speed, scaling, breakdown):
        assert draw(ledger(), tmp_path / "a.png", **({} if draw is speed else {"tokens": 2**15})).stat().st_size > 1000
        with pytest.raises(ValueError, match=r"rows: expected some with times .* got no rows"):
            draw([], tmp_path / "a.png")
        with pytest.raises(ValueError, match=r"rows: expected some with times .* got 1 rows without times"):
            draw([row(mode="counted")], tmp_path / "a.png")
        with pytest.raises(ValueError, match="expected one mode, device, shape and precision, got measured, a GPU"):
            draw([row(), row(mode="measured")], tmp_path / "a.png")
        with pytest.raises(ValueError, match="expected one backend and link of each method, got several of apb"):
            draw([row(backend="triton"), row(backend="hopper")], tmp_path / "a.png")
        with pytest.raises(ValueError, match="svg"):
            draw([row()], tmp_path / "a.txt")
    with pytest.raises(ValueError, match="takes two lengths on 8 hosts, got 1"):
        speed([row()], tmp_path / "a.png")
    with pytest.raises(ValueError, match="takes two numbers of hosts at 128K, got 1"):
        scaling([row(), row("flash", hosts=1)], tmp_path / "a.png")
    with pytest.raises(ValueError, match="there are none of 64K tokens"):
        breakdown([row()], tmp_path / "a.png", tokens=2**16)
