"""Hosts that are processes: collectives over one `torch.distributed` group, NCCL or gloo.

Tensors travel as bytes, so every dtype passes every backend (gloo has no fp8). Nothing is checked per collective:
hosts that bring different shapes may crash or hang in the backend. Shapes follow from the plan, and the plan is
agreed on first, with `Host.agree`.

Failures. On the CPU the wait for gloo is cut into short ones, and between them the host looks at the heartbeats;
a survivor that finds out announces it, since with gloo only the neighbours of a dead host see its connection close.
On CUDA a wait only orders streams, so the program would hang at its next synchronisation; there the heartbeat's
thread watches the collectives under way, and when one cannot complete it aborts the communicator, which ends its
kernels, and the next start, wait or `check` raises. (Without a store nobody watches: NCCL's own watchdog then ends
the process with SIGABRT when the group's timeout, ten minutes by default, has passed.)
"""

import json
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from apb.parallel.heartbeat import SILENT_S, Heartbeat
from apb.parallel.host import Counters, Host, HostFailed

__all__ = ["ProcessGroupHost"]

POLL_S = 0.3

# torch 2.13 renames all_gather_into_tensor; 2.11 knows the old name only.
_gather_bytes: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ProcessGroupHost(Host):
    """A host that is one process of `group`. Making one is collective if a store is given.

    Args:
        group: the process group, or a device mesh with one dimension (`mesh["sequence"]` of a larger one).
        device: where this host's tensors live: CUDA for NCCL, CPU for gloo.
        store: reached by all members (TCPStore, FileStore, PrefixStore), for saying who failed. The default
            group's store will do; without one, a failure names the collective and this host only.
        timeout_s: longest wait in one collective, in seconds.

    Raises:
        TypeError: `group` is neither a process group nor a device mesh.
        ValueError: the mesh has several dimensions, or this process is not a member of the group.
        HostFailed: (with a store) a member did not make its host within `timeout_s`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        device: torch.device | str,
        store: dist.Store | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._group = _group_of(group)
        self.rank = dist.get_rank(self._group)
        if self.rank < 0:
            raise ValueError("group: this process is not a member of it; make a host on its members only")
        self.world_size = dist.get_world_size(self._group)
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.counters = Counters()
        self._timeout_s = timeout_s
        self._number = 0
        self._watched = store is not None and self.device.type == "cuda"
        self._under_way: dict[int, tuple[Callable[[], bool], str]] = {}
        self._oldest = (-1, 0.0)  # the collective that the device is at, and since when
        self._failed: str | None = None
        self._heartbeat: Heartbeat | None = None
        if store is not None:
            members = "-".join(str(rank) for rank in dist.get_process_group_ranks(self._group))
            base = f"apb-host/{self._group.group_name}/{members}"
            nth = store.add(f"{base}/{self.rank}/made", 1)  # hosts made again on one group share no keys
            self._heartbeat = Heartbeat(store, f"{base}/{nth}", self.rank, self.world_size, timeout_s)
            weakref.finalize(self, self._heartbeat.stop)
            if self._watched:
                self._heartbeat.watch = _weak_call(self, ProcessGroupHost._watch)

    def close(self) -> None:
        """Say that this host has left, and stop its heartbeat; also done at exit. The group is left alone."""
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def leave_group(self) -> None:
        """Close, then destroy the default group if this host is on it; for whoever made the group, at exit.

        gloo's threads must have ended before the interpreter does: one that then frees a tensor asks for the GIL and
        takes the process down with SIGABRT. After a failure, or with a collective still under way, destroying the
        group could hang, so it is left alone.
        """
        self.close()
        idle = all(done() for done, _ in self._under_way.values())
        if self.device.type == "cpu" and self._failed is None and idle:
            stands = self._group is dist.group.WORLD
            del self._group  # the last reference joins the threads
            if stands:
                dist.destroy_process_group()

    def announce(self, error: BaseException) -> None:
        """Write `error` to the store, if there is one; hosts that wait raise `HostFailed` within a second or two."""
        if self._heartbeat is not None:
            self._heartbeat.announce(error)

    def check(self) -> None:
        """Raise `HostFailed` if a collective is known to have failed; on CUDA, call it before trusting results."""
        if self._failed is not None:
            raise HostFailed(self._failed)

    def _start_all_gather(self, x: Tensor, what: str) -> Callable[[], list[Tensor]]:
        received = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        start = partial(_gather_bytes, _as_bytes(received), _as_bytes(x)) if x.numel() else None
        return self._start(start, [x], list(received), what)

    def _start_all_to_all(
        self, parts: dict[int, Tensor], shapes: dict[int, torch.Size], what: str
    ) -> Callable[[], list[Tensor]]:
        ranks = range(self.world_size)
        going, coming = sorted(parts), sorted(shapes)
        if self.device.type == "cuda":  # NCCL sends from where the parts lie, and nothing where there is nothing
            some = parts[going[0]]
            arrived = {rank: torch.empty(shapes[rank], dtype=some.dtype, device=some.device) for rank in coming}
            outs, ins = ([_as_bytes(x.get(rank, some[:0])) for rank in ranks] for x in (arrived, parts))
            return self._start(partial(dist.all_to_all, outs, ins), list(parts.values()), list(arrived.values()), what)
        # An exchange goes this way too: the wait for gloo's isend and irecv cannot be cut into short ones, since the
        # first to time out closes the connection.
        sent = torch.cat([parts[rank].reshape(-1) for rank in going]) if len(going) > 1 else parts[going[0]]
        received = torch.empty(sum(shapes[rank].numel() for rank in coming), dtype=sent.dtype, device=sent.device)
        sizes_out = [parts[rank].numel() * sent.itemsize if rank in parts else 0 for rank in ranks]
        sizes_in = [shapes[rank].numel() * sent.itemsize if rank in shapes else 0 for rank in ranks]
        start = partial(dist.all_to_all_single, _as_bytes(received), _as_bytes(sent), sizes_in, sizes_out)
        pieces = received.split([shapes[rank].numel() for rank in coming])
        results = [piece.view(shapes[rank]) for piece, rank in zip(pieces, coming, strict=True)]
        return self._start(start, [sent], results, what)

    def _start(
        self, start: Callable[..., Any] | None, sent: list[Tensor], received: list[Tensor], what: str
    ) -> Callable[[], list[Tensor]]:
        """Number a collective, start it (None: nothing to send), and return what waits for it, yielding `received`."""
        self.check()
        number, self._number = self._number, self._number + 1
        name = f"collective {number} ({what!r})"
        if self._heartbeat is not None:
            self._heartbeat.enter(number, name)
        if start is None:
            return lambda: received
        try:
            # NCCL has a stream of its own: it follows what the current stream was given so far, beside what it is given
            # next. The work holds on to the tensors until it is waited for, or else until the device is done with them.
            work = start(group=self._group, async_op=True)
        except RuntimeError as error:
            self._fail(number, name, error)
        if self.device.type != "cuda":  # where nobody watches, forget here those that nobody waited for
            self._under_way = {n: work for n, work in self._under_way.items() if not work[0]()}
        if self._watched or self.device.type != "cuda":
            self._under_way[number] = (work.is_completed, name)

        def finish() -> list[Tensor]:
            self.check()
            if self.device.type != "cuda":
                self._wait_polling(work, number, name)
                self._under_way.pop(number, None)
                return received
            work.wait()
            stream = torch.cuda.current_stream(self.device)
            for tensor in (*sent, *received):  # this stream may not be the one they were allocated on
                tensor.record_stream(stream)
            if self._watched:  # an event rather than the work, which would hold on to the tensors
                self._under_way[number] = (stream.record_event().query, name)
            return received

        return finish

    def all_gather_object(self, value: Any, *, what: str) -> list[Any]:
        """Return every host's `value` in rank order, as JSON carries it (a tuple comes back as a list)."""
        text = json.dumps(value)
        if self.world_size == 1:
            return [json.loads(text)]
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        size = torch.tensor([data.numel()], device=self.device)
        sizes = [int(size) for size in torch.cat(self._start_all_gather(size, what)()).tolist()]
        self.check()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        rows = [row.cpu() for row in self._start_all_gather(padded.to(self.device), what)()]
        self.check()
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def _wait_polling(self, work: Any, number: int, name: str) -> None:
        until = time.monotonic() + self._timeout_s
        told = False
        while True:
            left = until - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(0.001, min(POLL_S, left))))
                return
            except RuntimeError:
                if work.is_completed():
                    try:
                        work.wait()  # it may have completed just after the wait gave up
                        return
                    except RuntimeError as broken:
                        self._fail(number, name, broken)
                if self._heartbeat is not None and not told:
                    self._heartbeat.beat()  # a long wait: let the others know where we are
                    told = True
                cause = self._cause(number)
                if cause is not None or left <= POLL_S:
                    self._fail(number, name, None, cause)

    def _cause(self, number: int) -> str | None:
        if self._heartbeat is None:
            return None
        return self._heartbeat.cause(number, silent_s=max(5.0, self._timeout_s / 2))

    def _fail(self, number: int, name: str, error: Exception | None, cause: str | None = None) -> NoReturn:
        """Find the cause, tell the others, and raise."""
        self._note_failure(number, name, error, cause)
        raise HostFailed(self._failed) from error

    def _note_failure(self, number: int, name: str, error: Exception | None, cause: str | None) -> None:
        said = "" if error is None else f"; the backend said: {str(error).splitlines()[0]}"
        if self._heartbeat is None:
            cause = "no store was given, so which host failed is unknown"
        elif cause is None:
            self._heartbeat.beat()
            timed_out = error is None or "timed out" in str(error).lower()
            found = self._heartbeat.cause(number, SILENT_S) if timed_out else self._heartbeat.await_cause(number)
            cause = found or self._heartbeat.absent(number)
        if self._heartbeat is not None:
            self._heartbeat.relay(cause)
        where = f"rank {self.rank} of {self.world_size} was waiting in {name}"
        self._failed = f"{cause}; {where} (timeout {self._timeout_s:g} s){said}"

    def _watch(self) -> None:
        """Look, in the heartbeat's thread, after the collectives that the CUDA device has not completed."""
        for number, (done, name) in list(self._under_way.items()):
            if done():
                self._under_way.pop(number, None)
                continue
            if self._oldest[0] != number:  # the program may have started it long before the device came to it
                self._oldest = (number, time.monotonic())
            cause = self._cause(number)
            if self._failed is None and (cause or time.monotonic() - self._oldest[1] > self._timeout_s):
                self._note_failure(number, name, None, cause)
                self._group.abort()
            return


def _group_of(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a mesh with one dimension, got {group.ndim} ({group.mesh_dim_names}); "
                'name the one that splits the sequence, as in mesh["sequence"]'
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a ProcessGroup or a DeviceMesh of which this process is a member, "
            f"got {type(group).__name__}"
        )
    return group


def _as_bytes(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).view(torch.uint8)


def _weak_call(owner: ProcessGroupHost, method: Callable[[Any], None]) -> Callable[[], None]:
    """Return a call of `method` on `owner` that does not keep `owner` alive."""
    reference = weakref.ref(owner)

    def call() -> None:
        host = reference()
        if host is not None:
            method(host)

    return call
