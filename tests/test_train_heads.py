"""Training retaining heads: labels, loss and step against plain loops, and what is trained is what runs."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from training_cases import QUICK, Drawn

from apb.compress import Candidates, Projections, load_retaining_head
from apb.hf import model_shape
from apb.testing.tiny import tiny_model
from apb.train.examples import Example
from apb.train.heads import StackedHeads, retaining_loss
from apb.train.labels import Observed, observe
from apb.train.overlap import top_overlap
from apb.train.report import write_report
from apb.train.retaining_heads import train_heads
from apb.train.settings import HeadTraining
from apb.train.step import backward, make_optimizer, train_step


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
