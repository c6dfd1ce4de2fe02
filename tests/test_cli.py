"""The commands as a user calls them, on a tiny model in a real directory."""

import json
import pickle
import re
import subprocess
import sys

import pytest
import torch

from apb.cli import main
from apb.cli.demo import hide_key
from apb.cli.progress import ShowText
from apb.costs import LLAMA_3_1_8B, host_cost
from apb.methods import METHODS, make_method
from apb.models import load_model
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


def test_several_documents_are_answered_in_their_order(capsys, model_dir, tmp_path):
    """One question for all, or one for each; the same tokens as one by one."""
    other = tmp_path / "other.txt"
    other.write_text((model_dir / "document.txt").read_text()[:150])
    run = ("--hosts", "2", "--host-kind", "threads", "--temperature", "0.8", "--top-k", "9", "--seed", "4")
    paths = [str(model_dir / "document.txt"), str(other)]
    queries = ["what is it ?", "what is the key ?"]
    expected = []
    for path, query in ((paths[0], queries[0]), (paths[1], queries[0]), (paths[1], queries[1])):
        assert main([*generate(model_dir, *run)[:3], "--document", path, "--query", query, "--max-new-tokens", "5",
                     "--json", *run]) == 0  # fmt: skip
        expected += tokens(capsys)
    assert main(generate(model_dir, "--document", paths[1], *run)) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["tokens"] for report in reports] == expected[:2]
    assert [report["document"] for report in reports] == paths
    assert main(generate(model_dir, "--document", paths[1], "--query", queries[1], *run, "--compare-exact")) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["tokens"] for report in reports[:2]] == [expected[0], expected[2]]
    assert [report["query"] for report in reports] == queries * 2 and len(reports) == 4


@pytest.mark.parametrize("kind", ["threads", "processes"])
@pytest.mark.parametrize("free", [True, False])
def test_a_follow_up_is_asked_on_the_same_prefill(capsys, model_dir, kind, free):
    run = ["--hosts", "2", "--host-kind", kind, "--anchor", "5"]
    run += ["--query-in", "after", "--compressor", "key-norm"] if free else []
    assert main(generate(model_dir, *run, "--follow-up", "what is the key ?", "--follow-up", "what is it ?")) == 0
    first, second, third = json.loads(capsys.readouterr().out)
    assert [report["sound"] for report in (first, second, third)] == [True, free, True]
    assert [report["further"] for report in (first, second, third)] == [False, True, True]
    assert first["tokens"] == third["tokens"] and third["query"] == "what is it ?"
    assert set(second["hosts"][0]["phase_ms"]) == {"query", "decode"}
    if free:
        arguments = generate(model_dir, *run)
        arguments[arguments.index("--query") + 1] = "what is the key ?"
        assert main(arguments) == 0
        assert tokens(capsys) == [second["tokens"]]
    assert main([a for a in generate(model_dir, *run, "--follow-up", "what is the key ?") if a != "--json"]) == 0
    printed = capsys.readouterr().out
    assert ("which serves this one as well" if free else "an approximation beyond the") in printed
    assert "Question: what is the key ?\nAnswer: " in printed


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_streamed_answer_is_the_answer(capfd, model_dir, kind):
    arguments = generate(model_dir, "--hosts", "2", "--host-kind", kind, "--follow-up", "what is the key ?")
    assert main([*arguments, "--stream"]) == 0  # JSON stays clean
    printed = capfd.readouterr()
    answers = [report["answer"] for report in json.loads(printed.out)]
    for answer, query in zip(answers, ("what is it ?", "what is the key ?"), strict=True):
        assert f"Question: {query}\nAnswer: {answer}\n" in printed.err
    plain = [argument for argument in arguments if argument != "--json"]
    assert main([*plain, "--stream"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith(f"Question: what is it ?\nAnswer: {answers[0]}\nQuestion: what is the key ?\n")
    assert printed.count("Answer:") == 2
    assert main(plain) == 0  # no terminal, no stream: the same, but for its order
    unstreamed = capfd.readouterr().out
    assert unstreamed.startswith(f"Answer: {answers[0]}\n") and printed.count("APB on") == unstreamed.count("APB on")


def test_what_shows_an_answer_survives_the_way_to_a_spawned_host(capsys):
    show = pickle.loads(pickle.dumps(ShowText(["who ?", "why ?"])))
    for question, piece in ((0, "the"), (0, " queen"), (0, ""), (1, ""), (1, "")):
        show(question, piece)
    assert capsys.readouterr().out == "Question: who ?\nAnswer: the queen\nQuestion: why ?\nAnswer: \n\n"


def test_an_answer_ends_at_a_stop_string(capsys, model_dir):
    run = ("--hosts", "2", "--host-kind", "threads")
    assert main(generate(model_dir, *run)) == 0
    (free,) = json.loads(capsys.readouterr().out)
    words = free["answer"].split()
    assert main(generate(model_dir, *run, "--stop", "no such text", "--stop", f" {words[2]}")) == 0
    (report,) = json.loads(capsys.readouterr().out)
    at = words.index(words[2]) if words.index(words[2]) > 0 else words.index(words[2], 1)
    assert report["answer"].split() == words[:at] and report["tokens"] == free["tokens"][: at + 1]


def test_an_adapter_changes_the_answer(capsys, model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    model = load_model(model_dir, device="cpu", dtype=torch.float32)
    settings = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(str(tmp_path))
    run = ("--hosts", "2", "--host-kind")
    assert main(generate(model_dir, *run, "threads")) == 0
    plain = tokens(capsys)
    for kind in ("threads", "processes"):
        assert main(generate(model_dir, *run, kind, "--adapter", str(tmp_path), "--dtype", "float32")) == 0
        assert tokens(capsys) != plain


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
        (("--document", "-", "--document", "-"), "document: standard input can be read once"),
        (("--document", "pyproject.toml", "--query", " "), "query: expected some text"),
        (("--hosts", "0"), "hosts: expected at least 1"),
        (("--hosts", "3", "--anchor", "1000"), "anchor: 1000 tokens reach into the second block"),
        (("--hosts", "3", "--passing", "-1"), "passing: expected an integer ≥ 0, got -1"),
        (("--method", "spiral"), "method: expected one of flash, ring"),
        (("--method", "flash", "--hosts", "2"), "hosts: flash runs on one host, got 2"),
        (("--method", "star", "--passing", "2"), "passing: star does not know it"),
        (("--hosts", "2", "--compressor", "retaining-head"), "give its file as heads=FILE"),
        (("--max-new-tokens", "0"), "max_new_tokens: expected at least 1"),
        (("--top-p", "0.5"), "top_p: 0.5 changes nothing at temperature 0"),
        (("--temperature", "-1"), "temperature: expected a number ≥ 0, got -1.0"),
        (("--stop", ""), "stop: expected some text, got ''"),
        (("--follow-up", " "), "query: expected some text"),
        (("--query", "another one ?"), "query: expected one for all 1 documents, or one for each, got 2"),
        (("--document", "pyproject.toml", "--stream"), "stream: the 2 documents are answered at once"),
        (("--document", "pyproject.toml", "--follow-up", "why ?"), "follow_ups: they are about one document, got 2"),
        (("--adapter", "/nowhere"), "adapter: expected a directory that PEFT has written"),
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
