"""Evaluation and training on a GPU give what they give on the CPU."""

import pytest
import torch

from apb.evals.ask import Asker
from apb.evals.sample import Sample
from apb.methods import APB, APE, Flash, MInference, Star
from apb.prompt import Prompt
from apb.testing.tiny import tiny_model
from apb.train.examples import Example
from apb.train.labels import observe

pytestmark = pytest.mark.gpu

METHODS = {"flash": Flash(), "star": Star(), "ape": APE(), "minference": MInference(), "apb": APB(),
           "apb-spava": APB(query_in="prefill", layout="zigzag")}  # fmt: skip


def parts(seed, *lengths):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(97, (1, length), generator=draw) for length in lengths]


@pytest.mark.parametrize("name", METHODS)
def test_answers_and_likelihoods_are_those_of_the_cpu(name):
    samples = []
    for seed in range(3):
        document, query, suffix, answer = parts(seed, 200, 5, 3, 4)
        prompt = Prompt(document=document, query=query, suffix=suffix, prefix_tokens=2)
        samples.append(
            Sample(
                task="none",
                seed=seed,
                prompt=prompt,
                answer="",
                answer_ids=answer[0],
                references=(),
                depths=(),
                facts={},
            )
        )
    hosts = 1 if METHODS[name].one_host else 3
    found = [
        Asker(tiny_model().to(device)).ask(samples, METHODS[name], hosts, max_new_tokens=6)
        for device in ("cpu", "cuda")
    ]
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_gpu.tokens == on_cpu.tokens
        assert on_gpu.nll == pytest.approx(on_cpu.nll, abs=1e-2)


def test_labels_are_those_of_the_cpu():
    document, query, suffix, answer = parts(7, 120, 5, 3, 8)
    example = Example(
        prompt=Prompt(document=document, query=query, suffix=suffix, prefix_tokens=2), answer=answer, name="a draw"
    )
    on_cpu, on_gpu = (observe(tiny_model().to(device), example, "anchor") for device in ("cpu", "cuda"))
    for mine, theirs in zip(on_gpu.labels, on_cpu.labels, strict=True):
        assert torch.allclose(mine.cpu(), theirs, atol=1e-2, rtol=1e-3)
