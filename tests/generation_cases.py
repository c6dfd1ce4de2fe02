"""Prompts of random tokens, and what the slow oracle answers."""

import torch

from apb.generate import generate
from apb.hf import share_weights
from apb.prompt import Prompt
from apb.testing import oracle

NEW = 12


def draw(seed, count, batch=1):
    return torch.randint(97, (batch, count), generator=torch.Generator().manual_seed(seed))


def prompt_of(document=50, query=3, suffix=2, batch=2, prefix_tokens=2):
    lengths = (document, query, suffix)
    ids = [draw(seed, count, batch) for seed, count in enumerate(lengths)]
    return Prompt(document=ids[0], query=ids[1], suffix=ids[2], prefix_tokens=prefix_tokens)


def answer(host, model, method, prompt, **options):
    result = generate(share_weights(model), method, host, prompt, **({"max_new_tokens": NEW} | options))
    return result.tokens, result


def greedy(model, plan, prompt, count):
    """Answer with the slow oracle."""
    stack, chosen = oracle.Stack(model, plan, oracle.query_aware), []
    stack.prefill(prompt.document, prompt.query)
    rest = prompt.suffix if plan.query_in == "prefill" else torch.cat((prompt.query, prompt.suffix), dim=1)
    if plan.query_in == "prefill":  # the question has run along, so only what follows it is new
        logits = stack.extend(rest) if rest.shape[1] else model.lm_head(stack.hidden[-1][:, -1])
    else:
        logits = stack.extend(rest)
    while True:
        chosen.append(logits.argmax(dim=-1))
        if len(chosen) == count:
            return torch.stack(chosen, dim=-1)
        logits = stack.extend(chosen[-1][:, None])
