"""Where the threads of one group meet: what each host deposits, who is missing, and what the others are then told."""

import threading
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from apb.parallel.host import HostError, HostFailed

__all__ = ["Deposit", "Group", "Meeting"]


@dataclass(frozen=True)
class Deposit:
    """What one host brought to a meeting.

    Attributes:
        label: what all hosts must have in common.
        text: an object, as JSON.
        sent: the copies for the other hosts, by the receiver's rank.
        awaited: the shapes of what this host expects, by the sender's rank.
        ready: set on CUDA, where the copies may still be under way.
    """

    label: str
    text: str = ""
    sent: dict[int, Tensor] = field(default_factory=dict)
    awaited: dict[int, torch.Size] = field(default_factory=dict)
    ready: torch.cuda.Event | None = None


@dataclass
class Meeting:
    """One collective: the deposits by rank, whether they fit together, and how many hosts have read them."""

    name: str
    deposits: dict[int, Deposit] = field(default_factory=dict)
    checked: bool = False
    reads: int = 0


class Group:
    """The place where one group's threads meet. Every field is guarded by `changed`."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        if world_size < 1:
            raise ValueError(f"world_size: expected at least 1 host, got {world_size}")
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.meetings: dict[int, Meeting] = {}
        self.last = ["no collective yet"] * world_size
        self.ended: set[int] = set()
        self.errors: list[tuple[int, BaseException]] = []

    def fail(self, rank: int, error: BaseException) -> None:
        """Record that `rank` failed (−1: the caller was interrupted) and wake everybody who waits."""
        with self.changed:
            if all(error is not known for _, known in self.errors):
                self.errors.append((rank, error))
            self.changed.notify_all()

    def missing(self, meeting: Meeting) -> list[int]:
        """Return the ranks that have not arrived."""
        return [rank for rank in range(self.world_size) if rank not in meeting.deposits]

    def settled(self, meeting: Meeting) -> bool:
        """Return whether waiting any longer is pointless: all have come, or somebody never will."""
        missing = self.missing(meeting)
        return not missing or bool(self.errors) or any(rank in self.ended for rank in missing)

    def outcome(self, rank: int, meeting: Meeting) -> list[Deposit]:
        """Return the deposits in rank order, or raise on `rank` why there are none."""
        missing = self.missing(meeting)
        where = f"rank {rank} of {self.world_size} was waiting in {meeting.name}"
        if not missing:
            deposits = [meeting.deposits[other] for other in range(self.world_size)]
            if not meeting.checked:
                _check_labels(meeting.name, [deposit.label for deposit in deposits])
                _check_shapes(meeting.name, deposits)
                meeting.checked = True
            return deposits
        if self.errors:
            culprit, error = self.errors[0]
            who = f"rank {culprit} (last in {self.last[culprit]})" if culprit >= 0 else "the caller of the group"
            raise HostFailed(f"{who} failed: {type(error).__name__}: {error}; {where}") from error
        state = "; ".join(
            f"rank {other} {'has ended' if other in self.ended else 'is alive'}, last in {self.last[other]}"
            for other in missing
        )
        if any(other in self.ended for other in missing):
            raise HostFailed(f"{where}, which not every host will join: {state}")
        raise HostFailed(f"{where} and gave up after {self.timeout_s:g} s: not arrived: {state}")


def _check_labels(name: str, labels: list[str]) -> None:
    held: dict[str, list[int]] = {}
    for rank, label in enumerate(labels):
        held.setdefault(label, []).append(rank)
    if len(held) > 1:
        parts = "; ".join(f"ranks {ranks} bring {label}" for label, ranks in held.items())
        number = name.split(" (")[0]
        raise HostError(f"{number}: expected one purpose, shape and dtype on all {len(labels)} hosts, but {parts}")


def _check_shapes(name: str, deposits: list[Deposit]) -> None:
    """Check that what every host expects from every other is what that one sends."""
    for source, rank in product(range(len(deposits)), repeat=2):
        sent, expected = deposits[source].sent.get(rank), deposits[rank].awaited.get(source)
        came = None if sent is None else sent.shape
        if came != expected:
            wanted, got = ("nothing" if shape is None else f"shape {tuple(shape)}" for shape in (expected, came))
            raise HostError(f"{name}: rank {rank} expects {wanted} from rank {source}, which sends it {got}")
