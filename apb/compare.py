"""Answer one question with several methods, and hold every one against exact attention."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from apb.masks import mask_grid
from apb.methods import Method, make_method
from apb.run import Job, OnPhase, Report, check_job, run_job

__all__ = ["Outcome", "compare"]

_CELLS = 144


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one method: a report, or the reason why there is none.

    Attributes:
        name: the method, with its settings.
        report: its answer and what it took.
        error: why it could not run.
        logit_difference: largest distance of the first token's logits from those of exact attention on one host.
        grid: how much of each cell of the document × document square it attends to (middle layer, first head).
    """

    name: str
    report: Report | None = None
    error: str = ""
    logit_difference: float = float("nan")
    grid: Float[Tensor, "cells cells"] | None = field(default=None, repr=False)


def compare(
    job: Job, names: Iterable[str], *, on_phase: OnPhase | None = None, on_method: Callable[[str], None] | None = None
) -> list[Outcome]:
    """Run `job` with each of the methods `names`, and with exact attention on one host whether asked for or not.

    Hosts are started anew for each method. On a CPU they are processes of one thread each, one host's too, so that
    times and memory compare. Under torchrun every rank calls this, and all but the first get an empty list.

    Args:
        job: the question, the model and the hosts; its method is left aside.
        names: as `make_method` reads them.
        on_phase: as in `run_job`.
        on_method: called with "[1/8] ring" and so on, as each method begins.

    Raises:
        ValueError: no such method or setting; before anything runs.
        HostFailed: under torchrun, a rank died.
    """
    names = list(dict.fromkeys(names))
    methods = {name: make_method(name) for name in dict.fromkeys([*names, "flash"])}
    check_job(replace(job, method="ring"))  # what is wrong for all methods is said once
    rank = os.environ.get("RANK")  # under torchrun, whose ranks are the hosts
    first = rank in (None, "0")
    if rank is None and job.host_kind == "auto" and not torch.cuda.is_available():
        job = replace(job, host_kind="processes")
    found: dict[str, Report | str | None] = {}
    # Methods of one host come last: of torchrun's ranks the first runs them alone, and nobody waits for it.
    order = sorted(methods, key=lambda name: methods[name].one_host)
    for number, name in enumerate(order, start=1):
        alone = methods[name].one_host
        if alone and not first:
            continue
        if first and on_method:
            on_method(f"[{number}/{len(order)}] {name}")
        mine = replace(job, method=name, keep_indices=True, hosts=1 if alone else job.hosts)
        try:
            found[name] = run_job(mine, on_phase=on_phase, here=alone)
        except (ValueError, RuntimeError) as error:
            # This method cannot do it, others may; but torchrun's ranks have one group, and a broken one stays broken.
            if isinstance(error, RuntimeError) and rank is not None and not alone:
                raise
            found[name] = str(error).splitlines()[0]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    exact = found.get("flash")
    return [_outcome(name, methods[name], found[name], exact) for name in names] if first else []


def _outcome(name: str, method: Method, report: Report | str | None, exact: Report | str | None) -> Outcome:
    if not isinstance(report, Report):
        return Outcome(name=name, error=str(report))
    difference = float("nan")
    if isinstance(exact, Report):
        difference = float((report.generation.logits.double() - exact.generation.logits.double()).abs().max())
    kept = {block: torch.tensor(where, dtype=torch.int64) for host in report.hosts for block, where in host.kept}
    indices = report.generation.indices
    index = next(iter(indices.values()), None)  # the middle layer's alone was kept
    return Outcome(
        name=name,
        report=report,
        logit_difference=difference,
        grid=mask_grid(method, report.plan, kept, index, cells=_CELLS),
    )
