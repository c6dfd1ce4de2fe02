"""Hosts that the prefill benchmark starts itself: once for all cases, telling of each when it is done."""

import math
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from prefill_cases import CPU

from apb.bench.prefill import measured, run
from apb.bench.prefill.methods import PRESETS
from apb.bench.prefill.run import cases, run_prefill
from apb.bench.prefill.started import run_telling
from apb.methods import Method


def run_rows(names, hosts):
    """Measure on 512 tokens; return the rows, and what was said."""
    rows, said = [], []
    run_prefill("tiny", [512], hosts, names, "measured", 1, None, set(), rows.append, said.append, device=CPU)
    return rows, said


def test_hosts_are_started_once_for_each_number_of_them():
    """A method that cannot run, and one that runs out of memory on one host, end nothing."""
    rehearse = measured._rehearse

    def too_large(one, rank):
        if one.label == "ape" and rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nand more")
        return rehearse(one, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_rehearse", too_large)
        rows, said = run_rows(["flash", "apb:anchor=9999", "ape", "ring"], [2, 3])
    starts = [text for text in said if text.startswith("starting")]
    assert starts == ["starting 1 host", "starting 2 hosts", "starting 3 hosts"]
    names = ["apb:anchor=9999", "ape", "ring"]
    assert [(row.hosts, row.method) for row in rows] == [(1, "flash"), *((n, name) for n in (2, 3) for name in names)]
    for row in rows:
        if row.method in ("flash", "ring"):
            assert row.ttft_ms > 0 and len(row.load.split()) == row.hosts
        else:
            assert math.isnan(row.ttft_ms) and ("9999 tokens" in row.notes or "CUDA out of memory" in row.notes)


def test_a_case_that_ends_its_hosts_is_a_row_and_others_are_started_for_the_rest():
    rehearse = measured._rehearse

    def die(one, rank):
        if one.label == "star" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return rehearse(one, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "_rehearse", die)
        rows, said = run_rows(["ring", "star", "ape"], 2)
    assert [row.method for row in rows] == ["ring", "star", "ape"]
    assert rows[1].notes.startswith("HostFailed: rank 1 of 2 ")
    assert rows[0].ttft_ms > 0 and math.isnan(rows[1].ttft_ms) and rows[2].ttft_ms > 0
    assert said.count("starting 2 hosts") == 2


def test_what_is_to_be_measured_travels_to_other_processes():
    found = cases("tiny", [512], [2], [*PRESETS, "apb:passing=8"], "measured", None, device=CPU)
    for one, other in pickle.loads(pickle.dumps(list(found.values()))):
        assert other.label == one.label and isinstance(other.make(), Method)


def test_hosts_tell_while_they_go_on():
    """The second host waits until what the first has told is heard here."""
    told, heard = [], multiprocessing.get_context("fork").Event()

    def hear(item):
        told.append(item)
        heard.set()

    def body(host, tell):
        tell(f"from {host.rank}")
        assert heard.wait(10)
        tell({"again": host.world_size})

    assert run_telling(2, body, on_item=hear, backend="gloo", timeout_s=20) is None
    assert told == ["from 0", {"again": 2}]


def test_what_goes_wrong_while_hosts_tell():
    def body(host, tell):
        for number in range(100_000):
            tell(number)
        raise ValueError("at the end")

    failure = run_telling(1, body, on_item=lambda item: None, backend="gloo", timeout_s=20)
    assert isinstance(failure, ValueError) and str(failure) == "at the end"

    def full(item):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):  # and what tells it is ended
        run_telling(1, body, on_item=full, backend="gloo", timeout_s=20)


class Unreadable:
    """Is written without a fault, and not read."""

    def __reduce__(self):
        return int, ("no number",)


def test_what_hosts_tell_and_cannot_be_read_is_raised():
    try:
        came = run_telling(
            1, lambda host, tell: tell(Unreadable()), on_item=lambda item: None, backend="gloo", timeout_s=20
        )
    except ValueError as error:
        came = error
    assert "no number" in str(came)


def test_hosts_that_end_without_a_row_and_without_an_error_end_the_run(monkeypatch):
    monkeypatch.setattr(run, "run_telling", lambda count, serve, **_: None)
    with pytest.raises(RuntimeError, match=r"hosts: 2 of them ended .* without a row of star at 512 tokens"):
        run_rows(["star", "ape"], 2)
