"""Start hosts as processes of this machine, or find the one that `torchrun` has started."""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from apb.parallel.host import HostError, HostFailed
from apb.parallel.process_group import ProcessGroupHost

__all__ = ["host_from_env", "run_processes"]

T = TypeVar("T")

GRACE_S = 10.0  # the backend's own timeout comes so much later than ours, which knows more


@dataclass(frozen=True)
class _Report:
    """What one process sends home; `at` is the machine's monotonic clock."""

    rank: int
    result: Any = None
    error: BaseException | None = None
    remote: str = ""
    at: float = 0.0


def run_processes(
    world_size: int,
    body: Callable[..., T],
    *args: Any,
    backend: Literal["gloo", "nccl"] = "gloo",
    timeout_s: float = 60.0,
) -> list[T]:
    """Run `body(host, *args)` on `world_size` hosts, each a process of its own.

    With gloo the processes are forked, on the CPU, with one torch thread each (a forked OpenMP pool hangs), so
    `body` may be any function. With NCCL, or once this process uses CUDA, they are spawned, rank r on CUDA device r
    with NCCL; `body` and `args` must then be picklable, and the caller's script guarded by `__main__`.

    Args:
        world_size: number of hosts, at least 1; with NCCL at most the number of CUDA devices.
        body: what each host does; its first argument is its `ProcessGroupHost`, on the default group.
        args: further arguments.
        backend: who carries the collectives.
        timeout_s: longest wait in one collective, in seconds.

    Returns:
        What the bodies returned (pickled: tensors are copied, and best on the CPU), in rank order.

    Raises:
        BaseException: the first error that a body raised of its own, with the remote traceback as a note.
        HostFailed: a process was killed (the message names rank and signal) or a host did not come in time.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend: expected 'gloo' or 'nccl', got {backend!r}")
    if world_size < 1:
        raise ValueError(f"world_size: expected at least 1 host, got {world_size}")
    if backend == "nccl" and torch.cuda.device_count() < world_size:
        raise ValueError(
            f"world_size: NCCL needs a CUDA device for each of the {world_size} hosts, and this machine has "
            f"{torch.cuda.device_count()}; take backend='gloo', or run_simulated on one device"
        )
    fork = backend == "gloo" and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    folder = tempfile.mkdtemp(prefix="apb-hosts-")
    processes: list[Any] = []
    lines: list[Any] = []
    patience_s = 0.0
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            setup = (rank, world_size, backend, folder, timeout_s, fork)
            process = context.Process(target=_child, args=(setup, theirs, body, args), name=f"apb-host-{rank}")
            process.start()
            theirs.close()
            processes.append(process)
            lines.append(ours)
        reports = _collect(processes, lines, timeout_s)
        patience_s = 2.0
    finally:
        for line in lines:
            with contextlib.suppress(OSError):
                line.send_bytes(b"bye")
        _end(processes, patience_s)
        for line in lines:
            line.close()
        shutil.rmtree(folder, ignore_errors=True)
    errors = sorted((report for report in reports if report.error is not None), key=lambda report: report.at)
    if errors:
        origins = [report for report in errors if report.remote == "" or not isinstance(report.error, HostFailed)]
        first = (origins or errors)[0]
        assert first.error is not None
        if first.remote:
            first.error.add_note(f"raised on rank {first.rank} of {world_size}; there:\n{first.remote}")
        if len(reports) < world_size:
            running = sorted(set(range(world_size)) - {report.rank for report in reports})
            first.error.add_note(f"ranks {running} did not end by themselves and were killed")
        raise first.error
    return [report.result for report in sorted(reports, key=lambda report: report.rank)]


def _collect(processes: list[Any], lines: list[Any], timeout_s: float) -> list[_Report]:
    """Wait for every process's report; after a first error, wait for the others' a limited time only."""
    reports: list[_Report] = []
    waiting = {line: rank for rank, line in enumerate(lines)}
    until: float | None = None
    while waiting and (until is None or time.monotonic() < until):
        left = None if until is None else max(0.0, until - time.monotonic())
        ready: list[Any] = connection.wait(list(waiting), left)
        for line in ready:
            rank = waiting.pop(line)
            try:
                report = pickle.loads(line.recv_bytes())  # from our own child
            except (EOFError, OSError):
                report = _Report(rank, error=_death(processes[rank], rank, len(lines)), at=time.monotonic())
            reports.append(report)
            if report.error is not None and until is None:
                until = time.monotonic() + timeout_s + GRACE_S
    return reports


def _death(process: Any, rank: int, world_size: int) -> HostFailed:
    process.join(5.0)
    code = process.exitcode
    if code is not None and code < 0:
        return HostFailed(f"rank {rank} of {world_size} was killed by {signal.Signals(-code).name}")
    return HostFailed(f"rank {rank} of {world_size} ended with exit code {code} before it had a result")


def _end(processes: list[Any], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
        process.close()


def _child(setup: tuple[Any, ...], line: Any, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Be one host: run the body, report, and stay (peers may still read from us) until the parent says bye."""
    rank, world_size, backend, folder, timeout_s, fork = setup
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_follow_parent, args=(folder,), daemon=True).start()
    torch.set_num_threads(1 if fork else max(1, (os.cpu_count() or 1) // world_size))
    host: ProcessGroupHost | None = None
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        host = _join(backend, device, store, rank, world_size, timeout_s)
        result = body(host, *args)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            host.check()
        message = pickle.dumps(_Report(rank, result=result))
    except BaseException as error:
        if host is not None:
            host.announce(error)
        message = pickle.dumps(
            _Report(rank, error=_portable(error), remote=traceback.format_exc(), at=time.monotonic())
        )
    if host is not None:
        host.close()
    with contextlib.suppress(OSError, EOFError):
        line.send_bytes(message)
        line.recv_bytes()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # destroying a process group that has lost a member may hang


def _join(
    backend: str, device: torch.device, store: dist.Store, rank: int, world_size: int, timeout_s: float
) -> ProcessGroupHost:
    """Initialise the default process group and return this process's host of it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("apb-default-group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s + GRACE_S),
        device_id=device if device.type == "cuda" else None,
    )
    world = dist.group.WORLD
    assert world is not None
    return ProcessGroupHost(world, device, store, timeout_s)


def _portable(error: BaseException) -> BaseException:
    """Return `error` if it survives pickling, and else a `HostError` with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:
        pass
    return HostError(f"{type(error).__name__}: {error}")


def _follow_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def host_from_env(timeout_s: float = 60.0) -> ProcessGroupHost | None:
    """Return this process's host if `torchrun` started it, and None otherwise.

    Initialises the default process group (NCCL if every local process has a CUDA device, else gloo) unless that has
    been done, and sets the CUDA device. A gloo group made here is destroyed at exit.

    Args:
        timeout_s: longest wait in one collective, in seconds.
    """
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if dist.is_initialized():
        world = dist.group.WORLD
        assert world is not None
        if "nccl" not in dist.get_backend(world):
            device = torch.device("cpu")
        store = world.get_group_store() if hasattr(world, "get_group_store") else None
        return ProcessGroupHost(world, device, store, timeout_s)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s + GRACE_S)))
    host = _join("nccl" if cuda else "gloo", device, store, rank, world_size, timeout_s)
    atexit.register(host.leave_group)
    return host
