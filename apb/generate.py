"""The walk of a question: agree on a plan, prefill, ask, decode. The same code on every host.

`generate` answers one prompt, or a batch of prompts of equal lengths; `generate_batch` answers prompts of any lengths.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from apb.conversation import Conversation
from apb.decoding import OnToken, check_new_tokens
from apb.digest import digest
from apb.generation import Generation
from apb.methods import Method
from apb.parallel.host import Host
from apb.prompt import Prompt
from apb.sampling import Sampling

__all__ = ["Generation", "generate", "generate_batch"]


def generate(
    model: Any,
    method: Method,
    host: Host,
    prompt: Prompt,
    *,
    max_new_tokens: int = 32,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
    on_phase: Callable[[str, int, int], None] | None = None,
    timed: bool = True,
    keep_indices: bool = False,
    keep_layer: int | None = None,
) -> Generation:
    """Answer: prefill the document over all hosts, then run the question and each new token against all caches.

    Args:
        model: a transformers causal language model, on this host's device.
        method: how to attend to the document.
        host: this member of the group; every host calls with the same arguments.
        prompt: the same on every host.
        max_new_tokens: most tokens to generate, ≥ 1.
        stop_tokens: a row ends at the first of these.
        sampling: how to choose tokens; None is greedily.
        on_token: called with (number, `[batch]` ids) of each new token; may return which rows end with it. A row ends
            if any host says so; hosts may come with different ones, or without.
        on_phase: called with (phase, 0, 0) as each phase starts, and with ("prefill", done, total) after each layer.
        timed: measure the phases.
        keep_indices: note in `kept` and `indices` what each layer chose.
        keep_layer: note it of this layer only.

    Raises:
        ValueError: an argument out of range, or a plan that is not possible.
        PlanMismatch: the hosts came with different prompts, methods or models.
        HostFailed: another host failed.
    """
    check_new_tokens(max_new_tokens)
    for name in ("document", "query"):
        if getattr(prompt, name).shape[-1] == 0:
            raise ValueError(f"{name}: it is empty; expected at least 1 token")
    if sampling is not None:
        sampling.check_rows(len(prompt.document))
    host.agree((_digest(prompt), max_new_tokens, tuple(stop_tokens), sampling), what="plan")  # before anything runs
    conversation = Conversation(
        model, method, host, on_phase=on_phase, timed=timed, keep_indices=keep_indices, keep_layer=keep_layer
    )
    room = prompt.query.shape[-1] + prompt.suffix.shape[-1] + max_new_tokens
    conversation.prefill(prompt.document, prompt.query, prefix_tokens=prompt.prefix_tokens, room=room)
    return conversation.ask(
        prompt.query,
        prompt.suffix,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampling=sampling,
        on_token=on_token,
    )


def generate_batch(
    model: Any,
    method: Method,
    host: Host,
    prompts: Sequence[Prompt],
    *,
    most: int | None = None,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling | None = None,
    on_token: Callable[[int, int, int], bool | None] | None = None,
    **options: Any,
) -> list[Generation]:
    """Answer prompts of any lengths: those whose parts have equal lengths as one batch, one batch after the other.

    Nothing is padded: a padded row would need a mask of its own in every kernel, and would count in every cost. The
    answers are the same as one by one.

    Args:
        model, method, host: as in `generate`.
        prompts: of one row each, or of several; the same on every host.
        most: rows in a batch at most, ≥ 1; None is no bound.
        stop_tokens: an answer ends at the first of these.
        sampling: how to choose tokens, with one seed or one for each row, counted over all prompts; None is greedily.
        on_token: called with (row, number, id) of each new token, rows counted over all prompts; may return True to
            end the answer with it. It ends if any host says so.
        options: as in `generate`.

    Returns:
        One generation for each row, in the order asked; what it says of time, memory and bytes is the whole batch's.

    Raises:
        ValueError, PlanMismatch, HostFailed: as `generate`.
    """
    if most is not None and most < 1:
        raise ValueError(f"most: expected at least 1 row in a batch, got {most}")
    rows = [row for prompt in prompts for row in _rows(prompt)]
    if sampling is not None:
        sampling.check_rows(len(rows))
    host.agree([_digest(row) for row in rows], what="plan")
    answers: dict[int, Generation] = {}
    for places in _batches(rows, most or len(rows)):
        parts = {name: torch.cat([getattr(rows[i], name) for i in places]) for name in _PARTS}
        found = generate(
            model,
            method,
            host,
            Prompt(**parts, prefix_tokens=rows[places[0]].prefix_tokens),
            stop_tokens=stop_tokens,
            sampling=None if sampling is None else sampling.for_rows(places),
            on_token=_by_row(places, frozenset(stop_tokens), on_token) if on_token else None,
            **options,
        )
        answers |= {i: found.row(at) for at, i in enumerate(places)}
    return [answers[i] for i in range(len(rows))]


_PARTS = ("document", "query", "suffix")


def _batches(rows: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Put rows whose parts have equal lengths together, at most so many."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        lengths = (*(getattr(row, name).shape[-1] for name in _PARTS), row.prefix_tokens)
        groups.setdefault(lengths, []).append(i)
    for group in groups.values():
        for first in range(0, len(group), most):
            yield group[first : first + most]


def _rows(prompt: Prompt) -> list[Prompt]:
    return [
        Prompt(**{name: getattr(prompt, name)[i : i + 1] for name in _PARTS}, prefix_tokens=prompt.prefix_tokens)
        for i in range(len(prompt.document))
    ]


def _by_row(places: list[int], stops: frozenset[int], on_token: Callable[[int, int, int], bool | None]) -> OnToken:
    """Tell each row of a batch apart, and say nothing of those that have ended."""
    ended = [False] * len(places)

    def tell(number: int, ids: Tensor) -> list[bool]:
        for at, token in enumerate(ids.tolist()):
            if not ended[at]:
                ended[at] = bool(on_token(places[at], number, token)) or token in stops
        return ended

    return tell


def _digest(prompt: Prompt) -> str:
    return digest(*(getattr(prompt, name) for name in _PARTS))
