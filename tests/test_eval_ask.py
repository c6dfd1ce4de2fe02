"""One host that holds every host's cache answers as all hosts together do, for every method."""

import pytest
import torch

from apb.compress import KeyNorm
from apb.evals.ask import Asker
from apb.evals.sample import Sample
from apb.generate import generate
from apb.hf import share_weights
from apb.methods import APB, APE, Flash, MInference, Ring, Star, Ulysses
from apb.parallel import ThreadHost, run_threads
from apb.parallel.meeting import Group
from apb.prompt import Prompt
from apb.session import Session
from apb.testing.tiny import tiny_model

METHODS = {
    "flash": Flash(),
    "ring": Ring(),
    "ring-zigzag": Ring(layout="zigzag"),
    "ulysses": Ulysses(),
    "star": Star(),
    "ape": APE(),
    "minference": MInference(),
    "apb": APB(),
    "apb-spava": APB(query_in="prefill", layout="zigzag"),
    "apb-after": APB(query_in="after", compressor=KeyNorm()),
}


def sample(seed, answer=4, tokens=61):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(97, (1, n), generator=draw) for n in (tokens, 5, 3)]
    return Sample(
        task="none",
        seed=seed,
        prompt=Prompt(document=ids[0], query=ids[1], suffix=ids[2], prefix_tokens=2),
        answer="",
        answer_ids=torch.randint(97, (answer,), generator=draw),
        references=(),
        depths=(),
        facts={},
    )


@pytest.mark.parametrize("name", METHODS)
def test_answers_and_likelihoods_are_those_of_all_hosts(name):
    method, model = METHODS[name], tiny_model()
    hosts = 1 if method.one_host else 3
    samples = [sample(seed, answer=2 + seed) for seed in range(3)]
    answers = Asker(model).ask(samples, method, hosts, max_new_tokens=6)
    for one, answer in zip(samples, answers, strict=True):

        def body(host, prompt=one.prompt):
            return generate(share_weights(model), method, host, prompt, max_new_tokens=6)

        alone = run_threads(hosts, body)[0]
        assert answer.tokens == alone.tokens[0].tolist()

        def likelihood(host, one=one):
            p = one.prompt
            plan = method.plan(tokens=61, hosts=hosts, query=5, query_offset=2)
            session = Session(share_weights(model), method, plan, host)
            session.prefill(p.document, p.query)
            asked = p.suffix if plan.host(host.rank).query_rows else torch.cat((p.query, p.suffix), dim=1)
            logits, nll = session.extend(asked), []
            for token in one.answer_ids:
                nll.append(-logits.log_softmax(dim=-1)[0, token])
                logits = session.extend(token[None, None])
            return torch.stack(nll).mean().item()

        assert answer.nll == pytest.approx(run_threads(hosts, likelihood)[0], abs=1e-4)


def test_joined_hosts_forget_the_question_as_they_would_apart():
    """The question's keys stand last on host 0, the owner in zigzag: joined, they must stand behind all others'."""
    method, model, prompt = METHODS["apb-spava"], tiny_model(), sample(0).prompt
    lengths = {"tokens": 61, "query": 5, "query_offset": 2}

    def prefilled(host):
        session = Session(share_weights(model), method, method.plan(hosts=3, **lengths), host)
        session.prefill(prompt.document, prompt.query)
        return session

    def asked_anew(session):
        session.rewind()
        return session.extend(prompt.suffix)

    alone = ThreadHost(Group(1, 60.0), 0, model.device)
    joined = Session.join(run_threads(3, prefilled), method.plan(hosts=1, **lengths), alone)
    apart = run_threads(3, lambda host: asked_anew(prefilled(host)))[0]
    torch.testing.assert_close(asked_anew(joined), apart, atol=1e-4, rtol=1e-4)


def test_an_answer_ends_before_its_stop_token():
    model, one = tiny_model(), sample(5)
    whole = Asker(model).ask([one], Flash(), 1, max_new_tokens=6)[0].tokens
    cut = Asker(model, stop_tokens=[whole[3]]).ask([one], Flash(), 1, max_new_tokens=6)[0].tokens
    assert cut == whole[: whole.index(whole[3])]


def test_hosts_are_waited_for_as_long_as_asked_for(monkeypatch):
    waited, run = [], run_threads

    def noted(*arguments, timeout_s, **options):
        waited.append(timeout_s)
        return run(*arguments, timeout_s=timeout_s, **options)

    monkeypatch.setattr("apb.evals.ask.run_threads", noted)
    for asker in (Asker(tiny_model()), Asker(tiny_model(), timeout_s=7.0)):
        asker.ask([sample(0)], Ring(), 2, max_new_tokens=1)
    assert waited == [600.0, 7.0]


def test_samples_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="of the same lengths"):
        Asker(tiny_model()).ask([sample(0), sample(1, tokens=60)], Flash(), 1, max_new_tokens=1)
