"""Run hosts as processes that tell of what they have done while they go on: `apb.parallel.run_processes`, and a pipe.

def body(host, tell):
    tell("half of it")            # of rank 0 only

error = run_telling(2, body, on_item=print, backend="gloo", timeout_s=60)
"""

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

from apb.parallel import Host, run_processes

__all__ = ["run_telling"]


def run_telling(
    world_size: int,
    body: Callable[[Host, Callable[[Any], None]], object],
    *,
    on_item: Callable[[Any], None],
    backend: Literal["gloo", "nccl"],
    timeout_s: float,
) -> Exception | None:
    """Run `body(host, tell)` on hosts that are processes; `on_item` is called here with what rank 0 tells, at once.

    Args:
        world_size, backend, timeout_s: as in `run_processes`.
        body: what each host does; what it tells is pickled.
        on_item: called in a thread of its own, with one item after the other. If it raises, the hosts are ended.

    Returns:
        Why the hosts failed, if they did.

    Raises:
        Exception: what `on_item` raised, or what was told could not be read.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    raised: list[Exception] = []
    listener = threading.Thread(target=_listen, args=(ours, on_item, raised), daemon=True)
    listener.start()
    failure = None
    try:
        run_processes(world_size, _body, body, (ours, theirs), backend=backend, timeout_s=timeout_s)
    except Exception as error:
        failure = error
    finally:
        theirs.close()  # the last one to hold it: the listener ends
        listener.join()
    if raised:
        raise raised[0]
    return failure


def _body(
    host: Host, body: Callable[[Host, Callable[[Any], None]], object], line: tuple[Connection, Connection]
) -> None:
    theirs, ours = line
    theirs.close()  # a fork holds it, too, and could write to nobody for ever
    body(host, ours.send if host.rank == 0 else lambda item: None)


def _listen(line: Connection, on_item: Callable[[Any], None], raised: list[Exception]) -> None:
    """Hand on what comes until nobody is left to send; closing the line ends whoever still does."""
    with line:
        while True:
            try:
                try:
                    item = line.recv()
                except (EOFError, OSError):
                    return
                on_item(item)
            except Exception as error:
                raised.append(error)
                return
