"""The whole stack on tiny peaked models: every host's cache, hidden states and answers equal the slow oracle's."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from apb.compress import KeyNorm, Projections, QueryAware, RetainingHead
from apb.context import Trace
from apb.costs import host_cost
from apb.hf import model_shape, register, share_weights
from apb.methods import APB, Flash, Spava
from apb.parallel import run_processes, run_threads
from apb.session import Session
from apb.testing import oracle
from apb.testing.strategies import SEEDS, plan_arguments
from apb.testing.tiny import tiny_model

# Partial results travel between hosts in float32, and transformers' norms compute in it.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
FAMILIES = ["llama", "llama3", "yi", "qwen2", "qwen2.5", "qwen3", "mistral"]
NEW = 4


@pytest.fixture(scope="module")
def models():
    class Models(dict):
        def __missing__(self, family):
            return self.setdefault(family, tiny_model(family, dtype=torch.float64))

    return Models()


def tokens(seed, count, batch=1):
    """Draw distinct tokens: the same token twice has the same key norm, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(97, generator=generator)[:count] for _ in range(batch)])


def walk(host, model, method, plan, document, query):
    """Prefill, ask and decode; return the caches after the prefill, what they became, the hidden states, the logits."""
    trace = Trace(keep_indices=True)
    session = Session(model, method, plan, host, trace=trace)
    hidden = session.prefill(document, query)
    cached = [(session.keys[i].clone(), session.values[i].clone()) for i in range(len(session.keys))]
    logits = [session.extend(torch.cat((query, tokens(9, 2, len(query))), dim=1))]
    for _ in range(NEW):
        logits.append(session.extend(logits[-1].argmax(dim=-1)[:, None]))
    final = [(session.keys[i], session.values[i]) for i in range(len(session.keys))]
    return cached, final, hidden, torch.stack(logits), trace.kept


def walk_alone(host, model, *rest):
    """The same on modules of its own."""
    return walk(host, share_weights(model), *rest)


def check_against_the_oracle(model, method, plan, document, query, run=run_threads):
    results = run(plan.hosts, walk_alone, model, method, plan, document, query)
    stack = oracle.Stack(
        model, plan, oracle.query_aware if isinstance(method.compressor, QueryAware) else oracle.key_norm
    )
    stack.prefill(document, query)
    for rank, (cached, _, hidden, _, kept) in enumerate(results):
        torch.testing.assert_close(cached, [stack.host_cache(i, rank) for i in range(len(cached))], **CLOSE)
        torch.testing.assert_close(hidden, stack.host_hidden(rank), **CLOSE)
        assert {block for _, block in kept} == {block.index for block in plan.host(rank).blocks}
        assert all(torch.equal(where, stack.kept[layer][block]) for (layer, block), where in kept.items())
    logits = [stack.extend(torch.cat((query, tokens(9, 2, len(query))), dim=1))]
    for _ in range(NEW):
        logits.append(stack.extend(logits[-1].argmax(dim=-1)[:, None]))
    for rank, (_, final, _, answered, _) in enumerate(results):
        assert torch.equal(answered.argmax(dim=-1), torch.stack(logits).argmax(dim=-1))
        torch.testing.assert_close(answered, torch.stack(logits), **CLOSE)
        torch.testing.assert_close(final, [stack.host_cache(i, rank) for i in range(len(final))], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("query_in", ["anchor", "prefill"])
def test_a_session_equals_the_oracle(models, family, layout, query_in):
    """Cache by cache, layer by layer, host by host; then the question's logits and four greedy tokens; batch of 2."""
    make = Spava if (family, query_in) in (("llama3", "prefill"), ("qwen3", "prefill")) else APB
    split = family in ("llama3", "qwen2.5")
    method = make(anchor=4, passing=3, query_in=query_in, layout=layout, split_anchor=split)
    plan = method.plan(tokens=55, hosts=3, query=3, query_offset=2)
    check_against_the_oracle(models[family], method, plan, tokens(1, 55, 2), tokens(2, 3, 2))


@settings(max_examples=12)
@example(arguments={"tokens": 3, "hosts": 5, "anchor": 0, "passing": 2, "query": 0, "query_offset": 0,
                    "query_in": "anchor", "layout": "contiguous", "split_anchor": False}, seed=1)  # fmt: skip
@example(arguments={"tokens": 3, "hosts": 4, "anchor": 1, "passing": 1, "query": 2, "query_offset": 0,
                    "query_in": "prefill", "layout": "zigzag", "split_anchor": True}, seed=2)  # fmt: skip
@given(arguments=plan_arguments(max_tokens=50, max_hosts=4), seed=SEEDS)
def test_any_plan_equals_the_oracle_more_hosts_than_tokens_included(models, arguments, seed):
    where = {name: arguments[name] for name in ("anchor", "passing", "query_in", "layout", "split_anchor")}
    asked = {name: arguments[name] for name in ("tokens", "hosts", "query", "query_offset")}
    reads = asked["query"] and (where["anchor"] or where["query_in"] == "prefill")
    method = APB(compressor=QueryAware() if reads else KeyNorm(), **where)
    plan = method.plan(**asked)
    check_against_the_oracle(models["llama"], method, plan, tokens(seed, plan.tokens), tokens(seed + 1, plan.query))


@pytest.mark.parametrize("hosts", [2, 4])
def test_gloo_processes_equal_the_oracle(models, hosts):
    method = APB(anchor=3, passing=4, split_anchor=True)
    plan = method.plan(tokens=50, hosts=hosts, query=2, query_offset=1)
    check_against_the_oracle(models["llama"], method, plan, tokens(3, 50), tokens(4, 2), run_processes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [Flash(), APB(anchor=3, passing=2)])
def test_one_host_is_the_model_itself(models, family, method):
    model, document, query = models[family], tokens(5, 30, 2), tokens(6, 3, 2)
    plan = method.plan(tokens=30, hosts=1, query=3)
    _, _, hidden, logits, _ = run_threads(1, walk, model, method, plan, document, query)[0]
    model.set_attn_implementation("sdpa")
    ids = torch.cat((document, query, tokens(9, 2, 2)), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(hidden, model.base_model(document).last_hidden_state, **CLOSE)
        for step in range(NEW + 1):
            expected = model(ids).logits[:, -1]
            torch.testing.assert_close(logits[step], expected, **CLOSE)
            ids = torch.cat((ids, expected.argmax(dim=-1)[:, None]), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_session_the_implementation_changes_nothing(family):
    model, ids = tiny_model(family), tokens(7, 20, 2)
    padding = torch.ones_like(ids)
    padding[1, :6] = 0
    register()
    found = []
    for implementation in ("sdpa", "apb"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            whole = [model(ids).logits, model(ids, attention_mask=padding).logits[:, 6:]]
            start = model(ids[:, :12], use_cache=True)
            whole.append(model(ids[:, 12:], past_key_values=start.past_key_values).logits)
        found.append(whole)
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_retaining_head_sees_the_projections_before_rope(models, family):
    """For Qwen3 after its q/k norms, and of this block's tokens alone."""
    seen = {}

    class Spy(RetainingHead):
        def score(self, candidates):
            seen[candidates.layer, candidates.block] = candidates.projections
            return super().score(candidates)

    generator = torch.Generator().manual_seed(0)
    shape = model_shape(models[family].config)
    shapes = ((8, (shape.heads + 2 * shape.kv_heads) * shape.head_dim), (shape.kv_heads, 8))
    weights = [[torch.randn(shape, generator=generator) / 8 for _ in range(2)] for shape in shapes]
    method = APB(anchor=4, passing=3, compressor=Spy(fc1=tuple(weights[0]), fc2=tuple(weights[1])))
    plan = method.plan(tokens=40, hosts=3, query=2)
    document, query = tokens(10, 40), tokens(11, 2)
    run_threads(3, walk, models[family], method, plan, document, query)
    assert sorted(seen) == [(layer, block) for layer in range(2) for block in range(2)]  # nobody reads the last block
    model = models[family]
    for block in plan.blocks[:2]:  # the first layer's inputs are the embeddings
        mine = slice(block.start + block.skipped, block.stop)
        with torch.no_grad():
            x = model.model.layers[0].input_layernorm(model.model.embed_tokens(document[:, mine]))
            attn, found = model.model.layers[0].self_attn, []
            for name in "qkv":
                y = getattr(attn, f"{name}_proj")(x).reshape(1, x.shape[1], -1, 16)
                norm = getattr(attn, f"{name}_norm", None)
                found.append((norm(y) if norm else y).transpose(1, 2))
        expected = Projections(q=found[0], k=found[1], v=found[2])
        for name in "qkv":
            got = getattr(seen[0, block.index], name)
            torch.testing.assert_close(got, getattr(expected, name), atol=1e-9, rtol=0)


def test_reading_the_projections_leaves_the_model_as_it_was(models):
    model = share_weights(models["qwen3"])
    heads = RetainingHead(fc1=(torch.ones(8, 128),) * 2, fc2=(torch.ones(2, 8),) * 2)
    method = APB(anchor=2, passing=2, compressor=heads)
    run_threads(2, walk, model, method, method.plan(tokens=20, hosts=2, query=1), tokens(1, 20), tokens(2, 1))
    assert not [module for module in model.modules() if module._forward_hooks]
    original = dict(models["qwen3"].named_parameters())
    assert all(p.data_ptr() == original[name].data_ptr() for name, p in model.named_parameters())


@settings(max_examples=10)
@given(seed=SEEDS, j=st.integers(0, 39), layout=st.sampled_from(["contiguous", "zigzag"]))
def test_a_token_changes_no_cached_key_or_value_before_it(models, seed, j, layout):
    method = APB(anchor=3, passing=2, layout=layout)
    plan = method.plan(tokens=40, hosts=2, query=2, query_offset=1)
    document, query = tokens(seed, 40), tokens(seed + 1, 2)
    changed = document.clone()
    changed[0, j] = (changed[0, j] + 1) % 97
    joined = []
    for ids in (document, changed):
        results = run_threads(2, walk, models["llama"], method, plan, ids, query)
        joined.append([plan.join([cached[i][kv] for cached, *_ in results], dim=2) for i in (0, 1) for kv in (0, 1)])
    for before, after in zip(*joined, strict=True):
        torch.testing.assert_close(after[:, :, :j], before[:, :, :j], atol=1e-9, rtol=0)
        assert not torch.equal(after[:, :, j], before[:, :, j])


def test_thread_hosts_may_share_one_model(models):
    """Each sees its own projections, although all hooks sit on the same modules."""
    weights = [[torch.randn(shape) / 8 for _ in range(2)] for shape in ((8, 128), (2, 8))]
    method = APB(anchor=3, passing=4, compressor=RetainingHead(fc1=tuple(weights[0]), fc2=tuple(weights[1])))
    plan = method.plan(tokens=50, hosts=4, query=2)
    work = (models["llama"], method, plan, tokens(1, 50), tokens(2, 2))
    for alone, shared in zip(run_threads(4, walk_alone, *work), run_threads(4, walk, *work), strict=True):
        torch.testing.assert_close(shared[:4], alone[:4], atol=1e-9, rtol=0)
        assert all(torch.equal(shared[4][key], alone[4][key]) for key in alone[4])


def test_after_the_prefill_a_cache_is_exactly_the_hosts_blocks(models):
    """No anchor, no passing block: as many bytes as the plan's costs say."""
    model = models["llama"]
    for layout in ("contiguous", "zigzag"):
        method = APB(anchor=4, passing=3, layout=layout)
        plan = method.plan(tokens=41, hosts=3, query=3)
        for rank, (cached, *_) in enumerate(run_threads(3, walk, model, method, plan, tokens(1, 41), tokens(2, 3))):
            assert all(k.shape == v.shape == (1, 2, plan.host(rank).block_rows, 16) for k, v in cached)
            held = 2 * sum(x.numel() for x in cached[0])  # the cost's shape has two bytes a value
            assert held == host_cost(plan, rank, model_shape(model.config)).cache_bytes


def test_a_long_answer_outgrows_the_spare_room(models, monkeypatch):
    monkeypatch.setattr("apb.session._SPARE_TOKENS", 2)
    method = APB(anchor=3, passing=2)
    plan = method.plan(tokens=20, hosts=2, query=2)
    check_against_the_oracle(models["llama"], method, plan, tokens(1, 20), tokens(2, 2))
