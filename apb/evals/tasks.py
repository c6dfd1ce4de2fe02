"""The tasks by name: all 13 of RULER (arXiv 2404.06654) and the six synthetic ones of InfiniteBench (2402.13718)."""

from typing import Any

from apb.evals import sample
from apb.evals.infinitebench import CodeRun, HiddenDigits, KeyValue, MathCalc, MathFind
from apb.evals.niah import Needles
from apb.evals.qa import QuestionAnswering
from apb.evals.sample import Sample, Sources, Task
from apb.evals.variable_tracking import VariableTracking
from apb.evals.words import CommonWords, FrequentWords

__all__ = ["OFFLINE", "TASKS", "make_sample"]

_WORDS, _LONG = 64, 144  # room for a question about one word key; about a UUID or four word keys

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Needles(name="niah_single_1", title="Needle in noise", hay="noise", question_room=_WORDS),
        Needles(name="niah_single_2", title="Needle in text", hay="text", needs="haystack", question_room=_WORDS),
        Needles(
            name="niah_single_3", title="UUID in text", hay="text", needs="haystack", kind="uuid", question_room=_WORDS
        ),
        Needles(
            name="niah_multikey_1",
            title="Four keys in text",
            hay="text",
            needs="haystack",
            keys=4,
            question_room=_WORDS,
        ),
        Needles(name="niah_multikey_2", title="Needle in needles", hay="needles", question_room=_WORDS),
        Needles(
            name="niah_multikey_3",
            title="UUID in UUIDs",
            hay="needles",
            key="uuid",
            kind="uuid",
            question_room=_LONG,
        ),
        Needles(
            name="niah_multivalue",
            title="Four values of a key",
            hay="text",
            needs="haystack",
            values=4,
            question_room=_WORDS,
        ),
        Needles(
            name="niah_multiquery",
            title="Four keys asked",
            hay="text",
            needs="haystack",
            keys=4,
            asked=4,
            question_room=_LONG,
        ),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        QuestionAnswering(name="qa_1", title="SQuAD", needs="squad"),
        QuestionAnswering(name="qa_2", title="HotpotQA", needs="hotpotqa"),
        HiddenDigits(
            name="passkey",
            title="Retrieve.PassKey",
            what="pass key",
            find="Find it and memorize it.",
            digits=5,
            max_new_tokens=6,
        ),
        HiddenDigits(
            name="number_string",
            title="Retrieve.Number",
            what="sequence of digits",
            find="Find it.",
            digits=10,
            repeats=5,
            max_new_tokens=12,
        ),
        KeyValue(),
        MathFind(),
        MathCalc(),
        CodeRun(),
    )
}
"""Every task by its name; `dataclasses.replace` makes a variant."""

OFFLINE: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.needs is None)
"""The tasks that need no file."""


def make_sample(
    task: Task | str,
    tokenizer: Any,
    *,
    length: int,
    seed: int,
    sources: Sources = Sources(),  # noqa: B008 (it is frozen)
) -> Sample:
    """Draw a sample; the same arguments give the same sample, in every process.

    The document, its chat prefix included, has `length − task.question_room − task.max_new_tokens` tokens whatever
    the seed is, so that samples can be batched.

    >>> made = make_sample("passkey", tokenizer, length=1024, seed=0)
    >>> made.prompt.document.shape
    torch.Size([1, 970])

    Args:
        task: a task, or its name in `TASKS`.
        tokenizer: of the model.
        length: tokens in all: document + question + suffix + `max_new_tokens` ≤ length.
        seed: any integer.
        sources: of texts and words.

    Raises:
        ValueError: no such task, a length too short for it, a file that it needs and has not, or a question longer
            than its room.
        ImportError: the word lists are not installed.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        task = TASKS[task]
    return sample.make_sample(task, tokenizer, length=length, seed=seed, sources=sources)
