"""Prompts from text: prefix and document, the question, and what precedes the answer."""

import pytest
import torch
from generation_cases import NEW, answer, greedy

from apb.methods import APB
from apb.parallel import run_threads
from apb.prompt import build_prompt
from apb.testing.tiny import tiny_model

TEXT = "the grass is green and the sky blue . what colour has ? answer : <s> <user> </user> <bot>"


def tokenizer_of(chat_template=None, bos_token=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", *TEXT.split()]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos_token)
    tokenizer.chat_template = chat_template
    return tokenizer


TEMPLATE = "<s> {% for m in messages %}<user> {{ m['content'] }} </user> {% endfor %}<bot>"


@pytest.mark.parametrize(
    ("settings", "head", "tail"),
    [
        ({}, "", ""),
        ({"bos_token": "<s>"}, "<s>", ""),
        ({"chat_template": TEMPLATE, "bos_token": "<s>"}, "<s> <user>", "</user> <bot>"),
    ],
)
def test_a_prompt_is_prefix_and_document_then_question_then_what_precedes_the_answer(settings, head, tail):
    tokenizer = tokenizer_of(**settings)
    prompt = build_prompt(
        tokenizer, " the grass is green . ", " what colour has the sky ?\n", answer_prefix=" answer :"
    )
    text = [" ".join(tokenizer.convert_ids_to_tokens(ids[0])) for ids in (prompt.document, prompt.query, prompt.suffix)]
    assert text == [f"{head} the grass is green .".strip(), "what colour has the sky ?", f"{tail} answer :".strip()]
    assert prompt.prefix_tokens == len(head.split())
    assert all(ids.dtype == torch.int64 for ids in (prompt.document, prompt.query, prompt.suffix))
    assert build_prompt(tokenizer, "the sky", "what ?").suffix.shape == (1, len(tail.split()))


def test_a_prompt_from_text_is_answered():
    model = tiny_model(dtype=torch.float64)
    prompt = build_prompt(tokenizer_of(TEMPLATE), " ".join(TEXT.split()[:9] * 5), "what colour has the sky ?")
    method = APB(anchor=6, passing=4)
    (tokens, result), *_ = run_threads(2, answer, model, method, prompt, timeout_s=30)
    assert result.plan.query_offset == 2 and tokens.shape == (1, NEW)
    assert torch.equal(tokens, greedy(model, result.plan, prompt, NEW))
