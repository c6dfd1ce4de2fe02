"""Make examples ahead in other processes: writing a long document takes as long as a step on a GPU."""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from apb.train.examples import Example, Examples

__all__ = ["prefetch"]

_AHEAD = 4  # examples a worker makes before they are asked for


def prefetch(examples: Examples, numbers: range, *, workers: int) -> Iterator[Example]:
    """Give the training examples of these numbers, in order.

    Args:
        examples: their source; picklable where processes are spawned.
        numbers: which.
        workers: processes that make them, ≥ 0; with 0 each is made here when it is asked for.
    """
    loader = DataLoader(
        _Numbered(examples),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        generator=torch.Generator(),  # else it draws from the caller's
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for made in loader:
        if isinstance(made, Exception):
            raise made
        yield made


class _Numbered(Dataset[Example | Exception]):
    """An example by its number; an error is handed on, so that it is raised as it was."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, index: int) -> Example | Exception:
        """Make it."""
        try:
            return self.examples.make(index)
        except (ValueError, OSError, ImportError) as error:
            return error


def _leave_signals_to_the_parent(worker: Any) -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains saves its state and then ends the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
