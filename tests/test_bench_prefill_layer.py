"""What the prefill benchmark runs is a prefill: the logits of a plain decoder; its budgets, its memory, its link."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from live_bytes import LiveBytes
from prefill_cases import CPU, contender, decoder, prefill_and_ask

from apb.bench.prefill import layer, link, memory
from apb.bench.prefill.link import NVLINK, Link, fit_link, measure_link
from apb.bench.prefill.methods import PRESETS, RandomHead, line_up
from apb.bench.prefill.shapes import SHAPES
from apb.bench.prefill.share import Share
from apb.compress import SnapKV
from apb.context import Trace
from apb.hf import share_weights
from apb.parallel import LoneHost, run_threads
from apb.session import Session


def exact_logits(model, document, query):
    """Return the logits after the question of a plain decoder, written out in float64."""
    ids = torch.cat((document, query))
    x, d = model.embedding[ids], model.shape.head_dim
    angle = torch.arange(len(ids))[:, None] * model.shape.rope_theta ** (-torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones((), dtype=torch.float64), angle.double())[:, None]

    def norm(x, weight):
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotated(x):
        pairs = torch.complex(x[..., : d // 2].contiguous(), x[..., d // 2 :].contiguous()) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    for _ in range(model.shape.layers):
        y = norm(x, model.norms[0])
        q, k, v = ((y @ w.T + (0 if b is None else b)).reshape(len(ids), -1, d)
                   for w, b in zip(model.qkv, model.bias, strict=True))  # fmt: skip
        q, k = rotated(q), rotated(k)
        outs = []
        for head in range(q.shape[1]):
            read = head * k.shape[1] // q.shape[1]
            scores = q[:, head] @ k[:, read].T / math.sqrt(d)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            outs.append(scores.softmax(dim=-1) @ v[:, read])
        x = x + torch.cat(outs, dim=-1) @ model.o
        y = norm(x, model.norms[1])
        g, u = (y @ model.gate_up.T).chunk(2, dim=-1)
        x = x + (g * g.sigmoid() * u) @ model.down
    return norm(x[-1:], model.norms[2]) @ model.head.T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["flash", "minference", "ring", "ring-zigzag", "ulysses", "apb"])
def test_exact_methods_give_the_logits_of_a_plain_decoder(name, bias, monkeypatch):
    monkeypatch.setattr(layer, "FFN_ROWS", 50)  # several chunks, the last one shorter
    model, tokens = decoder(torch.float64, qkv_bias=bias), 203
    changes = {"anchor": 0, "passing": tokens, "query_in": "after"} if name == "apb" else {}  # all passed: exact
    method, plan = contender(name, tokens, 3, model, **changes)
    found = run_threads(plan.hosts, prefill_and_ask, model, method, plan)
    share = Share(model, method, plan, LoneHost(0, plan.hosts), caches=1)
    truth = exact_logits(model, share.document, share.query)
    for logits in found:  # partial results travel in float32
        torch.testing.assert_close(logits, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_every_method_gives_the_logits_that_a_session_of_the_same_weights_gives(name):
    model = decoder(torch.float64, rope_theta=500_000.0)
    method, plan = contender(name, 517, 2, model)
    found = run_threads(plan.hosts, prefill_and_ask, model, method, plan)
    share = Share(model, method, plan, LoneHost(0, plan.hosts), caches=1)
    hf = hugging_face(model)

    def ask(host):
        session = Session(share_weights(hf), method, plan, host)
        hidden = session.prefill(share.document[None], share.query[None])
        runs_along = plan.host(host.rank).query_rows
        return session.logits(hidden[:, -1]) if runs_along else session.extend(share.query[None])

    for logits, expected in zip(found, run_threads(plan.hosts, ask), strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def hugging_face(model):
    """Return a Llama whose layers all have the decoder's weights."""
    import transformers

    shape = model.shape
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers, head_dim=shape.head_dim,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta}, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).to(model.dtype).eval()
    gate, up = model.gate_up.chunk(2)
    each = {"self_attn.q_proj": model.qkv[0], "self_attn.k_proj": model.qkv[1], "self_attn.v_proj": model.qkv[2],
            "self_attn.o_proj": model.o.T, "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": model.down.T,
            "input_layernorm": model.norms[0], "post_attention_layernorm": model.norms[1]}  # fmt: skip
    weights = {"model.embed_tokens": model.embedding, "lm_head": model.head, "model.norm": model.norms[2]}
    weights |= {f"model.layers.{i}.{name}": w for i in range(shape.layers) for name, w in each.items()}
    hf.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    return hf


def test_projections_are_those_before_rope():
    model = decoder(torch.float64)
    x, rope, seen = model.embed(torch.arange(9)), model.rope(torch.arange(3, 12)), []

    def attend(q, k, v, before):
        seen.append((q, k, v, before))
        return torch.zeros_like(q)

    model.layer(x.clone(), rope, attend, Trace(), projections=True)
    model.layer(x.clone(), rope, attend, Trace())
    (q, k, v, before), (*_, none) = seen
    assert none is None and torch.equal(before.v, v)
    for raw, after in ((before.q, q), (before.k, k)):
        torch.testing.assert_close(layer.rotate(raw.transpose(1, 2), *rope).transpose(1, 2), after)
        assert not torch.allclose(raw, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stream_stays_finite_over_many_layers(dtype):
    model = decoder(dtype)
    method, plan = contender("flash", 100, 1, model)
    share = Share(model, method, plan, LoneHost(0, 1), caches=1)
    share.prefill([Trace()] * 100)
    assert share.ask([Trace()] * 100).abs().max() < 100


@pytest.mark.parametrize("name", list(SHAPES)[:3])
def test_shapes_have_as_many_weights_as_their_models(name):
    """8.03, 14.77 and 34.39 · 10⁹, of which the norms of q, k and v, if any, are none."""
    millions = {"llama-3.1-8b": 8030.26, "qwen-2.5-14b": 14770.03, "yi-34b": 34388.92}
    assert SHAPES[name].weight_bytes / 2e6 == pytest.approx(millions[name], abs=0.01)


def test_a_decoder_weighs_what_its_shape_says():
    model = decoder(qkv_bias=True)
    held = (*model.qkv, *model.bias, model.o, model.gate_up, model.down, *model.norms, model.embedding, model.head)
    others = (model.shape.layers - 1) * model.shape.layer_bytes
    assert sum(x.nbytes for x in held) + others == model.shape.weight_bytes
    head = RandomHead().prepare(model.shape, CPU, torch.float32)
    assert sum(x.nbytes for x in (*head.fc1, *head.fc2)) == RandomHead.weight_bytes(model.shape)


@given(rows=st.integers(0, 10**6), most=st.integers(1, 20_000))
def test_chunks_of_the_ffn_are_even_and_as_few_as_they_can_be(rows, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "FFN_ROWS", most)
        chunks = [len(chunk) for chunk in torch.empty(rows, 0).split(layer.ffn_rows(rows))]
    assert sum(chunks) == rows and max(chunks) <= most and len(chunks) == max(1, -(-rows // most))
    assert max(chunks) - min(chunks) < len(chunks)


def test_what_is_compiled_is_compiled_once_for_all_lengths_and_methods(monkeypatch):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    pieces = layer._elementwise(count)
    monkeypatch.setattr(layer, "_elementwise", lambda backend: pieces)
    model = decoder()
    for name, tokens, hosts in (("apb-balanced", 517, 2), ("flash", 300, 1), ("ring", 901, 3), ("spava", 620, 2)):
        method, plan = contender(name, tokens, hosts, model)
        for rank in range(hosts):
            assert prefill_and_ask(LoneHost(rank, hosts), model, method, plan).isfinite().all()
    assert len(compiled) == len(pieces) == 4


# Budgets and the line-up.


def test_presets_have_the_papers_budgets():
    made = {one.label: (one.make(), one.hosts) for one in line_up(PRESETS, 131072, 8)}
    assert made["flash"][1] == made["minference"][1] == 1 and made["ring"][1] == made["spava"][1] == 8
    plan = {name: method.plan(tokens=131072, hosts=hosts, query=64) for name, (method, hosts) in made.items()}
    assert (plan["apb"].anchor, plan["apb"].passing, plan["apb"].query_in) == (4096, 2048, "anchor")
    assert (plan["star"].anchor, plan["ring-zigzag"].layout) == (16384, "zigzag")
    balanced = plan["apb-balanced"]
    assert (balanced.anchor, balanced.passing, balanced.layout, balanced.split_anchor) == (4096, 1024, "zigzag", True)
    passed = [sum(block.kept_tokens for block in plan[name].blocks) for name in ("apb", "apb-balanced")]
    assert passed == [7 * 2048, 15 * 1024]
    (long,) = line_up(["apb"], 524288, 8)
    assert long.make().anchor == 8192


def test_settings_leave_the_rest_of_a_preset_as_it_is():
    names = ["apb:passing=512", "apb-balanced: anchor=1024,backend=hopper", "apb:compressor=snapkv", "ape:scale=1"]
    other, balanced, snap, ape = line_up(names, 131072, 8, backend="sdpa")
    plain = {one.label: one.make() for one in line_up(PRESETS, 131072, 8, backend="sdpa")}
    assert (other.label, other.backend, other.hosts) == ("apb:passing=512", "sdpa", 8)
    assert other.make() == replace(plain["apb"], passing=512)
    assert balanced.make() == replace(plain["apb-balanced"], anchor=1024, backend="hopper")
    assert balanced.backend == "hopper" and ape.make() == replace(plain["ape"], scale=1.0)
    assert snap.make() == replace(plain["apb"], compressor=SnapKV())


def test_the_random_head_is_no_head_before_it_is_prepared():
    with pytest.raises(ValueError, match="use what that returns"):
        RandomHead().score(None)


# Memory.


@pytest.fixture
def fused(monkeypatch):
    """Let kernels take no more memory than their results, as they do on a GPU."""

    def masked(q, k, v, **settings):
        return torch.zeros_like(q), q.new_zeros(q.shape[:-1])

    monkeypatch.setattr("apb.methods.method.masked_attention", masked)
    monkeypatch.setattr("apb.methods.method.decode_attention", masked)
    monkeypatch.setattr("apb.methods.ring.merge_into", lambda *parts: None)
    monkeypatch.setattr("apb.compress.retaining_head.head_scores", lambda p, fc1, fc2: p.k[..., 0].clone())
    turn = lambda x, *rope: x.clone()  # noqa: E731
    pieces = (lambda x, weight: x.clone(), turn, turn, lambda x: x.chunk(2, dim=-1)[0].clone())
    monkeypatch.setattr(layer, "_elementwise", lambda backend: pieces)


@pytest.mark.parametrize("rows", [300, 16384])
@pytest.mark.parametrize("name", PRESETS)
def test_the_formula_of_the_peak_is_what_tensors_take(name, rows, fused, monkeypatch):
    """Within a seventh: Ulysses' messages are charged as a process group packs them, which a lone host does not."""
    monkeypatch.setattr(layer, "FFN_ROWS", rows)
    model = decoder()
    method, plan = contender(name, 4096, 4, model)
    (one,) = line_up([name], 4096, 4)
    taken, formula = [], []
    for rank in range(plan.hosts):
        with LiveBytes() as live:
            host = LoneHost(rank, plan.hosts)
            share = Share(model, method, plan, host, caches=model.shape.layers)
            share.prefill([Trace()] * 2)
        taken.append(live.peak - host.noise_bytes)
        whole = memory.host_peak_bytes(one.make(), plan, rank, model.shape)
        formula.append(whole - memory.weight_bytes(one.make(), model.shape))
        del share
    assert 0.86 <= max(taken) / max(formula) <= 1.03


@pytest.mark.parametrize("name", ["apb", "apb-balanced"])
def test_no_host_of_apb_ever_has_a_tensor_as_long_as_the_document(name):
    model, tokens, hosts = decoder(), 6144, 8
    method, plan = contender(name, tokens, hosts, model)
    for rank in range(hosts):
        with LiveBytes() as live:
            prefill_and_ask(LoneHost(rank, hosts), model, method, plan)
        longest = max(size for shape in live.shapes for size in shape)
        assert tokens // hosts <= longest < tokens // 2
    with LiveBytes() as live:
        prefill_and_ask(LoneHost(0, 1), model, *contender("flash", tokens, 1, model))
    assert max(size for shape in live.shapes for size in shape) >= tokens


# The link.


@given(latency=st.floats(0, 1), rate=st.floats(1, 1000), sizes=st.sets(st.integers(1, 1000), min_size=2, max_size=6))
def test_a_fit_finds_the_line_that_points_lie_on(latency, rate, sizes):
    points = [(1e6 * size, latency + size / rate) for size in sizes]
    found = fit_link(points)
    for size, ms in points:
        assert found.ms(1, size) == pytest.approx(ms, rel=1e-2, abs=1e-5)


def test_the_link_between_two_gpus_is_the_measured_one():
    for size, ms in [(8.4e6, 0.058), (25e6, 0.126), (67e6, 0.42)]:
        assert NVLINK.ms(1, size) == pytest.approx(ms, rel=0.25)
    assert Link(latency_ms=0.5, gbytes_per_s=100).ms(3, 2e8) == 3.5


def test_a_link_is_measured(monkeypatch):
    monkeypatch.setattr(link, "_SIZES", (2**10, 2**16))
    found = run_threads(2, measure_link)
    assert found[0] == found[1] and found[0].latency_ms >= 0
    with pytest.raises(ValueError, match="world_size: expected at least 2"):
        measure_link(LoneHost(0, 1))


@pytest.mark.parametrize(("latency", "rate"), [(-1, 1), (math.nan, 1), (0, 0), (0, math.nan)])
def test_links_that_cannot_be(latency, rate):
    with pytest.raises(ValueError, match=r"(latency_ms|gbytes_per_s): expected"):
        Link(latency_ms=latency, gbytes_per_s=rate)
