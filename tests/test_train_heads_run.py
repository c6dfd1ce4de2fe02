"""A run of training heads: stopped and resumed it ends the same, what is saved is whole, and the command's words."""

import argparse
import hashlib
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_tokenizer import ESTHER, small_tokenizer
from training_cases import QUICK, Drawn, task_tokenizer

from apb.cli import main
from apb.cli import train_heads as train_heads_command
from apb.compress import load_retaining_head
from apb.files import write_whole
from apb.testing.tiny import tiny_model
from apb.train.checkpoint import load_state
from apb.train.retaining_heads import train_heads
from apb.train.step import train_step


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
