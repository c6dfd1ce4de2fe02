"""`apb eval` as a user calls it: checked first, stopped and continued, in shards, reported; and the harness's model."""

import importlib
import json
import re
import sys
import types

import pytest
import torch

from apb.cli import main
from apb.evals import lexicon, niah
from apb.evals.haystack import NOISE
from apb.evals.record import Record
from apb.evals.store import read_records
from apb.testing.tiny import tiny_model

pytest.importorskip("wonderwords")

evaluation = importlib.import_module("apb.cli.eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a directory with a tiny model whose tokenizer knows the words of the tasks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False)
    listed = " ".join(" " + word for kind in ("adjective", "noun") for word in lexicon.words(kind, "evaluation"))
    raw.train_from_iterator([listed, *[NOISE, niah.NEEDLE, *niah.ask(["a"])] * 50], trainer)
    path = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(path)
    tiny_model(vocab_size=raw.get_vocab_size()).save_pretrained(path)
    return path


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
        (("--methods", "apb:anchor=9999"), "--methods: apb:anchor=9999 on 3 hosts at 512 tokens: anchor: 9999"),
        (("--methods", "A@apb", "B@apb"), "expected one label a method"),
        (("--methods", "A@apb", "A@star"), "one method a label"),
        (("--hosts", "4", "0"), "--hosts: expected at least 1, got 0"),
        (("--samples", "0"), "--samples: expected at least 1, got 0"),
        (("--batch-tokens", "0"), "--batch-tokens: expected at least 1"),
        (("--max-new-tokens", "-1"), "--max-new-tokens: expected at least 1"),
        (("--shard", "4/4"), "--shard: expected I/N with I from 0"),
        (("--shard", "1"), "--shard: expected I/N"),
        (("--threshold", "101"), "--threshold: expected a percentage"),
        (("--report-only", "--out", "/nowhere"), "--out: there is no folder /nowhere"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded_or_written(capsys, monkeypatch, folder, tmp_path, change, said):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("ran"))
    assert main(command(folder, tmp_path / "run", *change)) == 2
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert said in last and last.startswith("apb eval:") and not printed.out and not (tmp_path / "run").exists()


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


@pytest.fixture
def harness(monkeypatch):
    """Return our module on the least of lm_eval that a model of it meets."""

    class LM:
        def __init__(self):
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *_: None)

    known = {}

    def register_model(name):
        return lambda cls: known.setdefault(name, cls)

    for name, parts in {
        "lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {"register_model": register_model},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "apb.evals.lm_eval", raising=False)
    module = importlib.import_module("apb.evals.lm_eval")
    yield known["apb"]
    del sys.modules["apb.evals.lm_eval"]
    assert module.APBHarnessModel is known["apb"]


DOCUMENT = f"{NOISE * 3} One of the special magic numbers is 12. {NOISE}\n\n"
QUERY = "What is the special magic number? The number is"


def requests(*arguments):
    return [types.SimpleNamespace(args=pair) for pair in arguments]


def test_the_harness_gets_full_attention_from_methods_that_are_exact(harness, folder):
    """Likelihoods and answers of one pass over the whole text; the ring gives them too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer(DOCUMENT).input_ids + tokenizer(QUERY + " 12 grass").input_ids])
    answer = tokenizer(" 12 grass").input_ids
    with torch.no_grad():
        logs = model(ids).logits.float().log_softmax(-1)[0]
    places = range(ids.shape[1] - len(answer) - 1, ids.shape[1] - 1)
    truth = sum(logs[at, token].item() for at, token in zip(places, answer, strict=True))
    with torch.no_grad():
        told = model.generate(ids[:, : -len(answer)], max_new_tokens=6, do_sample=False)[
            0, ids.shape[1] - len(answer) :
        ]
    said = tokenizer.decode(told, skip_special_tokens=True)
    for method in ("flash", "ring"):
        lm = harness(str(folder), method=method, hosts=3)
        ((found, greedy),) = lm.loglikelihood(requests((DOCUMENT + QUERY, " 12 grass")))
        assert found == pytest.approx(truth, rel=1e-3) and not greedy
        ((_, greedy),) = lm.loglikelihood(requests((DOCUMENT + QUERY, said)))
        assert greedy == (tokenizer(QUERY + said).input_ids[-6:] == told.tolist())
        settings = {"until": ["\n\n"], "max_gen_toks": 6}
        stop = said[len(said) // 2 :][:2]
        texts = lm.generate_until(
            requests((DOCUMENT + QUERY, settings), (DOCUMENT + QUERY, {**settings, "until": [stop]}))
        )
        assert texts == [said, said[: said.index(stop)]]


def test_the_harness_runs_every_method_with_settings(harness, folder):
    for method in ("apb:anchor=1/4;passing=1/8", "star", "ape", "ring-zigzag", "minference"):
        lm = harness(str(folder), method=method, hosts="2", batch_size="1", max_batch_size=None)
        (text,) = lm.generate_until(requests((DOCUMENT + QUERY, {"max_gen_toks": 2})))
        assert isinstance(text, str)


def test_a_trailing_space_belongs_to_the_answer(harness, folder):
    lm = harness(str(folder), method="flash")
    pairs = requests((DOCUMENT + QUERY, " 12"), (DOCUMENT + QUERY + " ", "12"))
    first, second = lm.loglikelihood(pairs)
    assert first == second


def test_the_harness_is_told_what_cannot_be(harness, folder):
    with pytest.raises(ValueError, match=r"batch_size: .* got 8"):
        harness(str(folder), batch_size=8)
    with pytest.raises(ValueError, match="method: expected one of"):
        harness(str(folder), method="spiral")
    lm = harness(str(folder), method="flash")
    for text in ("one paragraph", "one\n\n", "\n\none"):
        with pytest.raises(ValueError, match="separator: expected"):
            lm.generate_until(requests((text, {})))
    with pytest.raises(ValueError, match="do_sample"):
        lm.generate_until(requests((DOCUMENT + QUERY, {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(ValueError, match="continuation: expected some text"):
        lm.loglikelihood(requests((DOCUMENT + QUERY, "")))
    with pytest.raises(NotImplementedError, match="loglikelihood_rolling"):
        lm.loglikelihood_rolling([])


def test_without_the_harness_the_way_out_is_named():
    with pytest.raises(ImportError, match="pip install lm_eval"):
        importlib.import_module("apb.evals.lm_eval")
