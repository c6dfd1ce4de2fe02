"""Life signs of the hosts of one group, in a store, so that a survivor can say who failed, and where.

Every host owns one key of the store, rewritten about once a second: a count that grows while the host lives, the
collective it was last in, whether it has left, and the error it announced. A thread writes this host's key and reads
the others'. Times are never compared between machines: a host is silent for as long as *this* host has seen its
count stand still.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from apb.parallel.host import HostFailed

__all__ = ["Heartbeat"]

BEAT_S = 0.7
SILENT_S = 3.0  # no sign of life for so long, after a collective broke: dead


@dataclass
class _Peer:
    count: int = -1
    changed_at: float = 0.0
    number: int = -1
    where: str = "no collective yet"
    left: bool = False
    error: str | None = None  # an error of its own
    cause: str | None = None  # what it was told or found out about another host


class Heartbeat:
    """Publish this host's life signs and watch the others'; collective, every member of the group makes one.

    Attributes:
        watch: called after every beat, in the heartbeat's thread.

    Args:
        store: reached by all members; this class uses keys under `prefix` only.
        prefix: the same on all members, and used by no other group.
        rank: number of this host.
        world_size: number of hosts.
        timeout_s: how long to wait for the others' first sign of life.

    Raises:
        HostFailed: a host gave no first sign of life within `timeout_s`; the message names it.
    """

    def __init__(self, store: dist.Store, prefix: str, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        clone: Callable[[], dist.Store] | None = getattr(store, "clone", None)  # a connection of its own
        self._store = dist.PrefixStore(prefix, store if clone is None else clone())
        self._lock = threading.Lock()  # one user of the store at a time, and the state below
        self._mine = _Peer()
        self._others = {other: _Peer() for other in range(world_size) if other != rank}
        self._looked_at = time.monotonic()
        self._lost: str | None = None  # why the store did not answer last time
        self._gone = False  # it never will: its connection broke
        self._stop = threading.Event()
        self.watch: Callable[[], None] | None = None
        self._publish()
        self._meet(timeout_s)
        self._look()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def enter(self, number: int, where: str) -> None:
        """Note the collective this host is in; published with the next beat."""
        self._mine.number, self._mine.where = number, where

    def beat(self) -> None:
        """Publish where this host is, and read where the others are."""
        self._publish()
        self._look()

    def announce(self, error: BaseException) -> None:
        """Publish `error` at once; the first announcement stands."""
        text = f"{type(error).__name__}: {error}"
        if self._mine.error is None and self._mine.cause is None:
            if isinstance(error, HostFailed):
                self._mine.cause = str(error)
            else:
                self._mine.error = text
        self._publish()

    def relay(self, cause: str) -> None:
        """Publish at once what this host found out about another; the first announcement stands."""
        if self._mine.error is None and self._mine.cause is None:
            self._mine.cause = cause
        self._publish()

    def stop(self) -> None:
        """Say that this host has left, and end the thread."""
        if not self._stop.is_set():
            self._stop.set()
            self._mine.left = True
            self._publish()
            if threading.current_thread() is not self._thread:
                # A thread still inside the store when the interpreter ends would abort the process.
                self._thread.join(timeout=10.0)

    def cause(self, number: int, silent_s: float) -> str | None:
        """Return why collective `number` will not complete, or None if nothing speaks against it.

        Args:
            number: the collective this host waits for.
            silent_s: how many seconds without a sign of life count as death.
        """
        others = list(self._others.items())
        for rank, peer in others:
            if peer.error is not None:
                return f"rank {rank} of {self.world_size} (last seen in {peer.where}) failed: {peer.error}"
        for rank, peer in others:
            silent = self._looked_at - peer.changed_at
            if not peer.left and silent > silent_s:
                who = f"rank {rank} of {self.world_size} (last seen in {peer.where})"
                return f"{who} died: no sign of life for {silent:.0f} s"
        for _, peer in others:
            if peer.cause is not None:
                return peer.cause
        for rank, peer in others:
            if peer.left and peer.number < number:
                return f"rank {rank} of {self.world_size} has left the group, last seen in {peer.where}"
        unheard = time.monotonic() - self._looked_at
        if unheard > (silent_s if self._lost else max(silent_s, 2 * SILENT_S)):
            why = self._lost or f"no answer for {unheard:.0f} s"
            return f"the store does not answer: the process that serves it (often rank 0) is gone ({why})"
        return None

    def absent(self, number: int) -> str:
        """Return which hosts have not come to collective `number`, and where they are."""
        late = [
            f"rank {rank} of {self.world_size} is alive but has not arrived: last seen in {peer.where}"
            for rank, peer in self._others.items()
            if peer.number < number
        ]
        there = ", ".join(f"rank {rank} is in {peer.where}" for rank, peer in self._others.items())
        return "; ".join(late) or f"every host has arrived ({there}), and the collective still does not complete"

    def await_cause(self, number: int) -> str:
        """Return why collective `number` broke; wait until a dead host has been silent long enough to name it."""
        until = time.monotonic() + SILENT_S + 3 * BEAT_S
        while time.monotonic() < until:
            cause = self.cause(number, SILENT_S)
            if cause is not None:
                return cause
            time.sleep(0.05)
        return self.absent(number)

    def _meet(self, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        missing = list(self._others)
        while missing:
            missing = [rank for rank in missing if not self._store.check([str(rank)])]
            if missing and time.monotonic() > until:
                raise HostFailed(
                    f"rank {self.rank} of {self.world_size}: ranks {missing} gave no sign of life within "
                    f"{timeout_s:g} s; every member of the group must make its ProcessGroupHost"
                )
            if missing:
                time.sleep(0.002)

    def _publish(self) -> None:
        if self._gone or not self._lock.acquire(timeout=2 * BEAT_S):
            return  # the store is gone or hangs; `cause` says so
        try:
            self._mine.count += 1
            state = {name: value for name, value in vars(self._mine).items() if name != "changed_at"}
            self._store.set(str(self.rank), json.dumps(state))
        except RuntimeError as error:
            self._lose(error)
        finally:
            self._lock.release()

    def _look(self) -> None:
        if self._gone or not self._others:
            return
        with self._lock:
            try:
                texts = self._store.multi_get([str(rank) for rank in self._others])
            except RuntimeError as error:
                self._lose(error)
                return
        now = time.monotonic()
        for (rank, known), text in zip(self._others.items(), texts, strict=True):
            state = json.loads(text)
            moved = state["count"] != known.count
            self._others[rank] = _Peer(changed_at=now if moved else known.changed_at, **state)
        self._looked_at, self._lost = now, None

    def _lose(self, error: RuntimeError) -> None:
        self._lost = str(error).splitlines()[0]
        self._gone = isinstance(error, dist.DistNetworkError)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self.beat()
            if self.watch is not None:
                self.watch()
