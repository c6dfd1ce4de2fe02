"""All lengths, all methods: one row for each, as soon as it is there."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace

import torch

from apb.attend import Backend
from apb.bench.prefill import counted, measured, simulated
from apb.bench.prefill.case import Case, run_environment
from apb.bench.prefill.link import NVLINK, Link
from apb.bench.prefill.methods import Contender, line_up
from apb.bench.prefill.record import Mode, PrefillRow
from apb.bench.prefill.shapes import SHAPES
from apb.bench.prefill.store import Key
from apb.device import pick_device, pick_dtype
from apb.methods import METHODS, Flash
from apb.parallel import Host, HostError, host_from_env

__all__ = ["run_prefill"]

_TIMEOUT_S = 900.0


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

    Under torchrun, "measured" runs on its ranks: all of them go through the same loop, and rank 0 speaks for all.

    Args:
        shape: a name of `SHAPES`.
        tokens: lengths of the document.
        hosts: numbers of hosts. A method that knows one host runs on one, whatever is asked for, and once.
        names: methods, as `line_up` takes them.
        mode: how to find out.
        repeats: how often to time, ≥ 1.
        link: what messages cost in "simulated"; None is `NVLINK`.
        known: keys of the rows that are there already; those are left out.
        on_row: called with each row when it is done; on rank 0 alone.
        on_progress: called with a line on what is under way; on rank 0 alone.
        device: where to compute; None is the first GPU, or else the CPU.
        dtype: of weights and activations; None is bfloat16, and where the CPU computes float32.
        backend: who computes the attention.

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
    if dtype is None:
        dtype = torch.bfloat16 if mode == "counted" else pick_dtype("auto", device)
    speaks = host is None or host.rank == 0
    run = _Run(mode, repeats, link or NVLINK, host, on_progress if speaks else lambda text: None)
    empty = Case(
        shape=replace(SHAPES[shape], bytes_per_value=dtype.itemsize),
        tokens=1,
        hosts=1,
        label="",
        method=Flash(),
        device=device,
        dtype=dtype,
    )
    name, seen = run_environment(device)["device"], set()
    for contender, length in _contenders(tokens, counts, names, backend):
        key: Key = (mode, shape, length, contender.hosts, contender.label, name)
        skip = key in seen or (key in known if host is None else host.all_gather_object(key in known, what="known")[0])
        seen.add(key)
        if skip:
            continue
        row = run(replace(empty, tokens=length, hosts=contender.hosts, label=contender.label), contender)
        if speaks:
            on_row(row)
        if run.broken is not None:
            raise run.broken
    if host is not None:
        host.close()


class _Run:
    """Turns a contender into a row, whatever comes; `broken` is set if the group is."""

    def __init__(
        self, mode: Mode, repeats: int, link: Link, host: Host | None, on_progress: Callable[[str], None]
    ) -> None:
        self.mode, self.repeats, self.link, self.host, self.on_progress = mode, repeats, link, host, on_progress
        self.broken: HostError | None = None

    def __call__(self, case: Case, contender: Contender) -> PrefillRow:
        def tell(text: str) -> None:
            self.on_progress(f"{case.label}, {case.tokens} tokens: {text}")

        try:
            case = replace(case, method=contender.make())
            if self.mode == "counted":
                return counted.run_one(case)
            if self.mode == "simulated":
                return simulated.run_one(case, repeats=self.repeats, link=self.link, on_progress=tell)
            return measured.run_one(case, repeats=self.repeats, on_progress=tell, host=self.host)
        except Exception as error:
            if self.host is not None and isinstance(error, HostError):
                self.broken = error
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises if the device itself has failed: nothing more can be measured then
        finally:
            torch.cuda.empty_cache()  # the next case has other sizes
        return case.blank(self.mode, notes=reason)


def _contenders(
    tokens: Sequence[int], hosts: Sequence[int], names: Sequence[str], backend: Backend
) -> Iterator[tuple[Contender, int]]:
    """Yield every method at every length and number of hosts."""
    for length in tokens:
        for count in hosts:
            for contender in line_up(names, length, count, backend=backend):
                yield contender, length


def _check(shape: str, tokens: Sequence[int], hosts: Sequence[int], names: Sequence[str], repeats: int) -> None:
    """Refuse what cannot be, before anything runs."""
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    for name, values in (("tokens", tokens), ("hosts", hosts), ("repeats", [repeats])):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r}")
    for contender in line_up(names, 1, 1):
        if contender.label.partition(":")[0].strip() in METHODS and ":" in contender.label:
            contender.make()
