"""Hosts that take turns on one device, so that each host's share of the work can be timed alone.

The same threads as `ThreadHost`, and a baton: only the host that holds it computes. The baton changes hands only
when its holder waits for a collective or ends; it goes to the next rank, in rank order, that can go on. What a host
computes between two waits is timed as its own; waiting, and copying out of a collective, are not.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from apb.parallel.meeting import Group, Meeting
from apb.parallel.threads import ThreadHost, run_group

__all__ = ["SimulatedHost", "run_simulated"]

T = TypeVar("T")


class BatonGroup(Group):
    """A group whose hosts take turns: `holder` computes (None: nobody can), `awaited` is what the others wait for."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        super().__init__(world_size, timeout_s)
        self.holder: int | None = 0
        self.passed_at = time.monotonic()
        self.awaited: list[Meeting | None] = [None] * world_size

    def pass_baton(self, rank: int) -> None:
        """Hand the baton from `rank` to the next host that can go on, `rank` itself last."""
        order = [(rank + step) % self.world_size for step in range(1, self.world_size + 1)]
        self.holder = next((other for other in order if self._can_go_on(other)), None)
        self.passed_at = time.monotonic()
        self.changed.notify_all()

    def _can_go_on(self, rank: int) -> bool:
        meeting = self.awaited[rank]
        return rank not in self.ended and (meeting is None or self.settled(meeting))


class SimulatedHost(ThreadHost):
    """A thread that computes only while it holds the baton; `run_simulated` makes them."""

    def __init__(self, group: BatonGroup, rank: int, device: torch.device | str = "cpu") -> None:
        super().__init__(group, rank, device)
        self._baton = group
        self._spent_s = 0.0
        self._since: float | None = None

    @property
    def compute_ms(self) -> float:
        """Milliseconds this host has computed so far, its current turn included (synchronises the device)."""
        running = 0.0 if self._since is None else self._now() - self._since
        return (self._spent_s + running) * 1e3

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _may_go_on(self, meeting: Meeting) -> bool:
        return self._baton.holder == self.rank

    def _alive_at(self) -> float:
        return self._baton.passed_at

    def _pause(self, meeting: Meeting | None) -> None:
        try:
            if self._since is not None:
                self._spent_s += self._now() - self._since
        finally:
            self._since = None
            with self._baton.changed:
                self._baton.awaited[self.rank] = meeting
                if self._baton.holder == self.rank:
                    self._baton.pass_baton(self.rank)

    def _resume(self) -> None:
        with self._baton.changed:
            if self._baton.awaited[self.rank] is None:  # the first turn: no collective has brought us the baton
                self._baton.changed.wait_for(lambda: self._baton.holder == self.rank)
            self._baton.awaited[self.rank] = None
        self._since = self._now()


def run_simulated(
    world_size: int,
    body: Callable[..., T],
    *args: Any,
    device: torch.device | str = "cpu",
    timeout_s: float = 60.0,
) -> list[T]:
    """Run `body(host, *args)` on `world_size` hosts that take turns on `device`.

    The arguments, results and errors are those of `run_threads`, with two differences: each host tells, in
    `host.compute_ms`, how long it has computed; and `timeout_s` bounds one turn, not the wait for all the others'.
    """
    group = BatonGroup(world_size, timeout_s)
    hosts = [SimulatedHost(group, rank, device) for rank in range(world_size)]
    return run_group(group, hosts, body, args)
