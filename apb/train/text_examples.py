"""Examples cut from local text: no labelled answers are needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apb.files import fingerprint
from apb.prompt import Prompt, chat_frame
from apb.train.examples import Example, check_lengths, draw, listed

__all__ = ["TextExamples"]

_HELD_OUT_SHARE = 0.1


class TextExamples:
    """Windows of local text files: the last tokens of a window play the answer, those before them the question.

    The last tenth of every file is held out.

    Args:
        tokenizer: of the model.
        paths: UTF-8 text files.
        lengths: tokens in all, from document to answer.
        seed: starts the draw of the windows.
        query_tokens: of a window's question.
        answer_tokens: of a window's answer.

    Raises:
        ValueError: no files, one that is no text, or one too short for the longest window.
    """

    def __init__(
        self,
        tokenizer: Any,
        paths: Sequence[str | Path],
        *,
        lengths: Sequence[int],
        seed: int = 0,
        query_tokens: int = 32,
        answer_tokens: int = 64,
    ) -> None:
        check_lengths(lengths)
        for name, count in (("query_tokens", query_tokens), ("answer_tokens", answer_tokens)):
            if count < 1:
                raise ValueError(f"{name}: expected at least 1, got {count}")
        if not paths:
            raise ValueError("data: expected 'generated' or at least one text file, got nothing")
        self.paths, self.lengths, self.seed = [Path(path) for path in paths], list(lengths), seed
        self.query_tokens, self.answer_tokens = query_tokens, answer_tokens
        head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in chat_frame(tokenizer))
        self.head, self.suffix = (torch.tensor([ids], dtype=torch.int64) for ids in (head, tail))
        self.texts = [_read(path, tokenizer) for path in self.paths]
        self.around = len(head) + len(tail)
        window, least = self.longest - self.around, self.around + query_tokens + answer_tokens + 2
        if min(self.lengths) < least:
            raise ValueError(
                f"lengths: expected at least {least} tokens with this question and answer, got {self.lengths}"
            )
        shortest = int(window / _HELD_OUT_SHARE) + 1
        for path, ids in zip(self.paths, self.texts, strict=True):
            if len(ids) < shortest:
                raise ValueError(
                    f"data: {path} has {len(ids)} tokens; expected at least {shortest}, so that its held-out tenth "
                    f"holds a window of {window} tokens. Take shorter lengths, or join short files into one"
                )

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.lengths)

    def make(self, number: int, *, held_out: bool = False) -> Example:
        """Draw a file, a length and a window."""
        chance = draw(self.seed, number, held_out)
        which = chance.choices(range(len(self.texts)), weights=[len(ids) for ids in self.texts])[0]
        length, ids = chance.choice(self.lengths), self.texts[which]
        if held_out:
            length = sorted(self.lengths, reverse=True)[number % len(self.lengths)]
        cut = int(len(ids) * (1 - _HELD_OUT_SHARE))
        ids = ids[cut:] if held_out else ids[:cut]
        window = length - self.around
        document = window - self.query_tokens - self.answer_tokens
        start = chance.randrange(len(ids) - window + 1)
        parts = ids[None, start : start + window].split((document, self.query_tokens, self.answer_tokens), dim=1)
        prompt = Prompt(
            document=torch.cat((self.head, parts[0]), dim=1),
            query=parts[1],
            suffix=self.suffix,
            prefix_tokens=self.head.shape[1],
        )
        return Example(prompt=prompt, answer=parts[2], name=f"{self.paths[which].name} at {length} tokens")

    def facts(self) -> dict[str, str]:
        """Say what the examples are."""
        return {
            "data": ",".join(path.name for path in self.paths),
            "data_sha256": ",".join(map(fingerprint, self.paths)),
            "data_seed": str(self.seed),
            "data_tokens": listed([len(ids) for ids in self.texts]),
            "lengths": listed(self.lengths),
            "query_tokens": str(self.query_tokens),
            "answer_tokens": str(self.answer_tokens),
        }


def _read(path: Path, tokenizer: Any) -> Tensor:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data: cannot read {path} as UTF-8 text ({error}); give text files, or 'generated'") from None
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
