"""Adapters: what is learned is the answers, what is written is what was trained, and ranks learn as one."""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("wonderwords")
pytest.importorskip("peft")

from small_tokenizer import ESTHER, small_tokenizer

from apb.cli import main
from apb.evals import TASKS, Sources, make_sample
from apb.models import load_model
from apb.parallel import run_processes
from apb.testing.tiny import tiny_model
from apb.train.adapter import AdapterTraining, _add_adapter, _average, _forward, _optimise, train_adapter
from apb.train.dialogues import IGNORED, Dialogues, write_dialogue

SOURCES = Sources(haystack=ESTHER, split="training")
QUICK = AdapterTraining(tasks=("niah_single_1",), lengths=(512,), steps=3, batch_tokens=1024, rank=4, alpha=8)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def model_of(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"))


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3", "niah_multiquery", "vt"])
def test_a_dialogue_learns_right_answers_and_nothing_else(tokenizer, task):
    sample = make_sample(task, tokenizer, length=1024, seed=5, sources=SOURCES)
    found = write_dialogue(tokenizer, sample, turns=4, length=1536, draw=random.Random(0))
    assert len(found.ids) == len(found.targets) <= 1536
    assert torch.equal(found.ids[found.targets != IGNORED], found.targets[found.targets != IGNORED])
    *answers, end = tokenizer.decode(found.targets[found.targets != IGNORED]).split("<|end|>")
    assert answers[0] == sample.answer and end == ""
    assert len(answers) == {"niah_multikey_2": 4, "niah_multikey_3": 3}.get(task, 1)
    asked = tokenizer.decode(found.ids).split("<|start|>user")[2:]
    for question, answer in zip(asked, answers[1:], strict=True):
        assert f"special magic {TASKS[task].kind}" in question
        keys = [key for key in sample.facts if key in question]
        values = answer.strip().split(", ")
        assert sorted(values) == sorted(value for key in keys for value in sample.facts[key])
        assert not set(values) & set(sample.references), "it could be copied from an answer"


def test_batches_do_not_depend_on_who_writes_them(tokenizer):
    def data(**where):
        return Dialogues(
            tokenizer=tokenizer, tasks=("vt",), lengths=(640,), batch_tokens=1280, turns=1, sources=SOURCES, **where
        )

    alone = iter(data())
    ranks = [iter(data(rank=rank, world_size=2)) for rank in range(2)]
    for number in range(4):
        ids, targets = next(alone)
        other_ids, other_targets = next(ranks[number % 2])
        assert torch.equal(ids, other_ids) and torch.equal(targets, other_targets)


def test_what_is_written_is_what_was_trained(tokenizer, tmp_path):
    model = model_of(tokenizer)
    model.save_pretrained(tmp_path / "model")
    trained = train_adapter(
        model, tokenizer, tmp_path / "adapter", QUICK, SOURCES, base_model="tiny", workers=0, log_every=1
    )
    assert [point["step"] for point in trained.curve] == [1, 2, 3] and trained.stopped is None
    ids = torch.randint(97, (1, 20))
    merged = load_model(tmp_path / "model", device="cpu", dtype=torch.float32, adapter=tmp_path / "adapter")
    plain = load_model(tmp_path / "model", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        wanted, got, before = model(ids).logits, merged(ids).logits, plain(ids).logits
    moved = (wanted - before).abs().max()
    assert moved > 0 and (wanted - got).abs().max() < 0.05 * moved  # it is stored in bfloat16
    facts = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert facts["tasks"] == ["niah_single_1"] and len(facts["curve"]) == 3
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert "3 steps of 1,024 document tokens" in (tmp_path / "adapter" / "README.md").read_text()


def test_one_batch_seen_again_and_again_is_learned(tokenizer):
    training = AdapterTraining(tasks=("vt",), lengths=(640,), steps=40, turns=1, warmup=2, lr=2e-2, rank=8)
    data = Dialogues(
        tokenizer=tokenizer, tasks=training.tasks, lengths=(640,), batch_tokens=1280, turns=1, sources=SOURCES
    )
    model = model_of(tokenizer)
    adapted = _add_adapter(model, training, "tiny")
    curve = _optimise(
        model, learned(adapted), itertools.repeat(data.batch(0)), training, 1, 1, lambda: None, lambda point: None
    ).curve
    assert [point["step"] for point in curve] == list(range(1, 41))
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"] and curve[-1]["right"] > curve[0]["right"] + 0.2


def learned(adapted):
    return [weight for weight in adapted.parameters() if weight.requires_grad]


TWO = replace(QUICK, steps=2, batch_tokens=512, warmup=0, lr=1e-2)


def learn_on_a_rank(host, tokenizer, out):
    model = model_of(tokenizer)
    trained = train_adapter(model, tokenizer, out, TWO, SOURCES, base_model="tiny", workers=0, log_every=1)
    some = [torch.zeros(2, 2), torch.zeros(3), torch.zeros(1)]
    some[0].grad, some[2].grad = torch.full((2, 2), float(host.rank)), torch.full((1,), 10.0 * host.rank)
    _average(some, 2)
    return [weight.detach() for weight in learned(model)], trained.curve, [weight.grad for weight in some]


def test_two_ranks_learn_as_one(tokenizer, tmp_path):
    """Each of two ranks has a batch of its own; the step is the one of the mean gradient."""
    (ours, curve, means), (theirs, same_curve, same_means) = run_processes(2, learn_on_a_rank, tokenizer, tmp_path)
    for full, none, one in (means, same_means):  # the clip and AdamW would hide a factor
        assert full.tolist() == [[0.5, 0.5], [0.5, 0.5]] and none is None and one.tolist() == [5.0]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    model = model_of(tokenizer)
    weights = learned(_add_adapter(model, TWO, "tiny"))
    first = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0)
    data = Dialogues(
        tokenizer=tokenizer, tasks=TWO.tasks, lengths=TWO.lengths, batch_tokens=512, turns=4, sources=SOURCES
    )
    losses = []
    for step in range(2):
        each = [_forward(model, *data.batch(2 * step + rank))[0] for rank in range(2)]
        torch.stack(each).mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.param_groups[0]["lr"] = TWO.rate(step, step / 2)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(torch.stack(each).detach().mean()))
    moved = max(float((weight.detach() - before).abs().max()) for weight, before in zip(weights, first, strict=True))
    assert moved > 1e-3
    for one, wanted in zip(ours, weights, strict=True):
        torch.testing.assert_close(one, wanted.detach(), rtol=1e-4, atol=0.01 * moved)
    assert [point["loss"] for point in curve] == pytest.approx(losses, rel=1e-5)
    assert [point["loss"] for point in curve] == [point["loss"] for point in same_curve]
    assert json.loads((tmp_path / "training.json").read_text())["ranks"] == 2


def test_the_rate_rises_while_it_falls_along_a_cosine():
    training = AdapterTraining(tasks=("vt",), lr=1e-3, warmup=10)
    for step, done, wanted in ((0, 0.0, 1e-4), (9, 0.0, 1e-3), (10, 0.0, 1e-3), (99, 0.5, 5e-4), (99, 1.0, 0.0)):
        assert training.rate(step, done) == pytest.approx(wanted)
    assert replace(training, warmup=0).rate(0, 0.0) == 1e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps: expected an integer ≥ 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens: expected an integer ≥ 1, got 0"),
        ({"turns": 1.5}, "turns: expected an integer ≥ 1, got 1.5"),
        ({"rank": 0}, "rank: expected an integer ≥ 1, got 0"),
        ({"alpha": -1}, "alpha: expected an integer ≥ 1, got -1"),
        ({"warmup": -1}, "warmup: expected an integer ≥ 0, got -1"),
        ({"lr": 0.0}, r"lr: expected a number > 0, got 0\.0"),
        ({"lr": float("nan")}, "lr: expected a number > 0, got nan"),
        ({"minutes": 0}, "minutes: expected a number > 0, got 0"),
        ({"lengths": ()}, r"lengths: expected at least one, of 2 tokens or more, got \[\]"),
        ({"lengths": (512, 0)}, r"lengths: expected at least one, of 2 tokens or more, got \[512, 0\]"),
        ({"tasks": ()}, "tasks: expected some of niah_single_1, .*, got none"),
        ({"tasks": ("vt", "nial")}, "tasks: expected some of niah_single_1, .*, got nial"),
    ],
)
def test_settings_that_make_no_sense_say_so(change, says):
    with pytest.raises(ValueError, match=says):
        AdapterTraining(**({"tasks": ("vt",)} | change))
    assert replace(QUICK, warmup=0, minutes=None).minutes is None


def test_an_adapter_that_became_nan_is_not_written(tokenizer, tmp_path):
    model = model_of(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the loss became nan before step 3; start over with a smaller --lr"):
        train_adapter(model, tokenizer, tmp_path / "out", QUICK, SOURCES, base_model="tiny", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_stop_leaves_the_adapter(tokenizer, tmp_path):
    trained = train_adapter(
        model_of(tokenizer), tokenizer, tmp_path, QUICK, SOURCES, base_model="tiny", workers=0,
        stop=lambda: "interrupted",
    )  # fmt: skip
    assert trained.stopped == "interrupted" and trained.curve == []
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "sources", "says"),
    [({"lengths": (8192,)}, SOURCES, "lengths: 8192 tokens, but the model has 4096 positions"),
     ({}, Sources(haystack=ESTHER), "sources: expected the 'training' split")],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(tokenizer, tmp_path, change, sources, says):
    training = AdapterTraining(**({"tasks": ("vt",)} | change))
    with pytest.raises(ValueError, match=says):
        train_adapter(model_of(tokenizer), tokenizer, tmp_path, training, sources, base_model="tiny", workers=0)


def test_the_command_trains_and_says_where(tokenizer, tmp_path, capsys):
    model_of(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    line = ["train-adapter", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--tasks", "vt"]
    assert main([*line, "--length", "640", "--steps", "2", "--batch-tokens", "640", "--workers", "0"]) == 0
    assert f"The adapter is in {tmp_path / 'out'}." in capsys.readouterr().out
    assert main([*line, "--length", "640"]) == 2
    assert "--out: expected a new or empty directory" in capsys.readouterr().err
    line[4] = str(tmp_path / "another")
    for more, says in (
        (("--steps", "0"), "steps: expected an integer ≥ 1, got 0"),
        (("--minutes", "0"), "minutes: expected a number > 0, got 0.0"),
        (("--workers", "-1"), "workers: expected 0 or more processes, got -1"),
        (("--device", "cuda:99"), "device: got 'cuda:99', but PyTorch sees"),
        (("--tasks", "nial"), "tasks: expected some of niah_single_1, "),
    ):
        assert main([*line, "--length", "640", *more]) == 2
        assert says in capsys.readouterr().err
