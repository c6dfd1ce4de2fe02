"""Every method in a whole model: exact ones answer as one host does, Star and APE as a slow oracle of their mask."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.generate import generate
from apb.hf import share_weights
from apb.methods import APB, APE, Flash, Ring, Star, Ulysses
from apb.models import DEMO_MODEL, cache_dir, load_model, load_tokenizer
from apb.parallel import run_processes, run_threads
from apb.prompt import Prompt, build_prompt
from apb.reference import ape_mask, ape_mix, star_mask
from apb.session import Session
from apb.testing.oracle import DocumentStack
from apb.testing.strategies import SEEDS
from apb.testing.tiny import tiny_model

# Partial results travel between hosts in float32, and transformers' norms compute in it.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
EXACT = {"ring": Ring(), "ring-zigzag": Ring(layout="zigzag"), "ulysses": Ulysses()}
NEW = 5


@pytest.fixture(scope="module")
def models():
    class Models(dict):
        def __missing__(self, key):
            family, heads, kv_heads = key
            sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 16 * heads}
            return self.setdefault(key, tiny_model(family, dtype=torch.float64, **sizes))

    return Models()


def ids(seed, count, batch=2):
    return torch.randint(97, (batch, count), generator=torch.Generator().manual_seed(seed))


def prompt_of(tokens=50, query=3, suffix=2, prefix=4, seed=0):
    return Prompt(document=ids(seed, tokens), query=ids(1, query), suffix=ids(2, suffix), prefix_tokens=prefix)


def answer(host, model, method, prompt, count=NEW):
    return generate(share_weights(model), method, host, prompt, max_new_tokens=count)


@pytest.mark.parametrize("name", EXACT)
def test_a_host_without_rows_attends_at_the_models_own_scale(name):
    """With Ulysses a host that has no rows still attends for its heads (Granite's scale, say, is not 1/√dim)."""
    model, prompt = tiny_model(dtype=torch.float64), prompt_of(9, prefix=0)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.6
    (expected,) = run_threads(1, answer, model, Flash(), prompt)
    for result in run_threads(4, answer, model, EXACT[name], prompt):  # blocks of 3, 3, 3 and 0 tokens
        torch.testing.assert_close(result.logits, expected.logits, **CLOSE)


def test_a_generation_counts_its_own_bytes(models):
    def twice(host, prompt):
        return [answer(host, models["llama", 4, 2], Ring(), prompt, count=2) for _ in range(2)]

    for first, second in run_threads(3, twice, prompt_of(50)):
        assert first.prefill_bytes == second.prefill_bytes == 2 * 2 * first.cost.sent_bytes > 0  # layers, batch
        assert first.counters == second.counters


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("heads", "hosts", "tokens"), [((4, 2), 1, 20), ((4, 2), 2, 50), ((9, 3), 3, 41), ((4, 2), 4, 50), ((6, 1), 4, 3)]
)
def test_exact_methods_answer_as_one_host(models, name, heads, hosts, tokens):
    """More hosts than tokens and heads that they do not divide included."""
    model, prompt = models["llama", *heads], prompt_of(tokens, prefix=0)
    (expected,) = run_threads(1, answer, model, Flash(), prompt)
    for rank, result in enumerate(run_threads(hosts, answer, model, EXACT[name], prompt)):
        torch.testing.assert_close(result.logits, expected.logits, **CLOSE)
        assert torch.equal(result.tokens, expected.tokens)
        assert all(pairs == result.cost.pairs for pairs in result.pairs.values()) and len(result.pairs) == 2
        assert sum(b for what, b in result.counters.sent_bytes.items() if what in ("ring", "ulysses")) == (
            2 * 2 * result.cost.sent_bytes  # layers and batch
        )
        assert result.cost.rows == result.plan.host(rank).rows


def chunk_places(tokens, hosts, prefix):
    chunk = max(1, -(-(tokens - prefix) // hosts))
    place = [t if t < prefix else prefix + (t - prefix) % chunk for t in range(tokens)]
    return torch.tensor(place), max(place) + 1


def ape_ask(method, tokens, prefix, q, k, v):
    contexts, other = [], []
    for x in (k, v):
        contexts.append(x[:, :, prefix:tokens])
        other.append(torch.cat((x[:, :, :prefix], x[:, :, tokens:]), dim=2))
    return ape_mix(q, tuple(contexts), tuple(other), temperature=method.temperature, scale=method.scale)


def stack_of(model, method, hosts, tokens, offset):
    """Return the slow oracle, which knows neither plans nor hosts."""
    if isinstance(method, APE):
        prefix = offset if method.prefix is None else method.prefix
        place, following = chunk_places(tokens, hosts, prefix)
        ask = partial(ape_ask, method, tokens, prefix)
        return DocumentStack(model, ape_mask(tokens, hosts, prefix), place=place, next_place=following, ask=ask)
    anchor = -(-tokens // hosts) if method.anchor is None else method.anchor
    return DocumentStack(model, star_mask(tokens, hosts, anchor), place=torch.arange(tokens), next_place=tokens)


def walk(host, model, method, plan, document, question):
    session = Session(share_weights(model), method, plan, host)
    hidden = session.prefill(document, question)
    cached = [(session.keys[i].clone(), session.values[i].clone()) for i in range(2)]
    logits = [session.extend(question)]
    for _ in range(NEW):
        logits.append(session.extend(logits[-1].argmax(dim=-1)[:, None]))
    return hidden, cached, torch.stack(logits)


def check_against_the_oracle(model, method, tokens, hosts, *, offset=0, seed=0, runner=run_threads):
    """Compare hidden states and caches host by host, then the question's logits and those of greedy tokens."""
    document, question = ids(seed, tokens), ids(seed + 1, 3)
    plan = method.plan(tokens=tokens, hosts=hosts, query=3, query_offset=offset)
    stack = stack_of(model, method, hosts, tokens, offset)
    stack.prefill(document)
    logits, cached = [], [list(pair) for pair in zip(stack.keys, stack.values, strict=True)]
    logits.append(stack.extend(question))
    for _ in range(NEW):
        logits.append(stack.extend(logits[-1].argmax(dim=-1)[:, None]))

    results = runner(hosts, walk, model, method, plan, document, question)
    a = plan.anchor
    size = -(-(tokens - (a if isinstance(method, APE) else 0)) // hosts)
    for rank, (hidden, mine, answered) in enumerate(results):
        start, stop = (min(i * size, tokens) for i in (rank, rank + 1))
        if isinstance(method, APE):
            start, stop = (min(a + i * size, tokens) for i in (rank, rank + 1))
        runs = stop > start and (rank > 0 or isinstance(method, APE))
        holds = isinstance(method, APE) and rank == hosts - 1
        anchor = a if runs or holds else 0
        rows = torch.cat((stack.hidden[0][:, :anchor], stack.hidden[0][:, start:stop]), dim=1)
        torch.testing.assert_close(hidden, rows, **CLOSE)
        for pair, whole in zip(mine, cached, strict=True):
            for got, x in zip(pair, whole, strict=True):
                held = torch.cat((x[:, :, start:stop], x[:, :, : a if holds else 0]), dim=2)
                torch.testing.assert_close(got, held, **CLOSE)
        torch.testing.assert_close(answered, torch.stack(logits), **CLOSE)


@pytest.mark.parametrize("family", ["llama", "llama3", "yi", "qwen2", "qwen2.5", "qwen3", "mistral"])
@pytest.mark.parametrize("method", [Star(), Star(anchor=6), APE(prefix=5), APE(), APE(temperature=1, scale=1)])
def test_star_and_ape_equal_the_oracle(models, family, method):
    heads = (7, 1) if family == "yi" else (4, 2)
    check_against_the_oracle(models[family, *heads], method, 47, 3, offset=4)


@settings(max_examples=12)
@given(tokens=st.integers(1, 40), hosts=st.integers(1, 5), seed=SEEDS, data=st.data())
def test_any_star_and_ape_equal_the_oracle(models, tokens, hosts, seed, data):
    """One token, more hosts than tokens, a document that is all prefix."""
    anchor = data.draw(st.integers(0, -(-tokens // hosts)))
    factors = st.sampled_from([0.5, 0.9, 1.0, 1.5])
    ape = APE(prefix=data.draw(st.integers(0, tokens)), temperature=data.draw(factors), scale=data.draw(factors))
    method = data.draw(st.sampled_from([Star(anchor=anchor), ape]))
    check_against_the_oracle(models["llama", 4, 2], method, tokens, hosts, seed=seed)


@pytest.mark.parametrize("method", [Star(anchor=6), APE(prefix=5)])
def test_gloo_processes_equal_the_oracle(models, method):
    check_against_the_oracle(models["llama", 4, 2], method, 46, 4, runner=run_processes)


def test_one_chunk_without_temperature_and_scale_is_exact(models):
    model, prompt = models["llama", 4, 2], prompt_of()
    (expected,), (ape,) = (
        run_threads(1, answer, model, method, prompt) for method in (Flash(), APE(temperature=1, scale=1))
    )
    torch.testing.assert_close(ape.logits, expected.logits, **CLOSE)
    assert torch.equal(ape.tokens, expected.tokens)


def test_approximate_methods_answer_apart(models):
    """The tiny model is peaked enough that a mistaken method would show."""
    model, prompt = models["llama", 4, 2], prompt_of()
    methods = [Ring(), Star(anchor=6), APE(), APE(temperature=1, scale=1), APB(anchor=6, passing=3, query_in="anchor")]
    logits = [run_threads(3, answer, model, method, prompt)[0].logits for method in methods]
    for i, one in enumerate(logits):
        assert all((one - other).abs().max() > 0.1 for other in logits[:i])


@pytest.mark.skipif(
    not (cache_dir() / "models" / DEMO_MODEL / "config.json").is_file(), reason=f"needs {DEMO_MODEL} in the cache"
)
def test_a_real_model_answers_alike_on_four_hosts():
    """9 query heads over 3 KV heads: with Ulysses on four hosts 3, 2, 2 and 2."""
    model = load_model(DEMO_MODEL, device="cpu", dtype=torch.float32)
    text = " ".join(f"Room {i} holds {i * i % 97} chairs." for i in range(1, 7))
    prompt = build_prompt(load_tokenizer(DEMO_MODEL), text, "How many chairs are in room 5?")
    (expected,) = run_threads(1, answer, model, Flash(), prompt, 4)
    for name, method in EXACT.items():
        result, *_ = run_threads(4, answer, model, method, prompt, 4)
        assert torch.equal(result.tokens, expected.tokens), name
        torch.testing.assert_close(result.logits, expected.logits, atol=5e-3, rtol=0)  # float32, 30 layers
