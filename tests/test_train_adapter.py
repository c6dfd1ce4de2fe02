"""Adapters: what is learned is the answers, what is written is what was trained, and ranks learn as one."""

import json
import random

import pytest
import torch

pytest.importorskip("wonderwords")
pytest.importorskip("peft")

from small_tokenizer import ESTHER, small_tokenizer

from apb.cli import main
from apb.evals import Sources, make_sample
from apb.models import load_model
from apb.testing.tiny import tiny_model
from apb.train.adapter import AdapterTraining, train_adapter
from apb.train.dialogues import IGNORED, Dialogues, write_dialogue

SOURCES = Sources(haystack=ESTHER, split="training")
QUICK = AdapterTraining(tasks=("niah_single_1",), lengths=(512,), steps=3, batch_tokens=1024, rank=4, alpha=8)


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def model_of(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"))


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multiquery", "vt"])
def test_a_dialogue_learns_right_answers_and_nothing_else(tokenizer, task):
    sample = make_sample(task, tokenizer, length=1024, seed=5, sources=SOURCES)
    found = write_dialogue(tokenizer, sample, turns=4, length=1536, draw=random.Random(0))
    assert len(found.ids) == len(found.targets) <= 1536
    assert torch.equal(found.ids[found.targets != IGNORED], found.targets[found.targets != IGNORED])
    *answers, end = tokenizer.decode(found.targets[found.targets != IGNORED]).split("<|end|>")
    assert answers[0] == sample.answer and end == ""
    assert len(answers) == (1 if task != "niah_multikey_2" else 4)
    asked = tokenizer.decode(found.ids).split("<|start|>user")[2:]
    for question, answer in zip(asked, answers[1:], strict=True):
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


def test_training_lowers_the_loss(tokenizer, tmp_path):
    training = AdapterTraining(tasks=("vt",), lengths=(640,), steps=12, batch_tokens=640, turns=1, warmup=2, lr=1e-2)
    model = model_of(tokenizer)
    curve = train_adapter(
        model, tokenizer, tmp_path, training, SOURCES, base_model="tiny", workers=0, log_every=3
    ).curve
    assert curve[-1]["loss"] < 0.97 * curve[0]["loss"]


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
    assert main([*line, "--steps", "0"]) == 2
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
