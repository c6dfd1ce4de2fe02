"""Question answering, RULER's two tasks (arXiv 2404.06654): the paragraphs that answer, among others."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from typing import Literal

from apb.evals.haystack import NOISE
from apb.evals.lexicon import half
from apb.evals.sample import Desk, Draft, Task
from apb.evals.scoring import any_reference

__all__ = ["QuestionAnswering"]

_TASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_BEGIN = f"{_TASK}\n\nThe following are given documents."
_ANSWER_PREFIX = " Answer:"
_TRIES = 64


@dataclass(frozen=True)
class _Question:
    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...]  # distractors of the same article, or picked for this question


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """A question's own paragraphs among others, which may have the answer too, as in RULER.

    Distractors of the same article, or of the question's own, come first; when all are used up they come again, and
    the last one is cut. Questions that are longer than their room, or whose paragraphs are longer than the document,
    are passed over.
    """

    suite: Literal["ruler", "infinitebench"] = "ruler"
    max_new_tokens: int = 32
    question_room: int = 192
    needs: Literal["haystack", "squad", "hotpotqa"] | None

    def write(self, desk: Desk) -> Draft:
        """Write the paragraphs; errors as `make_sample`."""
        draw, tokens = desk.random, desk.tokens
        questions, paragraphs = _load(desk, self.needs or "squad")
        (head,) = tokens.known([_BEGIN])

        def numbers(count: int) -> list[list[int]]:
            return tokens.known([f"\n\nDocument {number + 1}:" for number in range(count)])

        def size(question: _Question) -> int:
            gold = tokens.known(["\n" + text for text in question.gold])
            return len(head) + sum(map(len, gold)) + sum(map(len, numbers(len(gold))))

        def asked(question: _Question) -> int:
            return sum(map(len, desk.question(_query(question), _ANSWER_PREFIX)))

        tried = [draw.choice(questions) for _ in range(_TRIES)]
        fitting = (question for question in tried if size(question) <= desk.room)
        question = next((question for question in fitting if asked(question) <= self.question_room), None)
        if question is None:
            short = [question for question in tried if asked(question) <= self.question_room]
            desk.require(min(map(size, short or tried)))
            question = min(tried, key=asked)  # which `make_sample` says is too long

        space = desk.room - size(question)
        units = tokens.known(["\n" + text for text in draw.sample(question.gold, len(question.gold))])
        gold = len(units)
        last: list[int] = []
        for text in _distractors(desk, question, paragraphs):
            number, unit = numbers(len(units) + 1)[-1], tokens.known(["\n" + text])[0]
            if len(number) + len(unit) >= space:
                last = (number + unit)[:space]
                break
            units.append(unit)
            space -= len(number) + len(unit)

        order = draw.sample(range(len(units)), len(units))
        ids, positions = list(head), []
        for number, place in zip(numbers(len(units)), order, strict=True):
            ids += number
            if place < gold:
                positions.append(len(ids))
            ids += units[place]
        return Draft(
            document=ids + last,
            query=_query(question),
            answer_prefix=_ANSWER_PREFIX,
            answer=" " + question.answers[0],
            references=question.answers,
            positions=tuple(positions),
            facts={question.text: question.answers},
        )

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return 1 if the prediction has any of the answers."""
        return any_reference(prediction, references)


def _query(question: _Question) -> str:
    return f"{_TASK}\n\nQuestion: {question.text}"


def _distractors(desk: Desk, question: _Question, paragraphs: Sequence[str]) -> Iterator[str]:
    """Yield paragraphs that are not the question's own, the near ones first, without end."""
    some = min(len(paragraphs), desk.room // 4)  # more will hardly fit
    drawn = [*desk.random.sample(question.near, len(question.near)), *desk.random.sample(paragraphs, some)]
    others = [text for text in dict.fromkeys(drawn) if text not in question.gold]
    yield from cycle(others or [NOISE])


def _load(desk: Desk, name: Literal["haystack", "squad", "hotpotqa"]) -> tuple[Sequence[_Question], Sequence[str]]:
    path = desk.source(name)
    state = path.stat()
    questions, paragraphs = _read(path, name, desk.sources.split, state.st_mtime_ns, state.st_size)
    if not questions:
        raise ValueError(f"{name}: {str(path)!r} has no answerable question in its half for {desk.sources.split}")
    return questions, paragraphs


@lru_cache(maxsize=4)
def _read(path: Path, name: str, split: str, changed_ns: int, size: int) -> tuple[Sequence[_Question], Sequence[str]]:
    """Return the questions and the paragraphs of a split; a paragraph's half depends on its text alone."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = list(_squad(data) if name == "squad" else _hotpotqa(data))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {str(path)!r} is not in its JSON format ({error!r})") from None
    questions: list[_Question] = []
    paragraphs: dict[str, None] = {}
    for question in found:
        own = [text for text in (*question.gold, *question.near) if half(text) == split]
        paragraphs |= dict.fromkeys(own)
        if question.answers and all(text in own for text in question.gold):
            near = tuple(text for text in own if text not in question.gold)
            questions.append(_Question(question.text, question.answers, question.gold, near))
    return questions, list(paragraphs)


def _squad(data: dict) -> Iterator[_Question]:
    for article in data["data"]:
        texts = tuple(dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"]))
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = () if qa.get("is_impossible") else tuple(dict.fromkeys(a["text"] for a in qa["answers"]))
                yield _Question(qa["question"], answers, (paragraph["context"],), texts)


def _hotpotqa(data: list) -> Iterator[_Question]:
    if not isinstance(data, list):
        raise TypeError("expected a list of questions")
    for item in data:
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]}
        gold = tuple(dict.fromkeys(texts[title] for title, _ in item["supporting_facts"]))
        yield _Question(item["question"], (item["answer"],), gold, tuple(texts.values()))
