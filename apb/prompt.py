"""Turn a document and a question into tokens, kept apart so that a method can place each where it wants."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["Prompt", "build_prompt", "chat_frame"]

_CONTENT = "<<apb-document>><<apb-query>>"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question about a document, in tokens.

    Attributes:
        document: `[batch, tokens]`, beginning with `prefix_tokens` of BOS, system prompt and user header.
        query: `[batch, query]`, the question; it is what an anchor embeds.
        suffix: `[batch, suffix]`, what follows the question before the answer (assistant header, answer prefix).
        prefix_tokens: how many tokens of the document the query must not precede.
    """

    document: Int[Tensor, "batch tokens"]
    query: Int[Tensor, "batch query"]
    suffix: Int[Tensor, "batch suffix"]
    prefix_tokens: int = 0


def chat_frame(tokenizer: Any) -> tuple[str, str]:
    """Return the text before a user's message and the text between it and the answer.

    They come from the tokenizer's chat template; without one they are its BOS token, if it has any, and nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer.bos_token or "", ""
    message = [{"role": "user", "content": _CONTENT}]
    head, tail = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True).split(_CONTENT)
    return head, tail


def build_prompt(tokenizer: Any, document: str, query: str, *, answer_prefix: str = "") -> Prompt:
    """Tokenise `document` and `query`, inside the tokenizer's chat template if it has one.

    The rendered text is prefix + document, then the question, then whatever comes before the answer; the three are
    tokenised one by one, so that the same tokens stand in the anchor and behind the document.

    Args:
        tokenizer: of the model.
        document: the long text.
        query: the question about it.
        answer_prefix: how the answer begins, given rather than generated.

    Raises:
        ValueError: the document or the question is empty.
    """
    for name, text in (("document", document), ("query", query)):
        if not text.strip():
            raise ValueError(f"{name}: expected some text, got {text!r}")
    head, tail = chat_frame(tokenizer)

    def ids(text: str) -> torch.Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], dtype=torch.int64)

    prefix = ids(head)
    return Prompt(
        document=torch.cat((prefix, ids(document.strip() + "\n\n")), dim=-1),
        query=ids(query.strip()),
        suffix=ids(tail + answer_prefix),
        prefix_tokens=prefix.shape[-1],
    )
