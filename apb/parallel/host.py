"""What every method sees of the group: a `Host`, its rank, and collectives that start now and finish on `wait`.

"Host" is the paper's word for one member of the sequence-parallel group. Three implementations stand behind this
interface — `ProcessGroupHost` (torch.distributed), `ThreadHost` (threads in one process) and `SimulatedHost`
(threads that take turns on one device) — and no code above this package knows which one it holds.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Counters", "Handle", "Host", "HostError", "HostFailed", "PlanMismatch"]

T = TypeVar("T")


class HostError(RuntimeError):
    """A collective could not be completed, or the hosts do not agree."""


class HostFailed(HostError):
    """Another host raised or died; the message names its rank and the collective that was under way."""


class PlanMismatch(HostError):
    """The hosts came with different values for something they must share; raised on every host."""


@dataclass
class Counters:
    """Bytes this host sent to the others and messages it took part in, by the name of the collective's purpose."""

    sent_bytes: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)

    def add(self, what: str, sent_bytes: int) -> None:
        """Count one message of `sent_bytes` bytes."""
        self.sent_bytes[what] = self.sent_bytes.get(what, 0) + sent_bytes
        self.messages[what] = self.messages.get(what, 0) + 1

    def copy(self) -> "Counters":
        """Return the counts of this moment."""
        return Counters(dict(self.sent_bytes), dict(self.messages))

    def since(self, before: "Counters") -> "Counters":
        """Return what has been counted since `before` was copied."""
        new = [what for what in self.messages if self.messages[what] > before.messages.get(what, 0)]
        return Counters(
            {what: self.sent_bytes[what] - before.sent_bytes.get(what, 0) for what in new},
            {what: self.messages[what] - before.messages.get(what, 0) for what in new},
        )


class Handle(Generic[T]):
    """A collective under way. `wait()` returns its result, and may be called again."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._result: T

    def wait(self) -> T:
        """Block until the result is there (on CUDA: until the current stream may use it) and return it."""
        if self._finish is not None:
            self._result = self._finish()
            self._finish = None
        return self._result


class Host(ABC):
    """One member of the sequence-parallel group.

    Failure is final: after one `HostFailed`, every later collective on the same host fails too.

    Attributes:
        rank: number of this host, 0 ≤ rank < world_size.
        world_size: number of hosts in the group.
        device: where this host's tensors live.
        counters: what this host has sent.
    """

    rank: int
    world_size: int
    device: torch.device
    counters: Counters

    @abstractmethod
    def _start_all_gather(self, x: Tensor, what: str) -> Callable[[], list[Tensor]]:
        """Start the gather of contiguous `x` and return what finishes it. Called with world_size > 1 only."""

    def all_gather(self, x: Tensor, *, what: str) -> Handle[list[Tensor]]:
        """Start sending `x` to every host; the handle yields the hosts' tensors in rank order.

        Args:
            x: this host's tensor; the same shape and dtype on every host. Do not write to it until `wait` returned.
            what: name of the purpose, for the counters and for error messages.

        Raises:
            HostFailed: (from `wait`) another host raised, died, or did not arrive within the group's timeout.
        """
        self.counters.add(what, (self.world_size - 1) * x.numel() * x.element_size())
        if self.world_size == 1:
            return Handle(lambda: [x])
        return Handle(self._start_all_gather(x.contiguous(), what))

    @abstractmethod
    def _start_all_to_all(
        self, parts: dict[int, Tensor], shapes: dict[int, torch.Size], what: str
    ) -> Callable[[], list[Tensor]]:
        """Start sending the contiguous `parts[r]` to host r, for the ranks in `parts`, and return what finishes it.

        What finishes it returns new tensors of these `shapes`, from the hosts whose ranks are in `shapes`, in rank
        order. All parts share one dtype, and there is at least one. Called with world_size > 1 only.
        """

    def exchange(
        self, x: Tensor, *, to: int, source: int, shape: Sequence[int] | None = None, what: str
    ) -> Handle[Tensor]:
        """Start sending `x` to host `to` and receiving what host `source` sends here; the handle yields that.

        Every host calls it at the same point of its program, and the hosts' `to` and `source` form a permutation.
        One step of a ring: `to=(host.rank + 1) % host.world_size, source=(host.rank - 1) % host.world_size`.

        Args:
            x: this host's tensor; the same dtype on every host. Do not write to it until `wait` returned.
            to: rank of the host that receives `x`; this host's own rank if, and only if, `source` is.
            source: rank of the host whose tensor comes here.
            shape: shape of what comes (None: that of `x`).
            what: name of the purpose, for the counters and for error messages.

        Raises:
            ValueError: `to` or `source` is not a rank, or only one of them is this host's, or a host that sends to
                itself expects another shape than that of `x`.
            HostError: (from `wait`, hosts in threads) what was sent is not what the receiver expects.
            HostFailed: (from `wait`) another host raised, died, or did not arrive within the group's timeout.
        """
        for name, rank in (("to", to), ("source", source)):
            if not 0 <= rank < self.world_size:
                raise ValueError(
                    f"{name}: expected a rank from 0 to {self.world_size - 1}, got {rank} on rank {self.rank} "
                    f"({what!r}); in a ring take it modulo world_size"
                )
        if (to == self.rank) != (source == self.rank):
            raise ValueError(
                f"to, source: expected a permutation of the hosts, got to={to} and source={source} on rank "
                f"{self.rank} ({what!r}); a host that sends to itself also receives from itself"
            )
        expected = x.shape if shape is None else torch.Size(shape)
        if source == self.rank and expected != x.shape:
            raise _wrong_own_shape("shape", expected, x, self.rank, what)
        self.counters.add(what, 0 if to == self.rank else x.numel() * x.element_size())
        if self.world_size == 1:
            copy = _copied(x)
            return Handle(lambda: copy)
        finish = self._start_all_to_all({to: x.detach().contiguous()}, {source: expected}, what)
        return Handle(lambda: finish()[0])

    def all_to_all(
        self, parts: Sequence[Tensor], *, shapes: Sequence[Sequence[int]] | None = None, what: str
    ) -> Handle[list[Tensor]]:
        """Start sending `parts[r]` to every host r; the handle yields what the hosts sent here, in rank order.

        Every host calls it at the same point of its program. `parts[self.rank]` comes back as a copy.

        Args:
            parts: one tensor for each host; their shapes may differ, and may be empty. One dtype for all, the same
                on every host. Do not write to them until `wait` returned.
            shapes: shapes of what comes, in rank order (None: those of `parts`, as if every host sent alike).
            what: name of the purpose, for the counters and for error messages.

        Raises:
            ValueError: not one part and one shape for each host, parts of several dtypes, or another shape than
                `parts[self.rank]` expected from this host itself.
            HostError: (from `wait`, hosts in threads) what was sent is not what the receiver expects.
            HostFailed: (from `wait`) another host raised, died, or did not arrive within the group's timeout.
        """
        expected = [part.shape for part in parts] if shapes is None else [torch.Size(shape) for shape in shapes]
        for name, items in (("parts", parts), ("shapes", expected)):
            if len(items) != self.world_size:
                raise ValueError(
                    f"{name}: expected one for each of the {self.world_size} hosts, got {len(items)} on rank "
                    f"{self.rank} ({what!r}); a host that gets nothing gets an empty tensor"
                )
        dtypes = sorted({str(part.dtype) for part in parts})
        if len(dtypes) > 1:
            raise ValueError(
                f"parts: expected one dtype, got {', '.join(dtypes)} on rank {self.rank} ({what!r}); convert them, "
                "or send each dtype by itself"
            )
        if expected[self.rank] != parts[self.rank].shape:
            raise _wrong_own_shape(f"shapes[{self.rank}]", expected[self.rank], parts[self.rank], self.rank, what)
        others = [part for rank, part in enumerate(parts) if rank != self.rank]
        self.counters.add(what, sum(part.numel() * part.element_size() for part in others))
        if self.world_size == 1:
            copies = [_copied(parts[0])]
            return Handle(lambda: copies)
        sent = {rank: part.detach().contiguous() for rank, part in enumerate(parts)}
        return Handle(self._start_all_to_all(sent, dict(enumerate(expected)), what))

    @abstractmethod
    def all_gather_object(self, value: Any, *, what: str) -> list[Any]:
        """Return every host's `value` in rank order. Not counted.

        Values travel as JSON: str, int, float, None, list and dict; tuples come back as lists, int keys as str.
        """

    @abstractmethod
    def announce(self, error: BaseException) -> None:
        """Tell the other hosts that this one is about to fail, so that they raise instead of waiting."""

    def agree(self, value: Any, *, what: str) -> None:
        """Check that every host holds the same `value`, compared by `repr` without memory addresses.

        Raises:
            PlanMismatch: on every host, with each distinct value and the ranks that hold it.
        """
        described = re.sub(" at 0x[0-9a-f]+", "", repr(value))  # a function stands elsewhere in every process
        held: dict[str, list[int]] = {}
        for rank, text in enumerate(self.all_gather_object(described, what=what)):
            held.setdefault(text, []).append(rank)
        if len(held) > 1:
            parts = "; ".join(f"ranks {ranks} hold {text}" for text, ranks in held.items())
            raise PlanMismatch(f"{what}: the {self.world_size} hosts must hold the same value, but {parts}")

    @contextmanager
    def together(self, what: str) -> Generator[None]:
        """Run a step that may fail on one host only, such that all hosts fail alike or none does.

        The body must use no collective. If it raises anywhere, the host that raised re-raises its own error and
        every other host raises `HostFailed` with the rank and the text of the first one.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        told = None if error is None else f"{type(error).__name__}: {error}"
        texts = self.all_gather_object(told, what=what)
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise HostFailed(f"{what}: rank {rank} of {self.world_size} failed: {text}")


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format)


def _wrong_own_shape(name: str, expected: torch.Size, x: Tensor, rank: int, what: str) -> ValueError:
    return ValueError(
        f"{name}: expected {tuple(x.shape)}, the shape that rank {rank} sends to itself, got {tuple(expected)} "
        f"({what!r}); pass the shapes of what comes, not of what goes"
    )
