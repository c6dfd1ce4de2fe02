"""A whole model end to end on two processes of a CPU: figures, who agrees with whom, and failures of one host."""

import math
from dataclasses import replace

import pytest
import torch

from apb.bench import append, end_to_end
from apb.bench.end_to_end import Answer, agreement, foretold, random_llama, run
from apb.bench.plots import read_ledger
from apb.bench.prefill.methods import line_up
from apb.bench.prefill.record import PrefillRow
from apb.bench.prefill.shapes import SHAPES

pytestmark = pytest.mark.timeout(120)

CPU = torch.device("cpu")
ENV = {"date": "2026-01-02", "device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"}
SIMULATED = PrefillRow(**ENV, mode="simulated", shape="tiny", tokens=512, hosts=2, method="ring-zigzag", ttft_ms=1e6)
ANSWER = Answer(
    exact=True,
    tokens=[3, 1, 4],
    logits=torch.tensor([0.0, 1.0]),
    ttft_ms=[20.0, 10.0, 12.0],
    token_ms=[2.0, 1.0],
    peak_gbytes=1.0,
    flop=10**9,
)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Fork two processes although there may be GPUs, with transformers imported once."""
    monkeypatch.setattr(end_to_end, "find_hosts", lambda name, hosts: (hosts, "gloo", ENV))
    random_llama(replace(SHAPES["tiny"], layers=1), 8, CPU)


def test_every_method_has_its_figures_and_exact_ones_agree(tmp_path, capfd):
    ledger, simulated = tmp_path / "ledger.csv", tmp_path / "prefill.csv"
    append(simulated, [SIMULATED])
    rows = run(out=ledger, shape="tiny", tokens=512, new_tokens=4, hosts=2, repeats=1, simulated=simulated,
               methods=("ring-zigzag", "ulysses", "apb-balanced", "star:anchor=300", "flash"))  # fmt: skip
    flash, rows = rows[-2:], rows[:-2]
    assert [row.case for row in flash] == ["tiny 512 on 1", "tiny 512 on 1, a further token"]
    assert flash[0].ms > 0 and "the tokens of ring-zigzag" in flash[0].notes
    firsts, furthers = rows[0:6:2], rows[1:6:2]
    named = ["ring-zigzag", "ulysses", "apb-balanced"]
    assert [row.backend for row in firsts] == [row.backend for row in furthers] == named and len(rows) == 7
    assert all(row.case == "tiny 512 on 2" and row.ms > 0 and row.tflops > 0 for row in firsts)
    assert all(row.case == "tiny 512 on 2, a further token" and row.ms > 0 for row in furthers)
    assert all("peak" in row.notes and row.device == "a GPU" for row in firsts)
    assert "a fused decoder simulated 1e+06 ms" in firsts[0].notes
    assert "the tokens of ring-zigzag, first logits at most" in firsts[1].notes
    assert "tokens of" not in firsts[0].notes + firsts[2].notes and "simulated" not in firsts[1].notes
    assert math.isnan(rows[-1].ms) and rows[-1].notes.startswith("ValueError: anchor")
    assert [row.backend for row in read_ledger(ledger)] == [row.backend for row in (*rows, *flash)]
    printed = capfd.readouterr().out
    assert "TTFT ms" in printed and "ValueError: anchor" in printed


def test_one_host_that_runs_out_of_memory_is_a_row_and_not_the_end(monkeypatch):
    whole = end_to_end.generate

    def scarce(model, method, host, prompt, *, max_new_tokens):
        if host.rank == 1 and not method.exact:
            raise torch.OutOfMemoryError("CUDA out of memory.\nand a long text")
        return whole(model, method, host, prompt, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(end_to_end, "generate", scarce)
    rows = run(shape="tiny", tokens=256, new_tokens=2, hosts=2, repeats=1, methods=("star", "ulysses"))
    assert rows[0].notes == "HostFailed: rehearsal: rank 1 of 2 failed: OutOfMemoryError: CUDA out of memory."
    assert math.isnan(rows[0].ms) and rows[1].backend == "ulysses" and rows[1].ms > 0


def test_random_weights_are_the_same_everywhere_and_stay_finite():
    shape = replace(SHAPES["tiny"], layers=24)
    model, again, other = (random_llama(shape, 64, CPU, seed=seed) for seed in (0, 0, 1))
    pairs = list(zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
    ids = torch.randint(shape.vocab, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    last = found.hidden_states[-2]  # before the final norm
    assert 1 < last.std() < 20 and 0.5 < found.logits.std() < 2
    assert model.config.num_key_value_heads == shape.kv_heads and model.config.head_dim == shape.head_dim


def test_agreement_between_exact_methods():
    other = replace(ANSWER, logits=torch.tensor([0.25, 1.0]))
    assert agreement(ANSWER, {}) == ""
    assert agreement(ANSWER, {"apb": replace(other, exact=False)}) == ""
    assert agreement(replace(ANSWER, exact=False), {"ring": other}) == ""
    held = {"apb": replace(other, exact=False, tokens=[0, 0, 0]), "ring": other, "flash": ANSWER}
    assert agreement(ANSWER, held) == "the tokens of ring, first logits at most 0.25 apart"
    held["ring"] = replace(other, tokens=[3, 2, 4])
    expected = "other tokens than ring from number 2 of 3 on, first logits at most 0.25 apart"
    assert agreement(ANSWER, held) == expected


def test_what_the_simulation_foretold():
    (contender,) = line_up(["ring-zigzag"], 512, 2)
    case = ("a GPU", end_to_end._Sizes(shape=SHAPES["tiny"], tokens=512, new_tokens=2, repeats=1), contender)
    row = replace(SIMULATED, ttft_ms=15.0)
    assert foretold([SIMULATED, row], *case) == "a fused decoder simulated 15 ms"
    assert foretold([row, replace(row, ttft_ms=9.0)], *case) == "a fused decoder simulated 9 ms"
    others = {"mode": "measured", "shape": "yi-34b", "tokens": 1024, "hosts": 4, "method": "apb", "device": "another"}
    for name, value in others.items():
        assert foretold([replace(row, **{name: value})], *case) == ""
    assert foretold([row, replace(row, ttft_ms=math.nan)], *case) == ""


def test_errors():
    with pytest.raises(ValueError, match=r"shape: expected one of .*tiny.*, got 'huge'"):
        run(shape="huge", hosts=2)
    with pytest.raises(ValueError, match="new_tokens: expected at least 2"):
        run(new_tokens=1, hosts=2)
    with pytest.raises(ValueError, match="methods: expected one of"):
        run(shape="tiny", methods=("nothing",), hosts=2)
