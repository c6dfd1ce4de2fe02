"""apb compare: one table over all methods, each held against exact attention, and their masks side by side."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.cli import main
from apb.context import Context, Trace
from apb.masks import mask_grid, masks_picture, masks_text
from apb.methods import METHODS, make_method
from apb.reference import apb_mask, ape_mask, star_mask

EXACT = ["flash", "ring", "ring-zigzag", "ulysses"]


def compare(model_dir, *more):
    return ["compare", "--model", str(model_dir), "--document", str(model_dir / "document.txt"), "--query",
            "what is it ?", "--host-kind", "threads", "--max-new-tokens", "4", *more]  # fmt: skip


def test_every_method_answers_and_the_exact_ones_alike(capsys, model_dir, tmp_path):
    picture = tmp_path / "masks.svg"
    assert main(compare(model_dir, "--hosts", "3", "--json", "--picture", str(picture))) == 0
    outcomes = {outcome["name"]: outcome for outcome in json.loads(capsys.readouterr().out)}
    assert list(outcomes) == list(METHODS)
    assert picture.stat().st_size > 5000
    exact = outcomes["flash"]["report"]
    for name, outcome in outcomes.items():
        report = outcome["report"]
        hosts = report["hosts"]
        assert len(hosts) == (1 if make_method(name).one_host else 3)
        assert all(host["prefill_bytes"] == host["cost"]["sent_bytes"] * report["layers"] for host in hosts)
        if name in EXACT:
            assert report["tokens"] == exact["tokens"] and outcome["logit_difference"] < 1e-2
            if name != "ring":
                assert sum(host["of_exact"] for host in hosts) == pytest.approx(1)
        assert all(host["pairs"] == host["cost"]["pairs"] for host in hosts) or name == "minference"
    assert outcomes["star"]["logit_difference"] > 0.1 < outcomes["ape"]["logit_difference"]


def test_the_table_has_a_line_a_method_and_says_which_cannot_run(capsys, model_dir):
    names = ["ring", "star:anchor=1000", "apb:anchor=4,passing=2,compressor=key-norm"]
    assert main(compare(model_dir, "--hosts", "2", "--methods", *names)) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "star:anchor=1000: anchor: 1000 tokens reach into the second block" in printed.out
    head = next(line for line in lines if line.startswith("method"))
    assert all(word in head for word in ("prefill", "first token", "pairs", "sent MB", "peak MB", "logits off by"))
    assert [line.split()[:1] for line in lines].count(["ring"]) == 3  # the table, that of the phases, and the mask
    assert "[3/4]" in printed.err and "█" in printed.out
    assert main(compare(model_dir, "--methods", "ring", "rung")) == 2
    assert "method: expected one of flash, ring" in capsys.readouterr().err
    for wrong in (["--hosts", "0"], ["--max-new-tokens", "0"], ["--query", " "], ["--methods", "ring,flash"]):
        assert main(compare(model_dir, "--methods", "ring", "ulysses", *wrong)) == 2
        printed = capsys.readouterr()
        assert printed.err.count("expected") == 1 and "[1/" not in printed.err and not printed.out
    assert main(compare(model_dir, "--methods", "ring", "--picture", "/nowhere/masks.svg")) == 2
    assert "picture: expected a file in an existing folder" in capsys.readouterr().err


def test_what_was_measured_is_not_lost_if_exact_attention_runs_out_of_memory(capsys, model_dir, monkeypatch):
    from apb import compare as module

    run_job = module.run_job

    def scarce(job, **options):
        if job.method == "flash":
            raise torch.OutOfMemoryError("CUDA out of memory: tried to allocate 64 GiB\nand more")
        return run_job(job, **options)

    monkeypatch.setattr(module, "run_job", scarce)
    assert main(compare(model_dir, "--hosts", "2", "--methods", "ring", "flash")) == 1
    printed = capsys.readouterr().out
    assert "flash: CUDA out of memory: tried to allocate 64 GiB\n" in printed and "\nring " in printed


@given(tokens=st.integers(1, 40), hosts=st.integers(1, 5), start=st.integers(0, 9))
def test_masks_for_pictures_are_the_references(tokens, hosts, start):
    rows = torch.arange(tokens)
    start = min(start, -(-tokens // hosts))
    causal = apb_mask(tokens, tokens, 0, 0)
    for text, expected in (
        *((name, causal) for name in EXACT),
        (f"star:anchor={start}", star_mask(tokens, hosts, start)),
        (f"ape:prefix={start}", ape_mask(tokens, hosts, start)),
        (f"apb:anchor={start},passing=0", star_mask(tokens, hosts, start)),
        (f"apb:anchor={start},passing=0,layout=zigzag", None),
    ):
        method = make_method(text)
        if expected is None and start > -(-tokens // (2 * hosts)):
            continue
        plan = method.plan(tokens=tokens, hosts=1 if method.one_host else hosts)
        seen = method.mask(plan, rows, {})
        if expected is not None:
            assert torch.equal(seen, expected)
        assert seen.diagonal().all() and not (seen & ~causal).any()


def test_what_was_passed_shows_in_the_mask():
    method = make_method("apb:anchor=2,passing=2,compressor=key-norm")
    plan = method.plan(tokens=30, hosts=3)
    seen = method.mask(plan, torch.tensor([9, 10, 25]), {0: torch.tensor([4, 7]), 1: torch.tensor([12, 19])})
    assert seen[0].nonzero().flatten().tolist() == list(range(10))
    assert seen[1].nonzero().flatten().tolist() == [0, 1, 4, 7, 10]
    assert seen[2].nonzero().flatten().tolist() == [0, 1, 4, 7, 12, 19, *range(20, 26)]


def test_grids_are_shares_and_their_text_is_shaded(tmp_path):
    method = make_method("ring")
    for tokens, cells in ((1, 8), (7, 8), (64, 8)):
        grid = mask_grid(method, method.plan(tokens=tokens, hosts=2), {}, cells=cells)
        side = min(tokens, cells)
        assert grid.shape == (side, side) and grid.min() >= 0 and grid.max() <= 1
        assert torch.equal(grid.tril(-1) + torch.eye(side), torch.ones(side, side).tril()) or tokens == 64
        assert grid.triu(1).sum() == 0
    text = masks_text({"ring": grid, "again": grid}, per_line=2)
    assert text.splitlines()[-1].split() == ["ring", "again"] and "█" in text
    with pytest.raises(ValueError, match=r"ending in \.svg"):
        masks_picture({"ring": grid}, tmp_path / "masks.gif")


def test_peak_memory_is_what_came_on_top():
    """In a process of its own: in this one, garbage of other tests may be freed meanwhile."""
    program = """if True:
        import torch
        from apb.memory import PeakMemory
        memory = PeakMemory(torch.device("cpu"))
        x = torch.ones(30_000_000)  # 120 MB
        del x
        assert 100e6 < memory.bytes < 200e6, memory.bytes
    """
    subprocess.run([sys.executable, "-c", program], check=True)


def test_minference_shows_what_its_first_head_looked_at(capsys, model_dir, tmp_path):
    document = tmp_path / "longer.txt"
    document.write_text("the quick brown fox jumps over the lazy dog and the key is red . " * 24)
    name = "minference:pattern=a-shape,sink=3,local=70,dense_below=0"
    assert main(compare(model_dir, "--document", str(document), "--methods", name, "--json")) == 0
    report = json.loads(capsys.readouterr().out)[0]["report"]
    n = report["plan"]["tokens"]
    method = make_method(name, backend="reference")
    q = torch.zeros(1, 4, n, 16, dtype=torch.float64)
    trace = Trace(keep_indices=True, counted=True)
    method.attend(q, q, q, Context(method.plan(tokens=n, hosts=1), SimpleNamespace(rank=0, world_size=1), trace=trace))
    assert n > 300 and report["hosts"][0]["pairs"] == trace.pairs[0]
    share = trace.pairs[0] / (4 * n * (n + 1) / 2)
    assert report["hosts"][0]["of_exact"] == pytest.approx(share) and share < 0.8
    rows = torch.tensor([0, 5, 64, 130, n - 1])
    seen = method.mask(method.plan(tokens=n, hosts=1), rows, {}, trace.indices[0])
    assert torch.equal(seen, trace.indices[0].mask()[0, 0, rows])
    assert seen[-1, :3].all() and not seen[-1, 3:64].any() and seen[-1, n - 70 :].all()
