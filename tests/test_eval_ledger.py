"""The quality ledger: what is written comes back, cells are replaced whole, and damage is named."""

from dataclasses import replace

import pytest

from apb.evals.ledger import read_ledger, write_ledger
from apb.evals.record import Record

RUN = {"date": "2026-01-01", "device": "a device", "torch": "2", "triton": "3", "commit": "abc"}
ONE = Record(
    model="m", method="apb:passing=0", hosts=4, length=4096, task="vt", seed=0, score=0.6, nll=0.125, prediction="",
    references=(),
)  # fmt: skip


def test_what_is_written_comes_back(tmp_path):
    path = tmp_path / "quality.csv"
    records = [replace(ONE, seed=seed, score=seed / 5, nll=seed / 8) for seed in range(4)]
    records += [replace(ONE, method="flash", hosts=1, seed=seed) for seed in (7, 3)]
    write_ledger(path, records, run=RUN, labels={"flash": "Full attention"})
    found, labels, runs = read_ledger(path)
    assert sorted(found, key=lambda r: r.key) == sorted(records, key=lambda r: r.key)
    assert labels == {"flash": "Full attention"} and runs == [RUN]


def test_a_cell_is_replaced_whole_and_others_stay(tmp_path):
    path = tmp_path / "quality.csv"
    write_ledger(path, [ONE, replace(ONE, seed=1), replace(ONE, task="cwe")], run=RUN)
    write_ledger(path, [replace(ONE, score=1.0)], run=RUN | {"commit": "def"})
    found, _, runs = read_ledger(path)
    assert [(r.task, r.seed, r.score) for r in found] == [("vt", 0, 1.0), ("cwe", 0, 0.6)]
    assert [run["commit"] for run in runs] == ["def", "abc"]


def test_a_ledger_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "quality.csv"
    write_ledger(path, [ONE], run=RUN)
    before = path.read_text()
    monkeypatch.setattr("apb.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_ledger(path, [replace(ONE, seed=1)], run=RUN)
    assert path.read_text() == before and [file.name for file in tmp_path.iterdir()] == ["quality.csv"]


def test_damage_and_absence_are_named(tmp_path):
    path = tmp_path / "quality.csv"
    write_ledger(path, [ONE], run=RUN)
    path.write_text(path.read_text().replace("0.6", "0.6 1"))
    with pytest.raises(ValueError, match=r"quality.csv, m apb:passing=0 4 4096 vt: \[1, 2, 1\]"):
        read_ledger(path)
    with pytest.raises(FileNotFoundError, match="ledger: no file at"):
        read_ledger(tmp_path / "none.csv")
