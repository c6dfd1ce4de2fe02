"""Dialogues to train a model on: a document of a task, its question, and more questions about the same document."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import IterableDataset

from apb.evals import TASKS, Sample, Sources, make_sample
from apb.evals.niah import Needles, ask

__all__ = ["Dialogue", "Dialogues", "write_dialogue"]

IGNORED = -100
"""Target of the tokens that are not learned, as cross entropy knows it."""


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Tokens of one dialogue, and which of them are learned.

    Attributes:
        ids: `[tokens]`.
        targets: `[tokens]`, the tokens of answers and what ends them; −100 elsewhere.
    """

    ids: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]


def write_dialogue(tokenizer: Any, sample: Sample, *, turns: int, length: int, draw: random.Random) -> Dialogue:
    """Write the sample's question and answer, then further ones about its other facts, as long as they fit.

    Args:
        tokenizer: with a chat template.
        sample: what to begin with, of a task in `TASKS`.
        turns: most questions, ≥ 1. Only needle tasks have more than one.
        length: most tokens.
        draw: chooses what else is asked.
    """
    between, tail = _between_turns(tokenizer), tokenizer.decode(sample.prompt.suffix[0])

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ids = torch.cat((sample.prompt.document, sample.prompt.query, sample.prompt.suffix), dim=1)[0].tolist()
    targets = [IGNORED] * len(ids)
    stop, *opening = tokens(between)

    def learn(answer: list[int]) -> None:
        ids.extend([*answer, stop])
        targets.extend([*answer, stop])

    learn(sample.answer_ids.tolist())
    task = TASKS[sample.task]
    if not isinstance(task, Needles):
        return Dialogue(ids=torch.tensor(ids), targets=torch.tensor(targets))
    frame = tail[: tail.rindex("\n") + 1]  # what stands before an answer's first words
    # What has been answered could be copied from the answer: only other facts are asked for.
    left = sorted(key for key, values in sample.facts.items() if not set(values) & set(sample.references))
    draw.shuffle(left)
    for _ in range(turns - 1):
        count = draw.choice((1, 1, 2, 3, 4))
        keys, left = left[:count], left[count:]
        if not keys:
            break
        values = [sample.facts[key] for key in keys]
        query, prefix = ask(keys, task.kind, values=max(map(len, values)))
        asked = [*opening, *tokens(query), *tokens(frame + prefix.lstrip())]
        answer = tokens(" " + ", ".join(value for found in values for value in found))
        if len(ids) + len(asked) + len(answer) + 1 > length:
            break
        ids.extend(asked)
        targets.extend([IGNORED] * len(asked))
        learn(answer)
    return Dialogue(ids=torch.tensor(ids), targets=torch.tensor(targets))


def _between_turns(tokenizer: Any) -> str:
    """Return what stands between an answer and the next question."""
    messages = [{"role": role, "content": f"<<{i}>>"} for i, role in enumerate(("user", "assistant", "user"))]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text[text.index("<<1>>") + 5 : text.index("<<2>>")]


@dataclass(kw_only=True)
class Dialogues(IterableDataset):
    """Batches of dialogues without end: `[batch, tokens]` ids and targets, filled up on the right.

    The documents of a batch have one length, drawn from `lengths`; a batch has at most `batch_tokens` of them all.
    Batch number i is the same however many workers and ranks share the work.
    """

    tokenizer: Any
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    batch_tokens: int
    turns: int
    sources: Sources
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's and this worker's batches in order."""
        worker = torch.utils.data.get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        step = self.start + number
        while True:
            yield self.batch(step * self.world_size + self.rank)
            step += workers

    def batch(self, number: int) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Return batch `number`."""
        draw = random.Random(f"dialogues/{self.seed}/{number}")
        length = draw.choice(self.lengths)
        rows = []
        for _ in range(max(1, self.batch_tokens // length)):
            task = draw.choice(self.tasks)
            sample = make_sample(
                task, self.tokenizer, length=length, seed=draw.randrange(10**6, 10**12), sources=self.sources
            )
            rows.append(write_dialogue(self.tokenizer, sample, turns=self.turns, length=length, draw=draw))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([row.ids for row in rows], batch_first=True, padding_value=0)
        targets = pad([row.targets for row in rows], batch_first=True, padding_value=IGNORED)
        return ids, targets
