"""`apb eval` as a user calls it: checked first, stopped and continued, in shards, reported; and the harness's model."""

import importlib
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from apb.cli import main
from apb.compress import load_retaining_head
from apb.evals import lexicon, niah
from apb.evals.evaluate import Evaluation, PreparedMethods, cells, evaluate, load_subject
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


def test_a_report_is_written_whole_or_not_at_all(monkeypatch, folder, tmp_path):
    assert main(command(folder, tmp_path, samples=1)) == 0
    before = (tmp_path / "report.json").read_bytes()
    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: write_text(path, text[:50]) and path.cut())
    monkeypatch.setattr(Path, "cut", lambda path: (_ for _ in ()).throw(OSError("no space")), raising=False)
    assert main(command(folder, tmp_path, "--report-only")) == 2
    assert (tmp_path / "report.json").read_bytes() == before and not list(tmp_path.glob(".*.part"))


def heads_file(path, folder, seed):
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config, random = AutoConfig.from_pretrained(folder), torch.Generator().manual_seed(seed)
    dim = config.hidden_size // config.num_attention_heads
    inputs = (config.num_attention_heads + 2 * config.num_key_value_heads) * dim
    shapes = {"fc1": (8, inputs), "fc2": (config.num_key_value_heads, 8)}
    save_file(
        {f"model.layers.{layer}.self_attn.{part}.weight": torch.randn(shape, generator=random)
         for layer in range(config.num_hidden_layers) for part, shape in shapes.items()},
        path,
    )  # fmt: skip


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


def evaluated(folder, **changes):
    plain = {"tasks": ("niah_single_1",), "lengths": (512,), "methods": ("flash",), "hosts": (3,), "samples": 2}
    return Evaluation(model=str(folder), max_new_tokens=1, **{"device": "cpu"} | plain | changes)


def test_a_sample_that_cannot_be_made_is_named_and_the_answers_before_it_are_kept(folder, monkeypatch, tmp_path):
    from apb.evals import evaluate as module

    def made(*arguments, seed, **settings):
        if seed == 1:
            raise ValueError("no room")
        return make_sample(*arguments, seed=seed, **settings)

    make_sample = module.make_sample
    monkeypatch.setattr(module, "make_sample", made)
    said = "niah_single_1 at 512 tokens with seed 1 cannot be made: no room"
    with pytest.raises(ValueError, match=f"^{said}$"):
        evaluate(evaluated(folder))
    with (
        evaluation.Store(tmp_path) as store,
        pytest.raises(ValueError, match=f"^{said}; the answers so far are kept$"),
    ):
        evaluate(evaluated(folder), store=store)


def test_a_checkpoint_is_read_once_a_cell_and_never_to_list_the_cells(folder, monkeypatch, tmp_path):
    import apb.methods.names as names

    heads_file(tmp_path / "heads.safetensors", folder, seed=0)
    read = []
    monkeypatch.setattr(names, "load_retaining_head", lambda path: read.append(path) or load_retaining_head(path))
    method = f"apb:compressor=retaining-head,heads={tmp_path / 'heads.safetensors'}"
    setting = evaluated(folder, methods=(method, "minference"), samples=3, hosts=(2, 3), batch_tokens=1)
    assert [(cell.method, cell.hosts) for cell in cells(setting)] == [(method, 2), (method, 3), ("minference", 1)]
    assert not read
    assert len(evaluate(setting)) == 9
    assert len(read) == 3  # one to check the setting, one for each number of hosts
    prepared = PreparedMethods(load_subject(setting).model)
    assert prepared(method, tokens=100, hosts=2) is prepared(method, tokens=100, hosts=2)
    assert len(read) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ("spiral",)}, "methods: expected some of flash"),
        ({"methods": ("star:anchor=x",)}, "anchor: expected an integer"),
        ({"device": "nonsense"}, "device: expected auto, cpu"),
        ({"dtype": "float8"}, "dtype: expected auto, float32"),
    ],
)
def test_a_setting_is_refused_before_the_model_is_loaded(folder, monkeypatch, change, said):
    from apb.evals import evaluate as module

    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=said):
        evaluate(evaluated(folder, **change))


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


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)  # a blank line behind each header, as Llama 3 has it


def test_a_chat_header_is_no_document(harness, folder):
    lm = harness(str(folder), method="flash")
    lm.tokenizer.chat_template = CHATML
    user, bot = "<|im_start|>user\n\n", "<|im_end|>\n<|im_start|>assistant\n\n"

    def chat(*messages):
        roles = ("user", "assistant") * len(messages)
        return lm.apply_chat_template([{"role": role, "content": text} for role, text in zip(roles, messages)])  # noqa: B905

    assert chat("Who?") == f"{user}Who?{bot}"
    for text in (chat("Who are you?"), "<|im_start|>system\n\nBe kind.<|im_end|>\n" + chat("Who are you?")):
        for gen_prefix in ("", "The answer is"):
            with pytest.raises(ValueError, match=r"separator: expected .* got a text without it: …'Who are you"):
                lm.generate_until(requests((text + gen_prefix, {})))
    assert lm._split(chat("One.\n\nTwo.\n\nWho?")) == (f"{user}One.\n\nTwo.\n\n", f"Who?{bot}")
    assert lm._split(chat("One.\n\nWho?") + "He") == (f"{user}One.\n\n", f"Who?{bot}He")
    shots = chat("Who?", "Him.", "Who else?")  # a lone question behind earlier ones: these are the document
    assert lm._split(shots) == (shots[: shots.rindex("Who else")], f"Who else?{bot}")
    shots = chat("One.\n\nWho?", "Him.", "Two.\n\nWho else?")
    assert lm._split(shots)[1] == f"Who else?{bot}"


def test_an_empty_context_is_the_prefix_token_and_plain_full_attention(harness, folder):
    lm = harness(str(folder), method="apb", hosts=3)
    with pytest.raises(ValueError, match="context: an empty one needs a BOS or EOS token"):
        lm.loglikelihood(requests(("", " 12")))
    lm.tokenizer.bos_token, lm.tokenizer.eos_token = "a", "z"
    tokens = lm.tokenizer(" 12 grass").input_ids
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *tokens]], device=lm.model.device)
    with torch.no_grad():
        logs = lm.model(ids).logits[0, :-1].float().log_softmax(-1)
    truth = sum(logs[at, token].item() for at, token in enumerate(tokens))
    pairs = requests((DOCUMENT + QUERY, " 12"), ("", " 12 grass"))
    (_, (found, greedy)) = lm.loglikelihood(pairs)
    assert found == pytest.approx(truth, rel=1e-3) and not greedy
    (text,) = lm.generate_until(requests(("", {"max_gen_toks": 3})))
    assert text.startswith(lm.tokenizer.decode([lm.model(ids[:, :1]).logits[0, -1].argmax().item()]))
    ((_, greedy),) = lm.loglikelihood(requests(("", text)))
    assert greedy == (len(lm.tokenizer(text).input_ids) == 3)
    with pytest.raises(ValueError, match="continuation: expected some text"):
        lm.loglikelihood(requests(("", "")))


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
    with pytest.raises(ImportError, match=r"pip install 'apb\[lm-eval\]'"):
        importlib.import_module("apb.evals.lm_eval")
