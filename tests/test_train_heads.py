"""Training retaining heads: labels and loss against plain loops, what is trained is what runs, runs can be resumed."""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from small_tokenizer import ESTHER, small_tokenizer

from apb.cli import main
from apb.cli import train_heads as train_heads_command
from apb.compress import Candidates, Projections, load_retaining_head
from apb.evals import Sources
from apb.hf import model_shape
from apb.prompt import Prompt
from apb.testing.tiny import tiny_model
from apb.train.checkpoint import check_same_run, load_state, write_whole
from apb.train.examples import Example, GeneratedExamples
from apb.train.heads import StackedHeads, retaining_loss
from apb.train.labels import Observed, observe
from apb.train.overlap import top_overlap
from apb.train.prefetch import prefetch
from apb.train.report import write_report
from apb.train.retaining_heads import train_heads
from apb.train.settings import HeadTraining
from apb.train.step import backward, make_optimizer, train_step
from apb.train.text_examples import TextExamples


class Drawn:
    """Random tokens in the place of `apb.evals`."""

    longest = 60

    def make(self, number, *, held_out=False):
        generator = torch.Generator().manual_seed(2 * number + held_out)
        document, query, suffix, answer = torch.randint(97, (1, 60), generator=generator).split((44, 5, 3, 8), dim=1)
        prompt = Prompt(document=document, query=query, suffix=suffix, prefix_tokens=2)
        return Example(prompt=prompt, answer=answer, name=f"draw {number}")

    def facts(self):
        return {"data": "drawn", "lengths": "60"}


QUICK = HeadTraining(width=16, steps=9, warmup=2, eval_every=4, eval_examples=2)


def layer_inputs(model, ids):
    """Return each layer's post-RoPE q and k and pre-RoPE features by transformers' own eager attention, float64."""
    from transformers.models.llama import modeling_llama as llama

    found, positions = [], torch.arange(ids.shape[1])[None]
    model.set_attn_implementation("eager")
    hidden = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    cos, sin = model.model.rotary_emb(hidden[0], positions)
    for layer, x in zip(model.model.layers, hidden, strict=False):
        x = layer.input_layernorm(x)
        q, k, v = (getattr(layer.self_attn, f"{n}_proj")(x) for n in "qkv")
        heads = [part.view(*part.shape[:2], -1, 16).transpose(1, 2) for part in (q, k)]
        found.append((*llama.apply_rotary_pos_emb(*heads, cos, sin), torch.cat((q, k, v), dim=-1)))
    return found


@pytest.mark.parametrize("query_in", ["anchor", "after"])
@torch.no_grad()
def test_labels_and_features_are_the_formulas(query_in):
    model, example = tiny_model(dtype=torch.float64), Drawn().make(0)
    p = example.prompt
    seen = observe(model, example, query_in, reference=True)
    document = [p.document[:, :2], p.query, p.document[:, 2:]] if query_in == "anchor" else [p.document]
    ids = torch.cat((*document, p.query, p.suffix, example.answer), dim=1)
    rows = [0, 1, *range(7, 49)] if query_in == "anchor" else list(range(44))
    question = range(2, 7) if query_in == "anchor" else range(44, 49)
    for layer, (q, k, features) in enumerate(layer_inputs(model, ids)):
        torch.testing.assert_close(seen.features[layer], features[0, rows], rtol=1e-5, atol=1e-5)
        for head in range(2):
            logit = {h: (q[0, h] @ k[0, head].T).tolist() for h in (2 * head, 2 * head + 1)}
            for token, row in enumerate(rows):
                label = max(logit[h][i][row] / math.sqrt(16) for h in logit for i in range(len(logit[h]))[-8:])
                assert float(seen.labels[layer, head, token]) == pytest.approx(label, rel=1e-5, abs=1e-3)
                mean = sum(logit[h][i][row] for h in logit for i in question) / (2 * 5)
                assert float(seen.query_aware[layer, head, token]) == pytest.approx(mean, rel=1e-5, abs=1e-2)


def test_loss_is_the_formula():
    torch.manual_seed(0)
    scores, labels = torch.randn(3, 2, 7), 2 * torch.randn(3, 2, 7)
    for layer, found in enumerate(retaining_loss(scores, labels, 0.5).tolist()):
        error = rough = 0.0
        for s, y in zip(scores[layer].double().tolist(), labels[layer].double().tolist(), strict=True):
            for t in range(7):
                d = abs(s[t] - y[t])
                error += (d * d / 2 if d < 1 else d - 0.5) / 14
                rough += (s[t] - s[t - 1]) ** 2 / 12 if t else 0.0
        assert found == pytest.approx(error + 0.5 * rough, rel=1e-6)
    assert retaining_loss(scores[..., :1], labels[..., :1], 0.5).isfinite().all()  # one token has no neighbour


def test_a_few_layers_at_a_time_give_the_gradient_of_all(monkeypatch):
    model = tiny_model(layers=3)
    seen = observe(model, Drawn().make(1), "anchor")
    heads = [StackedHeads(model_shape(model.config), width=8) for _ in range(2)]
    whole = backward(heads[0], seen, 0.1)
    monkeypatch.setattr("apb.train.step._ACTIVATION_BYTES", 1)
    parts = backward(heads[1], seen, 0.1)
    torch.testing.assert_close(whole, parts)
    for one, other in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_what_is_trained_is_what_runs(tmp_path, dtype):
    model = tiny_model(dtype=dtype)
    heads = StackedHeads(model_shape(model.config), width=24, seed=3)
    features = observe(model, Drawn().make(2), "anchor").features
    trained, running = heads.score(features), heads.export(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for layer in range(2):
        q, k, v = (x.unflatten(-1, (-1, 16)).transpose(0, 1)[None] for x in features[layer].split((64, 32, 32), dim=-1))
        runs = running.score(Candidates(q=q, k=k, v=v, layer=layer, projections=Projections(q=q, k=k, v=v)))
        scale = float(trained.abs().max())
        torch.testing.assert_close(runs[0].float(), trained[layer].float(), rtol=0, atol=tolerance * scale)


def test_overlap_counts_common_tokens():
    labels = torch.arange(20.0)
    assert top_overlap(labels, labels, 0.1) == 1
    assert top_overlap(-labels, labels, 0.1) == 0
    assert top_overlap(torch.tensor([0.0, 9.0, 8.0]), torch.tensor([7.0, 9.0, 1.0]), 0.01) == 1  # at least one is kept
    torch.manual_seed(0)
    drawn = top_overlap(torch.rand(200, 100), torch.rand(200, 100), 0.1).mean()
    assert abs(float(drawn) - 0.1) < 0.02


def test_training_raises_the_overlap_above_random_and_above_untrained_heads(tmp_path):
    training = HeadTraining(width=64, steps=120, warmup=10, learning_rate=5e-3, eval_every=60, eval_examples=3)
    reports = []
    trained = train_heads(tiny_model(), Drawn(), training, tmp_path, on_progress=reports.append)
    untrained, middle, last = (point.overlap for point in trained.curve.points)
    assert last > 0.3 and last > untrained + 0.15 and middle > untrained
    assert [point.step for point in trained.curve.points] == [0, 60, 120]
    assert trained.curve.points[2].loss < trained.curve.points[0].loss / 2
    assert 0 < trained.curve.query_aware < 1
    assert len(reports) >= 6 and reports[-1].step == 120
    assert reports[-1].seconds_left == 0 and reports[0].loss > reports[-1].loss


def stop_at(step):
    """Make a `stop` that ends a run after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: "time is up" if next(asked) == step else None


@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, at):
    whole = train_heads(tiny_model(), Drawn(), QUICK, tmp_path / "whole")
    part = train_heads(tiny_model(), Drawn(), QUICK, tmp_path / "part", stop=stop_at(at))
    assert (part.step, part.stopped) == (at, "time is up")
    assert part.curve.points[-1].step == at
    rest = train_heads(tiny_model(), Drawn(), QUICK, tmp_path / "part")
    assert (rest.step, rest.stopped) == (9, None)
    for name in ("fc1", "fc2"):
        assert torch.equal(getattr(rest.heads, name), getattr(whole.heads, name))
    assert [(p.step, p.overlap) for p in rest.curve.points] == [(p.step, p.overlap) for p in whole.curve.points]
    again = train_heads(tiny_model(), Drawn(), QUICK, tmp_path / "part")  # nothing is left to do
    assert torch.equal(again.heads.fc1, whole.heads.fc1) and again.step == 9
    assert len(again.curve.points) == len(whole.curve.points)


def test_a_run_is_not_resumed_with_other_settings(tmp_path):
    about = {"base_model": "one"}
    train_heads(tiny_model(), Drawn(), QUICK, tmp_path, about=about, stop=stop_at(2))
    saved = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=r"width: expected 16, got 8\. .*can only be resumed so.*--no-resume"):
        train_heads(tiny_model(), Drawn(), replace(QUICK, width=8), tmp_path, about=about)
    with pytest.raises(ValueError, match="base_model: expected one, got two; seed: expected 0, got 1"):
        train_heads(tiny_model(), Drawn(), replace(QUICK, seed=1), tmp_path, about={"base_model": "two"})
    assert (tmp_path / "state.pt").read_bytes() == saved
    fresh = train_heads(tiny_model(), Drawn(), replace(QUICK, width=8), tmp_path, about=about, resume=False)
    assert fresh.heads.fc1.shape[1] == 8 and load_state(tmp_path)["step"] == 9
    with pytest.raises(ValueError, match=r"resume: expected the state of a run in .*nowhere, got none"):
        train_heads(tiny_model(), Drawn(), QUICK, tmp_path / "nowhere", resume=True)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"out: .*state\.pt cannot be read as the state of a run .*; remove it"):
        train_heads(tiny_model(), Drawn(), QUICK, tmp_path)
    torch.save({"step": 3}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="it holds something else"):
        train_heads(tiny_model(), Drawn(), QUICK, tmp_path)


def test_a_file_that_changed_under_its_name_is_noticed(tmp_path):
    haystack = tmp_path / "text.txt"
    haystack.write_text("One. Two. Three. Four.")
    sources = Sources(split="training", haystack=haystack)
    examples = GeneratedExamples(tokenizer=None, tasks=["niah_single_2"], lengths=[900], seed=5, sources=sources)
    before = examples.facts()
    assert before["haystack"] == "text.txt" and before["data_seed"] == "5"
    assert before["haystack_sha256"] == hashlib.sha256(haystack.read_bytes()).hexdigest()[:12]
    haystack.write_text("One. Two. Three. Five.")
    with pytest.raises(ValueError, match=r"haystack_sha256: expected .*, got .*can only be resumed so"):
        check_same_run(before, examples.facts(), tmp_path)
    other = replace(examples, seed=6)
    with pytest.raises(ValueError, match=r"^data_seed: expected 5, got 6"):
        check_same_run(examples.facts(), other.facts(), tmp_path)


def test_the_adapter_is_told_by_its_weights(tmp_path):
    arguments = SimpleNamespace(model="some/model", adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    found = []
    for weights in (b"one", b"two"):
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        found.append(train_heads_command._about(arguments, torch.float32))
    assert found[0]["adapter"] == found[1]["adapter"] == tmp_path.name
    assert found[0]["adapter_sha256"] == hashlib.sha256(b"one").hexdigest()[:12] != found[1]["adapter_sha256"]
    plain = train_heads_command._about(SimpleNamespace(model="some/model", adapter=None), torch.float32)
    assert plain == {"base_model": "some/model", "adapter": "none", "dtype": "float32"}


@pytest.mark.parametrize("weights", [False, True])
def test_what_is_no_number_is_not_saved(tmp_path, monkeypatch, weights):
    """The loss of step 5, or only what step 6 leaves, is no number: the state of step 4 stays."""

    def step(model, heads, optimizer, example, training, number):
        loss = train_step(model, heads, optimizer, example, training, number)
        if number + 1 < (6 if weights else 5):
            return loss
        with torch.no_grad():
            heads.fc2[1, 0, 3] = float("inf")
        return loss if weights else loss * float("nan")

    monkeypatch.setattr("apb.train.retaining_heads.train_step", step)
    says = "a weight became infinite or nan before step 6" if weights else "the loss became nan before step 6"
    with pytest.raises(RuntimeError, match=says):
        train_heads(tiny_model(), Drawn(), QUICK, tmp_path, save_every=2)
    state = load_state(tmp_path)
    assert state["step"] == 4 and all(weight.isfinite().all() for weight in state["heads"].values())
    monkeypatch.undo()
    assert train_heads(tiny_model(), Drawn(), QUICK, tmp_path).step == 9


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done, fsync, move = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), move(*names)))
    write_whole(tmp_path / "file", lambda part: part.write_text("all of it"))
    assert done == ["fsync", "replace"] and (tmp_path / "file").read_text() == "all of it"
    with pytest.raises(RuntimeError, match="half"):
        write_whole(tmp_path / "file", lambda part: (part.write_text("half"), raise_(RuntimeError("half"))))
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "all of it"


def raise_(error):
    raise error


def adamw(weights, gradients, training):
    """Take AdamW steps by the formula, the gradients' elements clipped first; return the weights after each."""
    found, mean, square = [weights.double()], 0.0, 0.0
    for step, gradient in enumerate(gradients):
        rate, (b1, b2) = training.rate(step), training.betas
        g = gradient.double().clamp(-training.clip, training.clip)
        mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * g * g
        m, v = mean / (1 - b1 ** (step + 1)), square / (1 - b2 ** (step + 1))
        found.append(found[-1] * (1 - rate * training.weight_decay) - rate * m / (v.sqrt() + 1e-8))
    return found[1:]


def test_a_step_is_adamw_on_clipped_gradients(monkeypatch):
    """Two steps: the first alone goes by the gradient's sign, whatever its size, and would hide the clip."""
    torch.manual_seed(0)
    training = HeadTraining(width=4, learning_rate=1e-2, warmup=3, smoothing=0.1)
    heads = StackedHeads(model_shape(tiny_model().config), width=4)
    optimizer = make_optimizer(heads, training)
    seen = [Observed(features=30 * torch.randn(2, 5, 128), labels=100 * torch.randn(2, 2, 5)) for _ in range(2)]
    start, gradients, got = copy.deepcopy(list(heads.parameters())), [], []
    for step in range(2):
        twin = copy.deepcopy(heads)
        twin.zero_grad()
        backward(twin, seen[step], training.smoothing)
        gradients.append([weight.grad for weight in twin.parameters()])
        monkeypatch.setattr("apb.train.step.observe", lambda *_, step=step: seen[step])
        train_step(None, heads, optimizer, None, training, step)
        got.append(copy.deepcopy(list(heads.parameters())))
    for number, weight in enumerate(start):
        sizes = torch.stack([gradient[number].abs() for gradient in gradients])
        assert (sizes > training.clip).any() and (sizes < training.clip).any()
        for step, wanted in enumerate(adamw(weight.detach(), [g[number] for g in gradients], training)):
            torch.testing.assert_close(got[step][number].detach().double(), wanted, rtol=1e-5, atol=1e-7)
        unclipped = adamw(weight.detach(), [g[number] for g in gradients], replace(training, clip=1e9))
        assert (got[1][number].detach() - unclipped[1]).abs().max() > 1e-4


@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_the_rate_rises_and_then_falls_or_stays(decay):
    training = HeadTraining(steps=100, warmup=20, learning_rate=1e-3, decay=decay)
    for step, wanted in ((0, 1e-3 / 20), (9, 5e-4), (19, 1e-3), (20, 1e-3)):
        assert training.rate(step) == pytest.approx(wanted)
    assert training.rate(60) == pytest.approx(5e-4 if decay == "linear" else 1e-3)
    assert training.rate(99) == pytest.approx(1e-3 / 80 if decay == "linear" else 1e-3)
    at_once = replace(training, warmup=0)
    assert at_once.rate(0) == 1e-3 and at_once.rate(99) == pytest.approx(1e-5 if decay == "linear" else 1e-3)
    never = replace(training, warmup=200)
    assert never.rate(99) == pytest.approx(5e-4)


def test_the_report_loads_as_retaining_heads(tmp_path):
    trained = train_heads(tiny_model(), Drawn(), QUICK, tmp_path, about={"base_model": "tiny"})
    written = write_report(trained, tmp_path, dtype=torch.float32)
    assert [path.name for path in written] == ["heads.safetensors", "curve.json", "README.md", "curve.png"]
    assert all(path.stat().st_size > 100 for path in written)
    heads = load_retaining_head(tmp_path / "heads.safetensors")
    heads.check_fits(layers=2, heads=4, kv_heads=2, head_dim=16)
    assert all(torch.equal(one, other) for one, other in zip(heads.fc1, trained.heads.fc1, strict=True))
    with pytest.raises(ValueError, match=r"the checkpoint is for a model of 2 layers.*this model has 30"):
        heads.check_fits(layers=30, heads=9, kv_heads=3, head_dim=64)
    with safe_open(tmp_path / "heads.safetensors", "pt") as file:
        facts = file.metadata()
    wanted = {"base_model": "tiny", "width": "16", "steps": "9", "steps_done": "9", "lengths": "60", "seed": "0"}
    assert wanted.items() <= facts.items() and "device" in facts
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert json.loads(facts["curve"]) == curve
    assert [point["step"] for point in curve["points"]] == [0, 4, 8, 9]
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card and "4,160 parameters" in card and "| 9 | " in card


def test_bad_settings_say_so(tmp_path):
    for setting, value, says in (
        ("width", 0, "width: expected an integer ≥ 1, got 0"),
        ("steps", 0, "steps: expected an integer ≥ 1, got 0"),
        ("learning_rate", 0.0, "learning_rate: expected a number > 0, got 0.0"),
        ("clip", float("nan"), "clip: expected a number > 0, got nan"),
        ("smoothing", -1.0, "smoothing: expected a number ≥ 0"),
        ("eval_fraction", 1.0, "eval_fraction: expected a share between 0 and 1"),
        ("betas", (0.9, 1.0), r"betas: expected two numbers, 0 ≤ beta < 1, got \(0.9, 1.0\)"),
        ("query_in", "before", "query_in: expected one of anchor, after, got 'before'"),
    ):
        with pytest.raises(ValueError, match=says):
            HeadTraining(**{setting: value})
    short = tiny_model(max_position_embeddings=59)
    with pytest.raises(ValueError, match="lengths: expected at most 59, the model's positions, got 60"):
        train_heads(short, Drawn(), QUICK, tmp_path)
    exact = tiny_model(max_position_embeddings=60)  # but for the question's copy
    with pytest.raises(ValueError, match="draw 0 with its question and answer has 65 tokens, but the model 60"):
        train_heads(exact, Drawn(), QUICK, tmp_path)
    with pytest.raises(ValueError, match=r"answer: expected ids \[1, at least 1 token\], got shape \(1, 0\)"):
        example = Drawn().make(0)
        observe(exact, Example(prompt=example.prompt, answer=example.answer[:, :0], name="empty"), "after")
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"the loss became nan before step 9 .*--learning-rate"):
        train_heads(broken, Drawn(), QUICK, tmp_path)


class Numbers:
    def make(self, number):
        if number == 13:
            raise ValueError("thirteen")
        return number


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_keeps_the_order_and_passes_errors_on(workers):
    assert list(prefetch(Numbers(), range(3, 13), workers=workers)) == list(range(3, 13))
    assert list(prefetch(Numbers(), range(3, 3), workers=workers)) == []
    with pytest.raises(ValueError, match=r"^thirteen$"):
        list(prefetch(Numbers(), range(10, 20), workers=workers))
    some = prefetch(Numbers(), range(5), workers=workers)
    assert next(some) == 0
    some.close()
    assert not multiprocessing.active_children()


def byte_tokenizer(text=""):
    """Make a tokenizer of one token a byte; with a text, its frequent words are tokens too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if text:
        trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0])


def task_tokenizer():
    """Make one that knows the words of the tasks' templates, so that questions have a usual number of tokens."""
    import apb.evals.niah
    import apb.evals.variable_tracking

    files = (apb.evals.niah.__file__, apb.evals.variable_tracking.__file__)
    return byte_tokenizer("\n".join(Path(file).read_text(encoding="utf-8") for file in files))


def test_generated_examples_are_functions_of_seed_and_number():
    examples = GeneratedExamples(tokenizer=task_tokenizer(), tasks=["niah_single_1", "vt"], lengths=[900, 1000], seed=5)
    for held_out in (False, True):
        made = [examples.make(number, held_out=held_out) for number in range(4)]
        again = examples.make(2, held_out=held_out)
        assert torch.equal(again.prompt.document, made[2].prompt.document) and torch.equal(again.answer, made[2].answer)
        assert all(example.prompt.prefix_tokens == 1 and example.answer.shape[0] == 1 for example in made)
    assert {example.name for example in made} == {
        f"{task} at {length} tokens" for task in ("niah_single_1", "vt") for length in (900, 1000)
    }
    one, other = (examples.make(0, held_out=held_out) for held_out in (False, True))
    assert one.prompt.document.tolist() != other.prompt.document.tolist()
    observe(tiny_model(vocab_size=2000), one, "anchor")
    for setting, says in (
        ({"tasks": []}, "tasks: expected at least one"),
        ({"lengths": []}, "lengths: expected at le"),
    ):
        with pytest.raises(ValueError, match=says):
            GeneratedExamples(**({"tokenizer": None, "tasks": ["vt"], "lengths": [900]} | setting))


def test_windows_of_text(tmp_path):
    text = "".join(chr(97 + i % 26) + chr(97 + i // 26 % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    sizes = {"lengths": [40, 60], "query_tokens": 5, "answer_tokens": 7}
    examples = TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **sizes)
    decode = byte_tokenizer().decode
    for held_out in (False, True):
        for number in range(20):
            made = examples.make(number, held_out=held_out)
            p = made.prompt
            parts = (p.document[0, 1:], p.query[0], made.answer[0])
            window = "".join(decode(part) for part in parts)
            assert window in (text[1800:] if held_out else text[:1800])
            assert len(window) + 1 in (40, 60) and len(p.query[0]) == 5 and len(made.answer[0]) == 7
            assert p.prefix_tokens == 1 and p.suffix.shape == (1, 0)
    assert examples.facts()["data"] == "a.txt"
    with pytest.raises(
        ValueError, match=r"data: .*a\.txt has 2000 tokens; expected at least \d+, so that its held-out"
    ):
        TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **(sizes | {"lengths": [300]}))
    with pytest.raises(ValueError, match=r"data: cannot read .*b\.txt as UTF-8 text .*or 'generated'"):
        TextExamples(byte_tokenizer(), [tmp_path / "b.txt"], **sizes)
    with pytest.raises(ValueError, match="lengths: expected at least 15 tokens with this question and answer"):
        TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **(sizes | {"lengths": [14]}))
    for more, says in (
        ({"answer_tokens": 0}, "answer_tokens: expected at least 1, got 0"),
        ({"lengths": []}, "lengths"),
    ):
        with pytest.raises(ValueError, match=says):
            TextExamples(byte_tokenizer(), [tmp_path / "a.txt"], **(sizes | more))
    with pytest.raises(ValueError, match="data: expected 'generated' or at least one text file"):
        TextExamples(byte_tokenizer(), [], **sizes)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Return a directory with a tiny model, a tokenizer and a text."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=2000).save_pretrained(path)
    task_tokenizer().save_pretrained(path)
    (path / "text.txt").write_text("".join(f"{i * i} is the square of {i}. " for i in range(200)))
    return path


def command(model_path, out, *more):
    return ["train-heads", "--model", str(model_path), "--out", str(out), "--steps", "6", "--width", "8",
            "--warmup", "2", "--eval-every", "3", "--eval-examples", "2", "--device", "cpu", *more]  # fmt: skip


def test_the_command_trains_on_generated_pairs(capsys, model_path, tmp_path):
    arguments = command(model_path, tmp_path, "--tasks", "niah_single_1,vt", "--lengths", "900", "--workers", "1")
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "Query-aware scores, training free: " in said.out and "heads.safetensors" in said.out
    assert "step 6/6  loss " in said.err and " tokens/s  0:00 left" in said.err
    heads = load_retaining_head(tmp_path / "heads.safetensors")
    assert heads.fc1[0].dtype == torch.bfloat16
    question = ["generate", "--model", str(model_path), "--document", str(model_path / "text.txt"), "--query", "what?",
                "--hosts", "2", "--host-kind", "threads", "--max-new-tokens", "2"]  # fmt: skip
    assert main([*question, "--compressor", "retaining-head", "--heads", str(tmp_path / "heads.safetensors")]) == 0
    assert "RetainingHead(" in capsys.readouterr().out
    assert main([*arguments, "--seed", "1"]) == 2
    assert "seed: expected 0, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("haystack", [False, True])
def test_the_default_tasks_are_of_every_kind(haystack):
    """Heads were worst on kinds of tasks that they had not been trained on."""
    arguments = ["--model", "m", "--out", "o", "--lengths", "4096", *(["--haystack", str(ESTHER)] if haystack else [])]
    parser = argparse.ArgumentParser()
    train_heads_command.add_arguments(parser)
    examples = train_heads_command._examples(parser.parse_args(arguments), small_tokenizer())
    wanted = ["niah_single_1", "niah_multikey_2", "vt", "cwe", "fwe"]
    assert examples.tasks == wanted + haystack * ["niah_multikey_1", "niah_multivalue", "niah_multiquery"]


def test_the_command_trains_on_text_and_goes_on_after_a_signal(capsys, model_path, tmp_path, monkeypatch):
    """As Ctrl-C and a scheduler's SIGTERM do: the step is finished, the state saved, the status says which."""
    arguments = command(model_path, tmp_path, "--data", str(model_path / "text.txt"), "--lengths", "200",
                        "--query-in", "after")  # fmt: skip
    arguments[arguments.index("--steps") + 1] = "1000"
    before = signal.getsignal(signal.SIGTERM)
    show = train_heads_command._Line.__call__
    for number, status, word in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):

        def send(line, now, number=number):
            show(line, now)
            os.kill(os.getpid(), number)

        monkeypatch.setattr(train_heads_command._Line, "__call__", send)
        assert main(arguments) == status
        said = capsys.readouterr().err
        assert f"{word} after {load_state(tmp_path)['step']} of 1000 steps; the state is saved in {tmp_path}" in said
        assert "To go on, give the same command" in said
    step = load_state(tmp_path)["step"]
    assert step >= 2 and signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert main([*arguments, "--minutes", "0.0001"]) == 0
    assert load_state(tmp_path)["step"] == step + 1
    assert main([*arguments, "--minutes", "0.0001", "--no-resume"]) == 0
    assert load_state(tmp_path)["step"] == 1


SHORT = ["--tasks", "vt", "--lengths", "900"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tasks", "nothing"], "tasks: expected some of niah_single_1, "),
        (["--data", "generated", "a.txt"], "data: expected 'generated' or text files, got both"),
        (["--data", "nowhere.txt"], "data: cannot read nowhere.txt"),
        (["--data", "text.txt", "--tasks", "vt"], "data: --tasks and --haystack are of generated pairs"),
        ([*SHORT, "--minutes", "0"], "minutes: expected more than 0, got 0.0"),
        (["--width", "0"], "width: expected an integer ≥ 1, got 0"),
        ([*SHORT, "--save-every", "0"], "save_every: expected at least 1 step, got 0"),
        ([*SHORT, "--workers", "-1"], "workers: expected 0 or more processes, got -1"),
        (["--tasks", "vt", "--lengths", "9000"], "lengths: expected at most 4096, the model's positions, got 9000"),
        (["--tasks", "vt,cwe", "--lengths", "900"], "length: cwe needs at least"),
        (["--device", "cuda:99"], "device: got 'cuda:99', but PyTorch sees"),
        ([*SHORT, "--adapter", "nowhere"], "adapter: expected a directory that PEFT has written"),
    ],
)
def test_the_command_refuses(capsys, model_path, tmp_path, more, says):
    assert main(command(model_path, tmp_path / "out", *more)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
