"""Samples of long-context tasks: a document of exactly so many tokens, a question about it, and the right answer."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from apb.evals.tokens import Tokens
from apb.prompt import Prompt, chat_frame

__all__ = ["Desk", "Draft", "Sample", "Sources", "Task", "make_sample"]


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where texts and words come from.

    Attributes:
        haystack: a UTF-8 text file, for the tasks that hide their needles in a text.
        squad: a JSON file in SQuAD's format, for qa_1.
        hotpotqa: a JSON file in HotpotQA's format, for qa_2.
        split: words, texts and paragraphs are cut into two disjoint halves, so that what is trained on never shares
            a key word or a passage with what is evaluated.
    """

    haystack: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    split: Literal["evaluation", "training"] = "evaluation"

    def __post_init__(self) -> None:
        if self.split not in ("evaluation", "training"):
            raise ValueError(f"split: expected 'evaluation' or 'training', got {self.split!r}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document, one question, and what is right.

    Attributes:
        task: its name.
        seed: that it was drawn with.
        prompt: of batch 1: the document behind the chat prefix, the question, and what comes before the answer.
        answer: the right answer as text that continues the prompt, such as " 1234567, 7654321".
        answer_ids: `[answer]`, its tokens.
        references: what a scorer looks for, in the document's order.
        depths: where the facts that the answer rests on begin in the document, in [0, 1); one for each reference
            where each has its own. Empty if the answer has no place.
        facts: everything one could ask about this document, key → values.
    """

    task: str
    seed: int
    prompt: Prompt
    answer: str
    answer_ids: Int[Tensor, "answer"]
    references: tuple[str, ...]
    depths: tuple[float, ...]
    facts: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a task writes: `Sample` before its prompt is put together.

    Attributes:
        document: exactly `Desk.room` tokens.
        query: the question.
        answer_prefix: how the answer begins.
        positions: of the facts asked for, as token numbers in `document`.
    """

    document: list[int]
    query: str
    answer_prefix: str
    answer: str
    references: tuple[str, ...]
    positions: tuple[int, ...] = ()
    facts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a task writes with.

    Attributes:
        task: the name of the task.
        tokens: tokenises.
        random: the only source of chance.
        sources: of texts and words.
        length: the whole budget, document + question + suffix + answer.
        room: tokens that the document has, without its chat prefix.
        tail: what the chat puts between a question and its answer.
    """

    task: str
    tokens: Tokens
    random: random.Random
    sources: Sources
    length: int
    room: int
    tail: str = ""

    def question(self, query: str, answer_prefix: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a question and of its suffix: the tail, and how the answer begins."""
        # A chat's answer begins a line, so a space before it would be one too many.
        suffix = self.tail + (answer_prefix.lstrip() if self.tail[-1:].isspace() else answer_prefix)
        query_ids, suffix_ids = self.tokens.new([query, suffix])
        return query_ids, suffix_ids

    def require(self, tokens: int) -> None:
        """Raise if the document needs more than `room` tokens.

        Raises:
            ValueError: it does; names the least length.
        """
        if tokens > self.room:
            least = self.length + tokens - self.room
            raise ValueError(f"length: {self.task} needs at least {least} tokens with this seed, got {self.length}")

    def source(self, name: Literal["haystack", "squad", "hotpotqa"]) -> Path:
        """Return the file of that name.

        Raises:
            ValueError: none was given, or it is not there.
        """
        path = getattr(self.sources, name)
        if path is None:
            raise ValueError(f"{name}: {self.task} needs a file; give one with --{name} FILE")
        if not Path(path).is_file():
            raise ValueError(f"{name}: there is no file {str(path)!r}")
        return Path(path)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A way to write samples and to score answers.

    Attributes:
        name: what the command line knows it by.
        title: what people call it.
        suite: the benchmark that it comes from.
        needs: the field of `Sources` that it cannot do without, if any.
        max_new_tokens: how many tokens the answer may have.
        question_room: tokens reserved for the question and the suffix.
    """

    name: str
    title: str
    suite: Literal["ruler", "infinitebench"]
    needs: Literal["haystack", "squad", "hotpotqa"] | None = None
    max_new_tokens: int
    question_room: int

    @abstractmethod
    def write(self, desk: Desk) -> Draft:
        """Write a document of exactly `desk.room` tokens and a question about it."""

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return how right a prediction is, in [0, 1]."""


def make_sample(task: Task, tokenizer: Any, *, length: int, seed: int, sources: Sources = Sources()) -> Sample:
    """Draw a sample of a task; `apb.evals.make_sample` also takes a task's name, and explains the arguments.

    Raises:
        ValueError: a length too short for it, a file that it needs and has not, or a question longer than its room.
        ImportError: the word lists are not installed.
    """
    tokens = Tokens(tokenizer)
    head, tail = chat_frame(tokenizer)
    prefix, end = tokens.known([head, "\n\n"])
    document_tokens = length - task.question_room - task.max_new_tokens
    desk = Desk(
        task=task.name,
        tokens=tokens,
        random=random.Random(f"{task.name}/{length}/{seed}/{sources.split}"),
        sources=sources,
        length=length,
        room=document_tokens - len(prefix) - len(end),
        tail=tail,
    )
    draft = task.write(desk)
    document = [*prefix, *draft.document, *end]
    query, suffix = desk.question(draft.query, draft.answer_prefix)
    if len(query) + len(suffix) > task.question_room:
        raise ValueError(
            f"question_room: {task.name} reserves {task.question_room} tokens for the question and what precedes the "
            f"answer, but with this tokenizer they are {len(query)} + {len(suffix)}; give it more with "
            f"dataclasses.replace(TASKS[{task.name!r}], question_room=…)"
        )
    return Sample(
        task=task.name,
        seed=seed,
        prompt=Prompt(
            document=torch.tensor([document]),
            query=torch.tensor([query]),
            suffix=torch.tensor([suffix], dtype=torch.int64),
            prefix_tokens=len(prefix),
        ),
        answer=draft.answer,
        answer_ids=torch.tensor(tokens.new([draft.answer])[0]),
        references=draft.references,
        depths=tuple((len(prefix) + position) / document_tokens for position in draft.positions),
        facts=draft.facts,
    )
