"""Shares of attention add up, errors stay within the bound, and what was measured is what the method does."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.bench import mass_plots
from apb.bench.mass import (
    COMPRESSORS,
    QKV,
    MassRow,
    block_scores,
    exact_layers,
    kept_positions,
    layer_masses,
    measure,
    read,
)
from apb.compress import KeyNorm
from apb.context import Context, Trace
from apb.methods import APB
from apb.parallel import run_threads
from apb.testing.tiny import tiny_model

LEDGER = Path(__file__).parents[1] / "benchmarks" / "attention_mass.csv"
SEEDS = st.integers(0, 2**31)
PARTS = ("anchor_mass", "block_mass", "passed_mass", "dropped_mass")
TOKENS, QUERY, HOSTS = 48, 3, 3


def draw_layer(seed, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, TOKENS + QUERY, 16, generator=generator) for heads in (4, 2, 2))
    return QKV(size * q, k, v, 0.5)


def make(name, passing):
    method = APB(passing=passing, compressor=COMPRESSORS[name], query_in="prefill")
    return method, method.plan(tokens=TOKENS, hosts=HOSTS, query=QUERY)


def choose(layer, x, method, plan):
    return kept_positions(block_scores(layer, x, method.compressor, plan), method.compressor.pool, plan)


def look(x, method, plan, every=1):
    rows = torch.arange(plan.block_tokens, TOKENS, every)
    return layer_masses(x, method, plan, choose(0, x, method, plan), rows)


@given(seed=SEEDS, passing=st.integers(0, 16), name=st.sampled_from(list(COMPRESSORS)))
@settings(max_examples=15)
def test_what_is_kept_is_what_the_method_passes(seed, passing, name):
    x, (method, plan) = draw_layer(seed), make(name, passing)
    document, query = torch.arange(TOKENS), torch.arange(TOKENS, TOKENS + QUERY)

    def body(host):
        rows, trace = plan.host_rows(host.rank, document, query), Trace(keep_indices=True)
        method.attend(*(t[:, :, rows] for t in x[:3]), Context(plan, host, 2, x.scale, trace=trace))
        return {block: kept[0] for (_, block), kept in trace.kept.items()}

    traced = {block: kept for host in run_threads(HOSTS, body) for block, kept in host.items()}
    found = choose(2, x, method, plan)
    assert all(torch.equal(found[block], traced[block]) for block in found)


@given(seed=SEEDS, passing=st.integers(0, 16), name=st.sampled_from(list(COMPRESSORS)))
@settings(max_examples=15)
def test_shares_are_the_softmaxs_and_errors_keep_to_the_bound(seed, passing, name):
    x, (method, plan) = draw_layer(seed), make(name, passing)
    kept, row = choose(0, x, method, plan), TOKENS - 2
    found = layer_masses(x, method, plan, kept, torch.tensor([row]))
    sums, error = dict.fromkeys(PARTS, 0.0), 0.0
    for head in range(4):
        k, v = (t[0, head // 2, :TOKENS].double() for t in (x.k, x.v))
        p = torch.softmax(0.5 * k[: row + 1] @ x.q[0, head, row].double(), dim=0)
        passed = {int(t) for block in (0, 1) for t in kept[block][head // 2]}
        seen = p.clone()
        for t in range(row + 1):
            part = 0 if t < plan.anchor else 1 if t >= plan.blocks[2].start else 2 if t in passed else 3
            sums[PARTS[part]] += float(p[t]) / 4
            seen[t] *= part < 3
        moved = (p - seen / seen.sum()) @ v[: row + 1]
        error += float(moved.norm() / v.norm(dim=-1).max()) / 4
    assert found == pytest.approx(found | sums | {"error": error}, abs=1e-9)
    assert found["error"] <= found["bound"] + 1e-12 and found["bound"] == pytest.approx(2 * sums["dropped_mass"])
    assert found["worst"] <= 1


@given(seed=SEEDS)
@settings(max_examples=5)
def test_with_everything_passed_nothing_is_dropped(seed):
    found = look(draw_layer(seed), *make("query-aware", TOKENS))
    assert found["dropped_mass"] == found["bound"] == found["worst"] == 0 and found["error"] < 1e-12


@given(seed=SEEDS, passing=st.integers(1, 15))
@settings(max_examples=8)
def test_nobody_drops_less_than_the_oracle(seed, passing):
    x = draw_layer(seed)
    least = look(x, *make("oracle", passing))["dropped_mass"]
    assert all(least <= look(x, *make(name, passing))["dropped_mass"] + 1e-6 for name in COMPRESSORS)


@pytest.fixture(scope="module")
def found():
    draw = torch.Generator().manual_seed(0)
    document, query = (torch.randint(97, (1, n), generator=draw) for n in (TOKENS, QUERY))
    chosen = {"norm": KeyNorm(), "random": COMPRESSORS["random"]}
    runs = (("norm", 2), ("random", 16))
    given = {"hosts": HOSTS, "every": 3, "passings": (2, 16), "compressors": chosen, "whole": runs}
    return list(measure(tiny_model("llama"), document, query, **given))


def test_the_layers_of_exact_attention_are_the_models(found):
    model = tiny_model("llama")
    ids = torch.arange(TOKENS)[None]
    layers = exact_layers(model, ids[:, :-QUERY], ids[:, -QUERY:])
    cache = tiny_model("llama")(ids, use_cache=True).past_key_values
    for x, layer in zip(layers, cache.layers, strict=True):
        torch.testing.assert_close((x.k, x.v), (layer.keys, layer.values))


def test_a_whole_run_begins_as_its_first_layer_and_a_full_budget_has_no_error(found):
    assert [(r["compressor"], r["passing"], r["layer"]) for r in found] == [
        ("norm", 2, 0), ("norm", 2, 1), ("norm", 2, -1), ("norm", 16, -1),
        ("random", 2, -1), ("random", 16, 0), ("random", 16, 1), ("random", 16, -1),
    ]  # fmt: skip
    first, second, mean, *_ = found
    assert first["whole_error"] == pytest.approx(first["error"], rel=1e-4) and first["error"] > 1e-3
    assert second["whole_error"] != pytest.approx(second["error"], rel=1e-2)
    assert mean["error"] == pytest.approx((first["error"] + second["error"]) / 2)
    assert mean["worst"] == max(first["worst"], second["worst"])
    assert all(r["whole_error"] < 1e-5 for r in found[-3:])


def rows_of(found):
    run = dict.fromkeys(("date", "device", "torch", "triton", "commit", "model", "text"), "x")
    return [MassRow(**run, **row) for row in found]


def test_pictures(found, tmp_path):
    rows = rows_of(found)
    for name, draw in {
        "shares": lambda path: mass_plots.shares(rows, path, "norm", 2),
        "bound": lambda path: mass_plots.bound(rows, path),
        "through": lambda path: mass_plots.through_layers(rows, path, [("norm", 2), ("random", 16)]),
    }.items():
        assert "<svg" in draw(tmp_path / f"{name}.svg").read_text()


def test_pictures_of_nothing_are_refused(found, tmp_path):
    rows = rows_of(found)
    with pytest.raises(ValueError, match="rows: none of 'norm' with 16 passed is of a single layer"):
        mass_plots.shares(rows, tmp_path / "a.svg", "norm", 16)
    with pytest.raises(ValueError, match="rows: expected some of all layers"):
        mass_plots.bound(rows[:2], tmp_path / "a.svg")
    with pytest.raises(ValueError, match="picture: expected a file"):
        mass_plots.bound(rows, tmp_path / "a.gif")


def test_the_ledger_keeps_to_the_bound():
    rows = read(LEDGER)
    for row in rows:
        assert sum(getattr(row, part) for part in PARTS) == pytest.approx(1, abs=1e-3)
        assert row.error <= row.bound + 1e-12 and row.worst <= 1
        assert row.bound == pytest.approx(2 * row.dropped_mass, rel=1e-3)
