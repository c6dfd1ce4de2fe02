"""Hosts that are threads of this process: nothing to launch, any device, errors with their own traceback.

The hosts' n-th collectives meet under the number n. Starting one deposits a copy and returns; waiting blocks until
all have deposited, and copies out what is for this host. Two copies, so that no host ever sees another's later
writes, as between processes. A group is a plain object: any number live side by side, also one inside another's body.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor

from apb.parallel.host import Counters, Host, HostFailed
from apb.parallel.meeting import Deposit, Group, Meeting

__all__ = ["ThreadHost", "run_group", "run_threads"]

T = TypeVar("T")


class ThreadHost(Host):
    """A host that is one thread of a `Group`; `run_threads` makes them.

    Args:
        group: the group to join.
        rank: number of this host, 0 ≤ rank < group.world_size.
        device: where this host's tensors live; hosts may share a device.
    """

    def __init__(self, group: Group, rank: int, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.world_size = group.world_size
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.counters = Counters()
        self._group = group
        self._number = 0

    def _start_all_gather(self, x: Tensor, what: str) -> Callable[[], list[Tensor]]:
        everybody = range(self.world_size)
        sent, awaited = dict.fromkeys(everybody, x.detach().clone()), dict.fromkeys(everybody, x.shape)
        return self._start(f"{what!r}, shape {tuple(x.shape)}, {x.dtype}", sent, awaited, what)

    def _start_all_to_all(
        self, parts: dict[int, Tensor], shapes: dict[int, torch.Size], what: str
    ) -> Callable[[], list[Tensor]]:
        sent = {rank: part.clone() for rank, part in parts.items()}
        dtype = next(iter(sent.values())).dtype
        return self._start(f"{what!r}, an exchange of {dtype}", sent, shapes, what)

    def _start(
        self, label: str, sent: dict[int, Tensor], awaited: dict[int, torch.Size], what: str
    ) -> Callable[[], list[Tensor]]:
        copy = next(iter(sent.values()))
        ready = torch.cuda.current_stream(copy.device).record_event() if copy.is_cuda else None
        number = self._deposit(what, Deposit(label, sent=sent, awaited=awaited, ready=ready))
        sources = sorted(awaited)
        return lambda: self._collect(
            number, lambda deposits: [_copy_out(deposits[source], self.rank) for source in sources]
        )

    def all_gather_object(self, value: Any, *, what: str) -> list[Any]:
        """Return every host's `value` in rank order, as JSON carries it (a tuple comes back as a list)."""
        number = self._deposit(what, Deposit(f"{what!r}, an object", json.dumps(value)))
        return self._collect(number, lambda deposits: [json.loads(deposit.text) for deposit in deposits])

    def announce(self, error: BaseException) -> None:
        """Make every host that waits, now or later, for a collective that is not complete raise `HostFailed`."""
        self._group.fail(self.rank, error)

    def _deposit(self, what: str, deposit: Deposit) -> int:
        number, self._number = self._number, self._number + 1
        group = self._group
        with group.changed:
            meeting = group.meetings.setdefault(number, Meeting(f"collective {number} ({what!r})"))
            if not group.errors:  # who comes after a failure completes nothing: failure is final
                meeting.deposits[self.rank] = deposit
            group.last[self.rank] = f"collective {number} ({what!r})"
            if len(meeting.deposits) == group.world_size:
                group.changed.notify_all()
        return number

    def _collect(self, number: int, copy_out: Callable[[list[Deposit]], T]) -> T:
        group = self._group
        meeting = group.meetings[number]
        self._pause(meeting)
        try:
            began = time.monotonic()
            with group.changed:
                while not self._may_go_on(meeting):
                    left = max(began, self._alive_at()) + group.timeout_s - time.monotonic()
                    if left <= 0:
                        break
                    group.changed.wait(left)
                deposits = group.outcome(self.rank, meeting)
            results = copy_out(deposits)
            with group.changed:
                meeting.reads += 1
                if meeting.reads == group.world_size:
                    del group.meetings[number]
            return results
        finally:
            self._resume()

    # What a simulated host does otherwise: it takes turns.
    def _may_go_on(self, meeting: Meeting) -> bool:
        return self._group.settled(meeting)

    def _alive_at(self) -> float:
        return 0.0

    def _pause(self, meeting: Meeting | None) -> None:
        """Come before the wait for `meeting`, or (None) after the end of the body."""

    def _resume(self) -> None:
        """Come after a wait, or before the start of the body."""


def _copy_out(deposit: Deposit, rank: int) -> Tensor:
    tensor = deposit.sent[rank]
    if deposit.ready is not None:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(deposit.ready)
        tensor.record_stream(stream)
    return tensor.clone()


def run_threads(
    world_size: int,
    body: Callable[..., T],
    *args: Any,
    device: torch.device | str = "cpu",
    timeout_s: float = 60.0,
) -> list[T]:
    """Run `body(host, *args)` on `world_size` hosts, each a thread of this process.

    The threads take over the caller's grad mode, inference mode, autocast and CUDA stream. The random number
    generators are the process's own: shared, hence not reproducible in a body that draws.

    Args:
        world_size: number of hosts, at least 1.
        body: what each host does; its first argument is its `ThreadHost`.
        args: further arguments, the same objects for every host.
        device: the `device` of every host.
        timeout_s: longest wait in one collective, in seconds.

    Returns:
        What the bodies returned, in rank order.

    Raises:
        BaseException: the first error that a body raised of its own; the others are told and raise `HostFailed`.
        HostFailed: not all hosts came to a collective within `timeout_s`.
    """
    group = Group(world_size, timeout_s)
    hosts = [ThreadHost(group, rank, device) for rank in range(world_size)]
    return run_group(group, hosts, body, args)


def run_group(group: Group, hosts: list[Any], body: Callable[..., T], args: tuple[Any, ...]) -> list[T]:
    """Run `body` on each of `hosts` in a thread of its own; see `run_threads`."""
    results: list[Any] = [None] * group.world_size
    enter_modes = _caller_modes(hosts[0].device)

    def run(host: ThreadHost) -> None:
        try:
            with enter_modes():
                host._resume()
                results[host.rank] = body(host, *args)
        except BaseException as error:
            group.fail(host.rank, error)
        finally:
            with group.changed:
                group.ended.add(host.rank)
                group.changed.notify_all()
            host._pause(None)

    threads = [threading.Thread(target=run, args=(host,), daemon=True) for host in hosts]
    for thread in threads:
        thread.start()
    try:
        with group.changed:
            group.changed.wait_for(lambda: len(group.ended) == group.world_size or group.errors)
            group.changed.wait_for(lambda: len(group.ended) == group.world_size, group.timeout_s)
    except BaseException as interruption:
        group.fail(-1, interruption)
        for thread in threads:  # a thread still inside torch when the interpreter ends would abort the process
            thread.join(5.0)
        raise
    for host, thread in zip(hosts, threads, strict=True):
        if host.rank in group.ended:
            thread.join()
            # `join` returns before the thread's native end, in which MKL takes a lock that a fork would copy locked.
            until = time.monotonic() + 1.0
            while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < until:
                time.sleep(1e-4)
    if group.errors:
        origins = [entry for entry in group.errors if not isinstance(entry[1], HostFailed)]
        rank, error = (origins or group.errors)[0]
        error.add_note(f"raised on rank {rank} of {group.world_size}")
        running = sorted(set(range(group.world_size)) - group.ended)
        if running:
            error.add_note(f"the threads of ranks {running} are still running: a thread cannot be ended")
        raise error
    return results


def _caller_modes(device: torch.device) -> Callable[[], ExitStack]:
    """Return what enters, in another thread, the modes of this one that are kept per thread."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter() -> ExitStack:
        stack = ExitStack()
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        if device.type == "cuda":  # else the hosts would share the device's one thread for going backward, and deadlock
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if cast is not None:
            stack.enter_context(torch.autocast(device.type, dtype=cast))
        return stack

    return enter
