"""`apb eval` as a user calls it: checked first, stopped and continued, in shards, and reported."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from eval_cases import heads_file, save_tiny_model

from apb.cli import main
from apb.evals.record import Record
from apb.evals.store import read_records

pytest.importorskip("wonderwords")

evaluation = importlib.import_module("apb.cli.eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a directory with a tiny model whose tokenizer knows the words of the tasks."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def command(folder, out, *more, methods=("apb:passing=0", "star:anchor=1/2"), samples=3):
    return ["eval", "--model", str(folder), "--out", str(out), "--tasks", "niah_single_1", "--length", "512",
            "--methods", *methods, "--hosts", "3", "--samples", str(samples), "--max-new-tokens", "2",
            "--threshold", "0", *more]  # fmt: skip


def test_a_run_ends_with_a_table_and_its_files(capsys, folder, tmp_path):
    methods = ("No passing@apb:passing=0", "apb:passing=1/8", "star:anchor=1/2")
    assert main(command(folder, tmp_path / "run", methods=methods)) == 0
    printed = capsys.readouterr()
    rows = [line.split("  ")[0] for line in printed.out.splitlines()]
    assert rows[2:6] == ["full attention", "No passing", "apb:passing=1/8", "star:anchor=1/2"]
    assert "512 tokens, 3 hosts" in rows[0] and "3 samples a task." in printed.out
    assert "12 of 12 answers" in printed.err and "scores.svg" in printed.err and "passing.svg" in printed.err
    records = read_records(tmp_path / "run")
    assert len(records) == 12 and {r.hosts for r in records if r.method == "flash"} == {1}
    assert {r.seed for r in records} == {0, 1, 2} and all(r.nll > 0 for r in records)
    noted = json.loads((tmp_path / "run" / "report.json").read_text())
    assert noted["labels"] == {method.partition("@")[2] or method: method.partition("@")[0] for method in methods}
    assert noted["settings"]["dtype"] in ("float32", "bfloat16")
    assert noted["runs"][0]["torch"] == torch.__version__
    assert (tmp_path / "run" / "scores.svg").stat().st_size > 5000


def test_the_same_command_goes_on_where_it_was_and_gives_the_same(capsys, folder, tmp_path):
    assert main(command(folder, tmp_path / "whole")) == 0
    whole = capsys.readouterr().out
    assert main(command(folder, tmp_path / "parts", methods=["apb:passing=0"], samples=2)) == 0
    store = tmp_path / "parts" / "records-0-of-1.jsonl"
    store.write_bytes(store.read_bytes()[:-20])  # as if killed while writing
    capsys.readouterr()
    assert main(command(folder, tmp_path / "parts")) == 0
    printed = capsys.readouterr()
    assert "half-written" in printed.err and "3 answers found" in printed.err
    assert main(command(folder, tmp_path / "parts", "--report-only")) == 0
    again = capsys.readouterr()
    assert printed.out == again.out and again.out.splitlines()[-9:] == whole.splitlines()[-9:]
    key = {r.key: r for r in read_records(tmp_path / "whole")}
    for record in read_records(tmp_path / "parts"):
        other = key.pop(record.key)
        assert (record.score, record.prediction) == (other.score, other.prediction)
        assert record.nll == pytest.approx(other.nll, rel=1e-4)
    assert not key


def test_shards_share_the_questions(capsys, folder, tmp_path):
    for shard in ("0/2", "1/2"):
        assert main(command(folder, tmp_path, "--shard", shard)) == 0
    first, second = ({r.seed for r in map(Record.from_line, path.read_text().splitlines())}
                     for path in sorted(tmp_path.glob("records-*.jsonl")))  # fmt: skip
    assert (first, second) == ({0, 2}, {1})
    printed = capsys.readouterr()
    assert "3 samples a task." in printed.out and "unfinished" not in printed.out


def test_another_setting_is_refused_before_the_model_is_loaded(capsys, folder, tmp_path):
    assert main(command(folder, tmp_path, samples=1)) == 0
    assert main(command(folder, tmp_path, "--max-new-tokens", "5")) == 2
    assert "max_new_tokens: the records in" in capsys.readouterr().err


def test_a_report_is_written_whole_or_not_at_all(monkeypatch, folder, tmp_path):
    assert main(command(folder, tmp_path, samples=1)) == 0
    before = (tmp_path / "report.json").read_bytes()
    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: write_text(path, text[:50]) and path.cut())
    monkeypatch.setattr(Path, "cut", lambda path: (_ for _ in ()).throw(OSError("no space")), raising=False)
    assert main(command(folder, tmp_path, "--report-only")) == 2
    assert (tmp_path / "report.json").read_bytes() == before and not list(tmp_path.glob(".*.part"))


def test_heads_whose_file_has_changed_are_refused_and_others_may_be_added(capsys, folder, tmp_path):
    for name in ("a", "b"):
        heads_file(tmp_path / f"{name}.safetensors", folder, seed=0)
    a, b = (f"apb:compressor=retaining-head,heads={tmp_path}/{name}.safetensors" for name in "ab")
    assert main(command(folder, tmp_path / "run", methods=[a], samples=1)) == 0
    assert main(command(folder, tmp_path / "run", methods=[b, a], samples=1)) == 0
    heads_file(tmp_path / "b.safetensors", folder, seed=1)
    assert main(command(folder, tmp_path / "run", methods=[a], samples=1)) == 0
    capsys.readouterr()
    assert main(command(folder, tmp_path / "run", methods=[a, b], samples=2)) == 2
    assert f"apb eval: heads of {b}: the records in" in capsys.readouterr().err


def test_packaged_heads_are_known_by_their_name(capsys, folder, tmp_path):
    method = "apb:compressor=retaining-head,heads=smollm2-135m"
    assert main(command(folder, tmp_path, methods=[method], samples=1)) == 2
    # They are found, and fit another model.
    assert "retaining heads: the checkpoint is for a model of 30 layers" in capsys.readouterr().err


def test_an_adapter_is_known_by_its_weights(capsys, folder, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def adapter(seed):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path / "lora")

    adapter(0)
    more = ("--adapter", str(tmp_path / "lora"))
    assert main(command(folder, tmp_path / "run", *more, methods=["star"], samples=1)) == 0
    assert main(command(folder, tmp_path / "run", *more, methods=["star"], samples=2)) == 0
    adapter(1)
    capsys.readouterr()
    assert main(command(folder, tmp_path / "run", *more, methods=["star"], samples=3)) == 2
    assert re.search(r"adapter: the records .* made with 'lora \(sha256 \w{12}\)', got", capsys.readouterr().err)


def test_earlier_samples_are_refused(capsys, folder, tmp_path, monkeypatch):
    assert main(command(folder, tmp_path, samples=1)) == 0
    monkeypatch.setattr(evaluation, "SAMPLES_VERSION", 99)
    assert main(command(folder, tmp_path, samples=1)) == 2
    assert "samples_version: the records in" in capsys.readouterr().err


def test_interrupting_keeps_what_was_answered(capsys, folder, tmp_path, monkeypatch):
    def stopped(setting, *, store, on_progress):
        on_progress(0, 9, "apb")
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stopped)
    assert main(command(folder, tmp_path)) == 130
    assert "0 answers are kept" in capsys.readouterr().err
    assert main(command(folder, tmp_path, "--report-only")) == 2
    assert "there are none to report" in capsys.readouterr().err


def test_suites_and_lengths_are_expanded(monkeypatch, folder, tmp_path):
    found = []
    monkeypatch.setattr(evaluation, "check", found.append)
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: None)
    more = (
        "--tasks",
        "ruler-offline",
        "vt",
        "passkey",
        "--length",
        "2K",
        "4096",
        "--hosts",
        "4",
        "8",
        "--shard",
        "1/4",
    )
    main(command(folder, tmp_path, *more))
    (setting,) = found
    assert setting.tasks == ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe", "passkey")
    assert setting.lengths == (2048, 4096) and setting.hosts == (4, 8) and setting.shard == (1, 4)
    assert setting.methods == ("flash", "apb:passing=0", "star:anchor=1/2")
    assert len(evaluation.SUITES["ruler"]) == 13 and len(evaluation.SUITES["infinitebench"]) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--model", "/nowhere"), "nothing loadable at '/nowhere'"),
        (("--model", ""), "--model: expected a model"),
        (("--tasks", "ruler-offline", "spelling"), "--tasks: expected some of ruler, ruler-offline"),
        (("--tasks", "qa_1"), "--squad: qa_1 need a file; give one with --squad FILE"),
        (("--haystack", "/nowhere.txt"), "--haystack: there is no file /nowhere.txt"),
        (("--adapter", "/nowhere"), "adapter: expected a directory"),
        (("--length", "4M"), "--length: expected tokens, such as 4096 or 4K, got '4M'"),
        (("--length", "0"), "--length: expected tokens"),
        (("--length", "128"), "length"),
        (("--methods", "spiral"), "--methods: expected [LABEL@] and one of flash, ring"),
        (("--methods", "apb:passing"), "passing: expected passing=VALUE"),
        (("--methods", "apb:passing=1/x"), "passing: expected an integer or a fraction"),
        (("--length", "1000000"), "--length: expected at most"),
        (("--methods", "apb:anchor=9999"), "--methods, --hosts: apb:anchor=9999 on 3 hosts"),
        (("--methods", "A@apb", "B@apb"), "expected one label a method"),
        (("--methods", "A@apb", "A@star"), "one method a label"),
        (("--hosts", "4", "0"), "--hosts: expected at least 1, got 0"),
        (("--samples", "0"), "--samples: expected at least 1, got 0"),
        (("--batch-tokens", "0"), "--batch-tokens: expected at least 1"),
        (("--max-new-tokens", "-1"), "--max-new-tokens: expected at least 1"),
        (("--shard", "4/4"), "--shard: expected I/N with I from 0"),
        (("--shard", "1"), "--shard: expected I/N"),
        (("--threshold", "101"), "--threshold: expected a percentage"),
        (("--device", "nonsense"), "device: expected auto, cpu, cuda, or cuda:N, got 'nonsense'"),
        (("--device", "cuda:99"), "device: got 'cuda:99', but PyTorch sees"),
        (("--report-only", "--out", "/nowhere"), "--out: there is no folder /nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded_or_written(capsys, monkeypatch, folder, tmp_path, change, said):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("ran"))
    assert main(command(folder, tmp_path / "run", *change)) == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert said in last and last.startswith("apb eval:") and not printed.out and not (tmp_path / "run").exists()


def test_a_bad_dtype_is_refused(capsys, folder, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(command(folder, tmp_path / "run", "--dtype", "float8"))
    assert ended.value.code == 2 and "float8" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_on_a_terminal_a_line_is_redrawn_and_cut_to_the_width(capsys, monkeypatch):
    from apb.cli.progress import redraw, show_phase

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "12")
    redraw("0123456789abcdef", over=False)
    redraw("new", over=True)
    show_phase("prefill", 0, 0)
    show_phase("prefill", 1, 2)
    first, second, third, fourth = capsys.readouterr().err.splitlines()
    up = "\x1b[1A\x1b[2K"
    assert (first, second) == ("0123456789a", f"{up}new")
    assert not third.startswith(up) and fourth.startswith(up)


def test_progress_says_how_long_it_will_take(capsys, monkeypatch):
    clock, store = iter([0.0, 0.0, 5.0, 60.0, 4000.0]), []
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: next(clock))
    progress = evaluation.Progress(store)
    progress(100, 1100, "a")  # a hundred were there
    store += range(50)
    progress(150, 1100, "b")  # too soon
    progress(160, 1100, "c")
    progress(1100, 1100, "done")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(" +", " ", line).strip() for line in lines] == [
        "60 s 160 of 1,100 answers, about 19 min left: c",
        "67 min 1,100 of 1,100 answers: done",
    ]
