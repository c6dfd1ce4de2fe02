"""Several questions on one prefill: as sound as a prefill of their own, or it says that they are not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.compress import KeyNorm, SnapKV
from apb.conversation import Conversation, prefill_reads_query
from apb.hf import share_weights
from apb.methods import APB, APE, Flash, MInference, Ring, Star, Ulysses
from apb.parallel import PlanMismatch, run_processes, run_threads
from apb.sampling import Sampling
from apb.testing.strategies import SEEDS
from apb.testing.tiny import tiny_model

# Partial results travel between hosts in float32, and transformers' norms compute in it.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
NEW = 4
QUERY_FREE = {
    "flash": (Flash(), 1),
    "minference": (MInference(dense_below=0), 1),
    "ring": (Ring(), 3),
    "ring-zigzag": (Ring(layout="zigzag"), 3),
    "ulysses": (Ulysses(), 3),
    "star": (Star(anchor=5), 3),
    "ape": (APE(prefix=4), 3),
    "apb, after": (APB(anchor=5, passing=3, compressor=KeyNorm(), query_in="after"), 3),
    "apb, zigzag": (APB(anchor=5, passing=3, compressor=SnapKV(), query_in="after", layout="zigzag"), 3),
    "apb, no anchor": (APB(anchor=0, passing=3, compressor=KeyNorm()), 3),
    "apb, beside": (APB(anchor=5, passing=3, compressor=KeyNorm(), query_in="prefill"), 3),
    "apb, one host": (APB(), 1),
}
TIED = {
    "anchor": (APB(anchor=5, passing=3), 3),
    "anchor, not passed": (APB(anchor=5, passing=0), 3),
    "prefill": (APB(anchor=5, passing=3, query_in="prefill"), 3),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


def draw(seed, count, batch=2):
    return torch.randint(97, (batch, count), generator=torch.Generator().manual_seed(seed))


DOCUMENT, FIRST, SUFFIX = draw(0, 50), draw(1, 3), draw(2, 2)


def converse(host, model, method, queries, *, planned=True, batch=2, **options):
    """Ask one after the other on one prefill."""
    conversation = Conversation(share_weights(model), method, host)
    conversation.prefill(DOCUMENT[:batch], queries[0][:batch] if planned else None, prefix_tokens=2)
    options = {"max_new_tokens": NEW} | options
    return [conversation.ask(query[:batch], SUFFIX[:batch], **options) for query in queries]


def close(found, expected):
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("name", QUERY_FREE)
def test_a_further_question_answers_as_on_a_prefill_of_its_own(model, name):
    """Questions of other lengths, in any order, and the first one once more."""
    method, hosts = QUERY_FREE[name]
    queries = [FIRST, draw(3, 5), draw(4, 1), FIRST]
    for answers in run_threads(hosts, converse, model, method, queries):
        for query, answer in zip(queries, answers, strict=True):
            (alone,) = run_threads(hosts, converse, model, method, [query])[0]
            close(answer, alone)
            assert answer.sound
        assert answers[0].pairs and not answers[1].pairs and "prefill" not in answers[1].phase_ms
        assert answers[1].prefill_bytes == 0
        assert answers[1].counters.messages == answers[2].counters.messages  # each counts its own


@pytest.mark.parametrize("name", TIED)
def test_a_further_question_on_caches_made_for_the_first_says_so(model, name):
    method, hosts = TIED[name]
    other = draw(3, 5)
    first, second, again = run_threads(hosts, converse, model, method, [FIRST, other, FIRST])[0]
    assert (first.sound, second.sound, again.sound) == (True, False, True)
    close(again, first)
    (alone,) = run_threads(hosts, converse, model, method, [other])[0]
    assert (second.logits - alone.logits).abs().max() > 0.1 or name == "prefill"


def test_a_prefill_without_a_question_serves_any(model):
    """Its caches are those of a question that comes after; a compressor that reads the question is refused."""
    method = APB(anchor=5, passing=3, compressor=KeyNorm())
    after = APB(anchor=5, passing=3, compressor=KeyNorm(), query_in="after")
    found = run_threads(3, lambda host: converse(host, model, method, [FIRST, draw(3, 5)], planned=False))[0]
    for answer, expected in zip(found, run_threads(3, converse, model, after, [FIRST, draw(3, 5)])[0], strict=True):
        close(answer, expected)
        assert answer.sound
    with pytest.raises(ValueError, match="QueryAware reads the question, but there are 0 query tokens"):
        run_threads(3, lambda host: converse(host, model, APB(anchor=5, passing=3), [FIRST], planned=False))


def test_processes_converse_as_threads(model):
    method, queries = QUERY_FREE["apb, after"][0], [FIRST, draw(3, 5)]
    threads, processes = (run(3, converse, model, method, queries) for run in (run_threads, run_processes))
    for mine, theirs in zip(threads, processes, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            close(one, other)


@given(seed=SEEDS, hosts=st.integers(1, 4), rows=st.integers(1, 2))
def test_sampled_answers_do_not_depend_on_hosts_or_batch(model, seed, hosts, rows):
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=seed)

    def sampled(host, method, batch):
        return converse(host, model, method, [FIRST, draw(3, 5)], batch=batch, sampling=sampling)

    expected = run_threads(1, sampled, Flash(), 2)[0]
    for answers in run_threads(hosts, sampled, Ring(), rows):
        for answer, one in zip(answers, expected, strict=True):
            assert torch.equal(answer.tokens, one.tokens[:rows])


def test_hosts_that_ask_different_questions_all_say_so(model):
    def body(host):
        conversation = Conversation(share_weights(model), Ring(), host)
        conversation.prefill(DOCUMENT)
        with pytest.raises(PlanMismatch, match="question: the 2 hosts must hold the same value"):
            conversation.ask(draw(host.rank, 3))
        with pytest.raises(PlanMismatch, match="question: the 2 hosts must hold the same value"):
            conversation.ask(FIRST, sampling=Sampling(temperature=1.0, seed=host.rank))

    run_threads(2, body)


def test_what_cannot_be_says_why(model):
    def body(host):
        conversation = Conversation(model, Flash(), host)
        with pytest.raises(ValueError, match="ask: nothing has been prefilled"):
            conversation.ask(FIRST)
        with pytest.raises(ValueError, match="document: it is empty"):
            conversation.prefill(DOCUMENT[:, :0])
        conversation.prefill(DOCUMENT)
        with pytest.raises(ValueError, match="prefill: this conversation has a document already"):
            conversation.prefill(DOCUMENT)
        with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
            conversation.ask(FIRST, max_new_tokens=0)
        with pytest.raises(ValueError, match="query: it is empty"):
            conversation.ask(FIRST[:, :0])
        assert conversation.ask(FIRST, max_new_tokens=2).tokens.shape == (2, 2)

    run_threads(1, body)


@pytest.mark.parametrize("name", [*QUERY_FREE, *TIED])
def test_what_the_prefill_reads_follows_from_method_and_plan(name):
    method, hosts = (QUERY_FREE | TIED)[name]
    plan = method.plan(tokens=50, hosts=hosts, query=3, query_offset=2)
    assert prefill_reads_query(method, plan) == (name in TIED)
