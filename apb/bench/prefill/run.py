"""All lengths, all methods: one row for each, as soon as it is there."""

from collections import deque
from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from apb.attend import Backend, choose_backend
from apb.bench import environment, reason
from apb.bench.prefill import counted, measured, simulated
from apb.bench.prefill.case import Case
from apb.bench.prefill.link import NVLINK, Link
from apb.bench.prefill.methods import Contender, line_up
from apb.bench.prefill.record import Mode, PrefillRow
from apb.bench.prefill.shapes import SHAPES
from apb.bench.prefill.started import run_telling
from apb.bench.prefill.store import Key
from apb.device import pick_device, pick_dtype
from apb.methods import Flash, MInference, split_method
from apb.parallel import Host, HostError, host_from_env

__all__ = ["cases", "run_prefill"]

_TIMEOUT_S = 900.0  # the others wait while one host runs a one-host method


def run_prefill(
    shape: str,
    tokens: Sequence[int],
    hosts: Sequence[int] | int,
    names: Sequence[str],
    mode: Mode,
    repeats: int,
    link: Link | None,
    known: Container[Key],
    on_row: Callable[[PrefillRow], None],
    on_progress: Callable[[str], None],
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> None:
    """Run every method at every length and number of hosts.

    "measured" starts its hosts as processes, once for all cases of a number of hosts, and one number after the other.
    Under torchrun it runs on its ranks: all of them go through the same loop, and rank 0 speaks for all.

    Args:
        shape, tokens, hosts, names, mode, link, dtype, backend: as in `cases`.
        repeats: how often to time at least, ≥ 1.
        known: keys of the rows that are there already; those are left out.
        on_row: called with each row when it is done; on rank 0 alone. Where processes are started, it and `on_progress`
            are called in a thread of their own.
        on_progress: called with a line on what is under way; on rank 0 alone.
        device: where to compute; None is the first GPU, or else the CPU.

    Raises:
        ValueError: a shape, a method or a number that cannot be, before anything runs. What fails later is a row
            whose notes say why.
        HostError: hosts of torchrun failed in the middle of a message, and can talk no more; that row is written.
    """
    counts = [hosts] if isinstance(hosts, int) else list(hosts)
    _check(shape, tokens, counts, names, repeats)
    host = host_from_env(timeout_s=_TIMEOUT_S) if mode == "measured" else None
    if host is not None and set(counts) != {host.world_size}:
        raise ValueError(f"hosts: torchrun started {host.world_size} ranks, got {counts}; measure on as many hosts")
    device = (device or pick_device()) if host is None else host.device
    speaks = host is None or host.rank == 0
    wanted = cases(shape, tokens, counts, names, mode, link, device=device, dtype=dtype, backend=backend)
    if mode == "measured" and host is None:
        _start_hosts([job for key, job in wanted.items() if key not in known], repeats, on_row, on_progress)
        return
    run = _Run(mode, repeats, link or NVLINK, host, on_progress if speaks else lambda text: None)
    for key, (case, contender) in wanted.items():
        if key in known if host is None else host.all_gather_object(key in known, what="known")[0]:
            continue
        row = run(case, contender)
        if speaks:
            on_row(row)
        if run.broken is not None:
            raise run.broken
    if host is not None:
        host.close()


def cases(
    shape: str,
    tokens: Sequence[int],
    hosts: Sequence[int],
    names: Sequence[str],
    mode: Mode,
    link: Link | None,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> dict[Key, tuple[Case, Contender]]:
    """Return what there is to run, by what its rows are known by; the methods are still to be made.

    Args:
        shape: a name of `SHAPES`.
        tokens: lengths of the document.
        hosts: numbers of hosts. A method that knows one host runs on one, whatever is asked for, and once.
        names: methods, as `line_up` takes them.
        mode: how to find out.
        link: what messages cost in "simulated"; None is `NVLINK`.
        device: where to compute.
        dtype: of weights and activations; None is bfloat16, and where the CPU computes float32.
        backend: who computes the attention.

    Raises:
        ValueError: no such method.
    """
    if dtype is None:
        dtype = torch.bfloat16 if mode == "counted" else pick_dtype("auto", device)
    model, name, found = replace(SHAPES[shape], bytes_per_value=dtype.itemsize), environment(device)["device"], {}
    with FakeTensorMode():
        auto = choose_backend(torch.empty(1, model.heads, 1, model.head_dim, device=device, dtype=dtype))
    for length, count in ((length, count) for length in tokens for count in hosts):
        for one in line_up(names, length, count, backend=backend):
            case = Case(
                shape=model,
                tokens=length,
                hosts=one.hosts,
                label=one.label,
                method=Flash(),
                device=device,
                dtype=dtype,
                backend="" if mode == "counted" else _who_attends(one, length, auto),
                link=str(link or NVLINK) if mode == "simulated" and one.hosts > 1 else "",
            )
            found.setdefault(case.key(mode, name), (case, one))
    return found


def _who_attends(one: Contender, tokens: int, auto: Backend) -> str:
    """Name who computes a method's attention; lists of tiles have other kernels than the rest."""
    backend = one.backend
    method = one.make() if split_method(one.label)[0] == "minference" else None
    if isinstance(method, MInference) and tokens >= method.dense_below:
        backend, auto = method.dense_backend, "triton" if auto == "hopper" else auto
    return auto if backend == "auto" else backend


_Job = tuple[Case, Contender]


def _start_hosts(
    jobs: Sequence[_Job],
    repeats: int,
    on_row: Callable[[PrefillRow], None],
    on_progress: Callable[[str], None],
) -> None:
    """Measure on processes, started once for each number of hosts; and again for the rest, if a case has ended them."""
    for count in dict.fromkeys(case.hosts for case, _ in jobs):
        left = deque(job for job in jobs if job[0].hosts == count)
        backend = "nccl" if left[0][0].device.type == "cuda" else "gloo"

        def take(item: str | PrefillRow, left: deque[_Job] = left) -> None:
            if isinstance(item, str):
                on_progress(item)
            else:
                left.popleft()
                on_row(item)

        while left:
            on_progress(f"starting {count} host{'s' * (count > 1)}")
            serve = partial(_serve, jobs=tuple(left), repeats=repeats)
            error = run_telling(count, serve, on_item=take, backend=backend, timeout_s=measured.TIMEOUT_S)
            if error is not None and left:
                take(left[0][0].blank("measured", notes=reason(error)))
            elif left:
                case, _ = left[0]
                raise RuntimeError(
                    f"hosts: {count} of them ended without an error and without a row of {case.label} at {case.tokens} "
                    f"tokens; measure it alone, and report what led to it"
                )


def _serve(host: Host, tell: Callable[[Any], None], *, jobs: Sequence[_Job], repeats: int) -> None:
    """Be one of the hosts that were started for these cases; rank 0 tells of progress and rows."""
    run = _Run("measured", repeats, NVLINK, host, tell)
    for case, contender in jobs:
        row = run(replace(case, device=host.device), contender)
        if run.broken is not None:
            raise run.broken
        tell(row)


class _Run:
    """Turns a contender into a row, whatever comes; `broken` is set if the group is. "measured" has a host."""

    def __init__(
        self, mode: Mode, repeats: int, link: Link, host: Host | None, on_progress: Callable[[str], None]
    ) -> None:
        self.mode, self.repeats, self.link, self.host, self.on_progress = mode, repeats, link, host, on_progress
        self.broken: HostError | None = None

    def __call__(self, case: Case, contender: Contender) -> PrefillRow:
        cuda = case.device.type == "cuda"
        with torch.cuda.device(case.device) if cuda else nullcontext():  # Triton launches on the current one
            try:
                return self._row(replace(case, method=contender.make()))
            except Exception as error:
                if self.host is not None and isinstance(error, HostError):
                    self.broken = error
                said = reason(error)
                if cuda:
                    torch.cuda.synchronize()  # raises if the device itself has failed: nothing more can be measured
            finally:
                torch.cuda.empty_cache()  # the next case has other sizes
        return case.blank(self.mode, notes=said)

    def _row(self, case: Case) -> PrefillRow:
        def tell(text: str) -> None:
            self.on_progress(f"{case.label}, {case.tokens} tokens: {text}")

        if self.host is not None:
            return measured.run_one(case, repeats=self.repeats, on_progress=tell, host=self.host)
        if self.mode == "counted":
            return counted.run_one(case)
        return simulated.run_one(case, repeats=self.repeats, link=self.link, on_progress=tell)


def _check(shape: str, tokens: Sequence[int], hosts: Sequence[int], names: Sequence[str], repeats: int) -> None:
    """Refuse what cannot be, before anything runs."""
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    for name, values in (("tokens", tokens), ("hosts", hosts), ("repeats", [repeats])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r}")
    for contender in line_up(names, 1, 1):
        if ":" in contender.label:
            contender.make()
