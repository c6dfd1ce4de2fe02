"""Prompts of any lengths at once: each answers as it would alone, and ends where it would end alone."""

import pytest
import torch
from generation_cases import draw

from apb.attend import AShape, VerticalSlash
from apb.generate import generate_batch
from apb.hf import share_weights
from apb.methods import APB, MInference, Ring
from apb.parallel import run_threads
from apb.prompt import Prompt
from apb.sampling import Sampling
from apb.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


LENGTHS = [(50, 3, 2), (41, 3, 2), (50, 3, 2), (50, 4, 0), (41, 3, 2), (50, 3, 2)]


def prompts_of(*lengths):
    return [
        Prompt(
            document=draw(10 * i, document, 1),
            query=draw(10 * i + 1, query, 1),
            suffix=draw(10 * i + 2, suffix, 1),
            prefix_tokens=2,
        )
        for i, (document, query, suffix) in enumerate(lengths)
    ]


def batch_run(model, prompts, method, hosts=2, **options):
    options = {"max_new_tokens": 5} | options
    return run_threads(hosts, lambda host: generate_batch(share_weights(model), method, host, prompts, **options))


@pytest.mark.parametrize("most", [None, 1, 2])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_k=20, seed=3)])
@pytest.mark.parametrize("method", [APB(anchor=4, passing=3), Ring()])
def test_prompts_of_different_lengths_answer_as_one_by_one(model, method, sampling, most):
    prompts = prompts_of(*LENGTHS)
    runs = batch_run(model, prompts, method, most=most, sampling=sampling)
    alone = [batch_run(model, [prompt], method, sampling=sampling)[0][0] for prompt in prompts]
    for results in runs:
        for prompt, result, one in zip(prompts, results, alone, strict=True):
            assert torch.equal(result.tokens, one.tokens)
            assert result.plan.tokens == prompt.document.shape[1] and result.logits.shape == (1, 97)
    assert [result.tokens.tolist() for result in runs[0]] == [result.tokens.tolist() for result in runs[1]]


def test_a_batch_ends_each_answer_where_it_would_end_alone(model):
    prompts = prompts_of(*LENGTHS)
    free = [result.tokens[0].tolist() for result in batch_run(model, prompts, Ring())[0]]
    stop, told = free[0][2], []
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    results = batch_run(
        model, prompts, Ring(), hosts=1, stop_tokens=[stop], on_token=lambda *told_one: told.append(told_one)
    )[0]
    assert [result.tokens[0].tolist() for result in results] == expected
    assert [result.lengths for result in results] == [[len(row)] for row in expected]
    for i, row in enumerate(expected):
        assert [(number, token) for at, number, token in told if at == i] == list(enumerate(row))
    ended = batch_run(model, prompts, Ring(), hosts=2, on_token=lambda i, number, token: number == i % 3)[0]
    assert [len(result.tokens[0]) for result in ended] == [1 + i % 3 for i in range(len(prompts))]


def test_a_batch_may_be_empty_and_its_bound_at_least_one(model):
    assert batch_run(model, [], Ring()) == [[], []]
    with pytest.raises(ValueError, match="most: expected at least 1 row in a batch, got 0"):
        batch_run(model, prompts_of((20, 2, 0)), Ring(), most=0)


def test_copies_of_a_prompt_with_a_seed_each_are_samples(model):
    one, other = prompts_of((30, 3, 2), (41, 3, 2))
    prompts, seeds = [one, other, one, one], (5, 6, 7, 8)
    same = batch_run(model, prompts, Ring(), sampling=Sampling(temperature=2.0, seed=5))[0]
    assert torch.equal(same[0].tokens, same[2].tokens) and torch.equal(same[0].tokens, same[3].tokens)
    own = batch_run(model, prompts, Ring(), sampling=Sampling(temperature=2.0, seed=seeds))[0]
    assert len({tuple(own[i].tokens[0].tolist()) for i in (0, 2, 3)}) == 3
    for prompt, seed, found in zip(prompts, seeds, own, strict=True):
        alone = batch_run(model, [prompt], Ring(), sampling=Sampling(temperature=2.0, seed=seed))[0][0]
        assert torch.equal(found.tokens, alone.tokens)
    with pytest.raises(ValueError, match="seed: expected one, or one for each of the 4 rows, got 2"):
        batch_run(model, prompts, Ring(), sampling=Sampling(temperature=2.0, seed=(1, 2)))


@pytest.mark.parametrize("pattern", [VerticalSlash(vertical=8, slash=4), AShape(sink=64, local=64)])
def test_an_answer_of_a_batch_has_its_own_index(model, pattern):
    prompts = prompts_of(*[(200, 3, 0)] * 3)
    method, options = MInference(pattern=pattern, dense_below=0), {"keep_indices": True, "max_new_tokens": 1}
    together = batch_run(model, prompts, method, hosts=1, **options)[0]
    for prompt, found in zip(prompts, together, strict=True):
        alone = batch_run(model, [prompt], method, hosts=1, **options)[0][0]
        assert found.indices.keys() == alone.indices.keys() == {0, 1}
        for layer, index in found.indices.items():
            assert index.tiles.shape[0] == 1 and torch.equal(index.mask(), alone.indices[layer].mask())
