"""The commands as a user calls them, on a tiny model in a real directory."""

import json
import re
import subprocess
import sys

import pytest
import torch

from apb.cli import main
from apb.cli.demo import hide_key
from apb.costs import LLAMA_3_1_8B, host_cost
from apb.methods import METHODS, make_method
from apb.plan import plan_context


def generate(model_dir, *more):
    return ["generate", "--model", str(model_dir), "--document", str(model_dir / "document.txt"),
            "--query", "what is it ?", "--max-new-tokens", "5", "--json", *more]  # fmt: skip


def tokens(capsys):
    return [report["tokens"] for report in json.loads(capsys.readouterr().out)]


def test_plan_prints_counts_and_writes_pictures(capsys, tmp_path):
    arguments = ["plan", "--tokens", "1000", "--hosts", "4", "--anchor", "50", "--passing", "20", "--query-tokens", "7"]
    for name in ("plan.svg", "plan.png"):
        assert main([*arguments, "--picture", str(tmp_path / name)]) == 0
        assert (tmp_path / name).stat().st_size > 1000
    printed = capsys.readouterr().out
    plan = plan_context(tokens=1000, hosts=4, anchor=50, passing=20, query=7)
    assert "[750, 1000)" in printed and "A anchor" in printed
    assert all(f"{host_cost(plan, rank, LLAMA_3_1_8B).pairs:,}" in printed for rank in range(4))
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"][3]["passing_tokens"] == 60


def test_generate_gives_the_same_tokens_on_every_kind_of_host(capsys, model_dir):
    found = []
    for kind in ("processes", "threads", "simulated"):
        assert main(generate(model_dir, "--hosts", "3", "--host-kind", kind)) == 0
        found += tokens(capsys)
    assert found[0] == found[1] == found[2]


def test_generate_with_everything_passed_equals_exact_attention(capsys, model_dir):
    full = ("--anchor", "0", "--passing", "100", "--compressor", "key-norm", "--host-kind", "threads")
    assert main(generate(model_dir, "--hosts", "3", *full, "--compare-exact")) == 0
    split, exact = tokens(capsys)
    assert split == exact


@pytest.mark.parametrize("name", METHODS)
def test_generate_with_every_method(capsys, model_dir, name):
    """Exact ones answer as one host; all say who they are and what they scored."""
    hosts = "1" if make_method(name).one_host else "3"
    assert (
        main(generate(model_dir, "--method", name, "--hosts", hosts, "--host-kind", "threads", "--compare-exact")) == 0
    )
    mine, exact = json.loads(capsys.readouterr().out)
    assert (mine["title"], exact["title"]) == (METHODS[name].title, METHODS["flash"].title)
    if make_method(name).exact:
        assert mine["tokens"] == exact["tokens"]
        assert sum(host["of_exact"] for host in mine["hosts"]) == pytest.approx(1)
    if name != "minference":  # how much it scores depends on what it finds
        assert all(host["pairs"] == host["cost"]["pairs"] for host in mine["hosts"])


def test_generate_takes_settings_in_the_methods_name(capsys, model_dir):
    run = ("--hosts", "2", "--host-kind", "threads")
    assert main(generate(model_dir, "--method", "star:anchor=7", *run)) == 0
    assert main(generate(model_dir, "--method", "star", "--anchor", "7", *run)) == 0
    first, second = (
        json.loads(text)[0] for text in re.split(r"(?<=^\])\n", capsys.readouterr().out.strip(), flags=re.M)
    )
    assert first["tokens"] == second["tokens"]
    assert first["method"] == second["method"] == "Star(backend='auto', anchor=7)"


def test_torchrun_ranks_are_the_hosts(capsys, model_dir):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "apb"]
    done = subprocess.run([*command, *generate(model_dir)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert main(generate(model_dir, "--hosts", "2", "--host-kind", "threads")) == 0
    assert [report["tokens"] for report in json.loads(done.stdout)] == tokens(capsys)


def test_doctor_says_what_runs(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "NCCL" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--model", "/nowhere"), "nothing loadable at '/nowhere'"),
        (("--document", "/nowhere.txt"), "/nowhere.txt"),
        (("--query", " "), "query: expected some text"),
        (("--hosts", "0"), "hosts: expected at least 1"),
        (("--hosts", "3", "--anchor", "1000"), "anchor: 1000 tokens reach into the second block"),
        (("--hosts", "3", "--passing", "-1"), "passing: expected an integer ≥ 0, got -1"),
        (("--method", "spiral"), "method: expected one of flash, ring"),
        (("--method", "flash", "--hosts", "2"), "hosts: flash runs on one host, got 2"),
        (("--method", "star", "--passing", "2"), "passing: star does not know it"),
        (("--hosts", "2", "--compressor", "retaining-head"), "give its file as heads=FILE"),
        (("--max-new-tokens", "0"), "max_new_tokens: expected at least 1"),
    ],
)
def test_bad_input_is_one_line_that_says_what_was_wrong(capsys, model_dir, change, said):
    assert main(generate(model_dir, "--host-kind", "threads", *change)) in (1, 2)
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-1]
    assert said in last and last.startswith("apb generate:") and not printed.out


def test_the_demo_hides_one_key_somewhere_in_the_text():
    for seed in range(20):
        document, key, depth = hide_key(seed)
        assert document.count(key) == 1 and len(key) == 5
        assert abs(document.index(key) / len(document) - depth) < 0.01


@pytest.mark.parametrize("name", METHODS)
def test_plan_of_a_method_shows_its_costs_and_its_mask(capsys, tmp_path, name):
    hosts = 1 if make_method(name).one_host else 4
    picture = tmp_path / "mask.svg"
    arguments = ["plan", "--tokens", "1000", "--hosts", str(hosts), "--method", name, "--query-tokens", "5"]
    assert main([*arguments, "--picture", str(picture)]) == 0
    method, printed = make_method(name), capsys.readouterr().out
    plan = method.plan(tokens=1000, hosts=hosts, query=5)
    assert str(plan) in printed and "█" in printed and picture.stat().st_size > 1000
    assert all(f"{method.cost(plan, rank, LLAMA_3_1_8B).pairs:,}" in printed for rank in range(hosts))
    assert main([*arguments, "--hosts", "0"]) == 2
    assert "hosts:" in capsys.readouterr().err
