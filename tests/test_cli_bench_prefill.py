"""`apb bench` as a user calls it: the engine stands in where what matters is what is around it."""

import re
import types

import pytest
import torch

from apb.bench.prefill import run as prefill_run
from apb.bench.prefill.link import NVLINK, Link
from apb.bench.prefill.methods import PRESETS
from apb.bench.prefill.record import PrefillRow
from apb.bench.prefill.run import cases
from apb.bench.prefill.store import key, read
from apb.cli import bench, bench_prefill, main

RUN = {"date": "2026-01-02", "device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def engine(monkeypatch):
    """Return a stand-in for the engine, on a GPU: what it was called with, what it measured, what fails or stops it."""
    seen = types.SimpleNamespace(calls=[], ran=[], fails=set(), stop_before=None)

    def run_prefill(shape, tokens, hosts, names, mode, repeats, link, known, on_row, on_progress, **more):
        seen.calls.append({"shape": shape, "tokens": tokens, "hosts": hosts, "names": names, "mode": mode,
                           "repeats": repeats, "link": link, **more})  # fmt: skip
        for one in cases(shape, tokens, hosts, names, mode, link, **more):
            row = PrefillRow(**(RUN | one._asdict()), ttft_ms=7.0, layer_ms=1.0, tflop=3.0)
            assert key(row) == one
            if one in known:
                continue
            if one.method == seen.stop_before:
                raise KeyboardInterrupt
            on_progress(f"{one.method}, under way")
            seen.ran.append(one)
            fails = one.method in seen.fails
            on_row(PrefillRow(**(RUN | one._asdict()), notes="ValueError: not now") if fails else row)

    monkeypatch.setattr(bench_prefill, "run_prefill", run_prefill)
    for module in (bench_prefill, prefill_run):
        monkeypatch.setattr(module, "environment", lambda device: RUN)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return seen


def prefill(*more):
    return main(["bench", "prefill", "--tokens", "1K", *more])


def names(seen):
    ran = [one.method for one in seen.ran]
    seen.ran.clear()
    return ran


def test_what_is_asked_for_reaches_the_engine(engine, capsys):
    assert prefill() == 0
    assert engine.calls[0] == {
        "shape": "llama-3.1-8b", "tokens": [1024], "hosts": [8], "names": list(PRESETS), "mode": "simulated",
        "repeats": 5, "link": None, "device": torch.device("cuda", 0), "dtype": None, "backend": "auto",
    }  # fmt: skip
    assert main(["bench", "prefill", "--tokens", "2k", "1M", "77", "2K", "--hosts", "2", "4", "--shape", "yi-34b",
                 "--methods", "apb", "apb", "star:anchor=5", "--repeats", "2", "--link", "0.5,20", "--mode",
                 "simulated", "--device", "cpu", "--dtype", "float16", "--backend", "sdpa"]) == 0  # fmt: skip
    assert engine.calls[1] == {
        "shape": "yi-34b", "tokens": [2048, 2**20, 77], "hosts": [2, 4], "names": ["apb", "star:anchor=5"],
        "mode": "simulated", "repeats": 2, "link": Link(latency_ms=0.5, gbytes_per_s=20.0),
        "device": torch.device("cpu"), "dtype": torch.float16, "backend": "sdpa",
    }  # fmt: skip
    printed = capsys.readouterr()
    assert "yi-34b, 1M tokens, 2 hosts, simulated" in printed.out and "yi-34b, 77 tokens, 4 hosts" in printed.out
    assert "[1/10] flash, under way" in printed.err
    assert re.search(r"\[10/10\] spava, 1K tokens, 8 hosts: 7\.00 ms \(in \d+\.\d s\)", printed.err)


def test_a_run_goes_on_where_its_ledger_ends(engine, capsys, tmp_path):
    out = ("--out", str(tmp_path / "prefill.csv"))
    engine.fails, engine.stop_before = {"ring"}, "star"
    assert prefill(*out, "--methods", "flash", "ring", "star", "apb") == 130
    assert [row.method for row in read(tmp_path / "prefill.csv")] == names(engine) == ["flash", "ring"]
    assert "the same command goes on from there" in capsys.readouterr().err
    engine.fails, engine.stop_before = set(), None
    assert prefill(*out, "--methods", "apb", "ring", "flash") == 0
    printed = capsys.readouterr()
    assert names(engine) == ["apb", "ring"]  # what failed is tried again
    assert "1 of 3 rows are in" in printed.err and "not now" not in printed.out
    lines = [line.split()[0] for line in printed.out.splitlines() if "7.00" in line]
    assert lines == ["apb", "ring", "flash"]
    assert prefill(*out, "--methods", "flash", "apb", "--again") == 0
    assert names(engine) == ["flash", "apb"] and len(read(tmp_path / "prefill.csv")) == 6
    for change in (("--shape", "tiny"), ("--hosts", "4"), ("--mode", "counted"), ("--tokens", "2K"),
                   ("--backend", "hopper"), ("--dtype", "float16"), ("--link", "0.5,20")):  # fmt: skip
        assert prefill(*out, "--methods", "apb", *change) == 0
        assert names(engine) == ["apb"]
    capsys.readouterr()
    assert prefill(*out, "--methods", "apb") == 0 and names(engine) == []
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if " tokens, " in line] == ["llama-3.1-8b, 1K tokens, 8 hosts, simulated"]
    totals = [line.split() for line in lines if "146,286" in line]
    assert [line[0] for line in totals] == ["apb", "flash"] and totals[0][5] == "1.00×"  # flash is in the ledger


@pytest.mark.parametrize(
    ("gpus", "ranks", "arguments", "mode", "why"),
    [
        (0, None, (), "counted", "no GPU for 8 hosts"),
        (1, None, (), "simulated", "1 GPU for 8 hosts"),
        (4, None, ("--hosts", "2", "8"), "simulated", "4 GPUs for 8 hosts"),
        (4, None, ("--hosts", "2", "4"), "measured", "4 GPUs for 4 hosts"),
        (1, None, ("--hosts", "1"), "measured", "1 GPU for 1 host"),
        (4, None, ("--hosts", "4", "--device", "cpu"), "counted", "no GPU for 4 hosts"),
        (8, None, ("--mode", "counted"), "counted", "as asked"),
        (0, None, ("--mode", "simulated", "--shape", "tiny"), "simulated", "as asked"),
        (0, None, ("--mode", "measured", "--device", "cpu"), "measured", "as asked"),
        (1, "3", (), "measured", "torchrun started 3 ranks"),
    ],
)
def test_the_mode_is_what_the_machine_can_do(engine, monkeypatch, capsys, gpus, ranks, arguments, mode, why):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if ranks:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", ranks)
    assert prefill("--methods", "apb", *arguments) == 0
    assert engine.calls[0]["mode"] == mode and capsys.readouterr().err.startswith(f"{mode}: {why}\n")
    assert not ranks or engine.calls[0]["hosts"] == [int(ranks)]


def test_only_the_first_of_torchruns_ranks_speaks_and_writes(engine, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_prefill, "run_prefill", lambda *arguments, **more: engine.calls.append(arguments))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prefill("--out", str(tmp_path / "prefill.csv"), "--plot", str(tmp_path)) == 0
    printed = capsys.readouterr()
    assert not printed.out and not printed.err and not list(tmp_path.iterdir()) and engine.calls


def test_pictures_show_rows_that_are_alike_and_minference_if_it_is_asked_for(engine, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(bench_prefill, "_PICTURES", {"speed": lambda rows, path, **at: drawn.append((rows, at))})
    run = ("--out", str(tmp_path / "prefill.csv"), "--plot", str(tmp_path))
    for more in (("--backend", "hopper"), ("--dtype", "float16"), ("--link", "0.5,20")):
        assert prefill(*run[:2], "--methods", "apb", "ring", *more) == 0
    assert prefill(*run, "--methods", "apb:backend=hopper", "--backend", "triton") == 0
    assert prefill(*run) == 0
    (asked, at), (every, default) = drawn
    assert {(row.method, row.backend) for row in asked} == {
        (name, "hopper") for name in ("apb:backend=hopper", "apb", "ring")
    }
    assert at["leave_out"] == () and "leave_out" not in default
    others = [(row.backend, row.dtype, row.link) for row in every if row.hosts > 1]
    assert {row.method for row in every} == {*PRESETS}
    assert set(others) == {("triton", "bfloat16", str(NVLINK))}


def test_pictures_of_what_there_is(engine, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run = ("--methods", "flash", "apb", "--out", str(tmp_path / "prefill.csv"), "--plot", str(tmp_path))
    assert prefill(*run) == 0
    printed = capsys.readouterr()
    assert f"Drawn: {tmp_path / 'breakdown.svg'}" in printed.out and "No speed.svg: " in printed.err
    assert prefill(*run, "--tokens", "2K", "--hosts", "4", "8") == 0  # with the 1K of before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"prefill.csv", "speed.svg", "breakdown.svg", "scaling.svg"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tokens", "12x"), "--tokens: expected document tokens, such as 131072, 128K or 1M, got '12x'"),
        (("--tokens", "0K"), "--tokens: expected document tokens"),
        (("--tokens", "²"), "--tokens: expected document tokens"),
        (("--hosts", "0"), "--hosts: expected at least 1, got 0"),
        (("--repeats", "0"), "--repeats: expected at least 1, got 0"),
        (("--shape", "gpt"), "--shape: expected one of llama-3.1-8b, qwen-2.5-14b, yi-34b, tiny, got 'gpt'"),
        (("--methods", "spiral"), "methods: expected one of flash, "),
        (("--mode", "measured"), "--mode: measured takes a GPU for each host, got 1 GPU for 8 hosts; take"),
        (
            ("--link", "3"),
            "--link: expected LATENCY_MS,GBYTES_PER_S, at least 0 and above 0, such as 0.03,350, got '3'",
        ),
        (("--link", "1,0"), "--link: expected LATENCY_MS,GBYTES_PER_S"),
        (("--link", "1,2", "--mode", "counted"), "--link: only simulated messages go over it, and the mode is counted"),
        (("--out", "."), "--out: expected a CSV file in a folder that exists, got ."),
        (("--out", "/nowhere/a.csv"), "--out: expected a CSV file in a folder that exists, got /nowhere/a.csv"),
        (("--out", "benchmarks/ledger.csv"), "benchmarks/ledger.csv: expected the columns ['date',"),
        (("--plot", "/nowhere"), "--plot: expected a folder that exists, got /nowhere"),
        (("--plot", ".", "--mode", "counted"), "--plot: pictures are of times, and counted rows have none"),
        (("--device", "tpu"), "device: expected auto, cpu, cuda, or cuda:N, got 'tpu'"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(engine, capsys, monkeypatch, request, arguments, said):
    monkeypatch.chdir(request.config.rootpath)
    assert prefill(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"apb bench: {said}") and printed.err.count("\n") == 1
    assert not printed.out and not engine.ran


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--hosts", "3"), "--hosts: torchrun started 2 ranks, got 3; leave --hosts out"),
        (("--mode", "simulated"), "--mode: simulated is the work of one process, and torchrun started ranks"),
        (("--device", "cpu"), "--device: each of torchrun's ranks has its own, got 'cpu'; leave it out"),
    ],
)
def test_under_torchrun_its_ranks_are_the_hosts(engine, monkeypatch, capsys, arguments, said):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prefill(*arguments) == 2
    assert capsys.readouterr().err.startswith(f"apb bench: {said}")


def test_hosts_that_are_measured_take_the_first_gpus(engine, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert prefill("--device", "cuda:1", "--hosts", "1") == 2
    assert capsys.readouterr().err.startswith("apb bench: --device: measured hosts take the first GPUs, got 'cuda:1'")
    assert prefill("--device", "cuda:1", "--mode", "simulated", "--methods", "apb") == 0


def test_a_cpu_runs_a_real_shape_only_if_it_is_meant(engine, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert prefill("--mode", "simulated") == 2
    assert "--mode: simulated times GPUs, and there is none; take --mode counted" in capsys.readouterr().err
    assert prefill("--mode", "simulated", "--device", "cpu", "--methods", "apb") == 0


def test_the_real_engine_counts_and_simulates(capsys, tmp_path):
    assert main(["bench", "prefill", "--mode", "counted"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in PRESETS) and "1.00×" in printed
    out = tmp_path / "prefill.csv"
    simulate = ("--shape", "tiny", "--mode", "simulated", "--hosts", "2", "--repeats", "1", "--device", "cpu")
    for asked in (("flash", "apb"), ("flash", "apb", "star")):
        assert prefill(*simulate, "--methods", *asked, "--out", str(out)) == 0
    rows = read(out)
    assert [row.method for row in rows] == ["flash", "apb", "star"] and all(row.ttft_ms > 0 for row in rows)
    assert "2 of 3 rows are in" in capsys.readouterr().err


def test_the_other_benchmarks_take_what_they_took(monkeypatch, capsys, tmp_path):
    calls = []

    def run(**settings):
        calls.append(settings)
        return [types.SimpleNamespace(benchmark="masked_attention")]

    found = []
    monkeypatch.setattr(bench, "import_module", lambda name: found.append(name) or types.SimpleNamespace(run=run))
    monkeypatch.setattr(bench, "bars", lambda ledger, benchmark, path: path)
    out, plot = tmp_path / "ledger.csv", tmp_path / "a.svg"
    for name in bench._BENCHMARKS:
        assert main(["bench", name, "--quick", "--out", str(out), "--plot", str(plot)]) == 0
    assert found == [f"apb.bench.{name.replace('-', '_')}" for name in bench._BENCHMARKS]
    assert calls == [{"quick": True, "out": out}] * len(found) and f"Drawn: {plot}" in capsys.readouterr().out
    assert main(["bench", "end-to-end", "--methods", "apb", "star:anchor=5"]) == 0
    assert calls[-1] == {"quick": False, "out": None, "methods": ["apb", "star:anchor=5"]}
    for arguments in (["speed"], [], ["kernel", "--tokens", "1K"]):
        with pytest.raises(SystemExit) as caught:
            main(["bench", *arguments])
        assert caught.value.code == 2
