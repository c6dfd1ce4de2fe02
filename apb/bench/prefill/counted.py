"""Counted: what each host computes, sends and keeps, by the plan alone. No time, and no device."""

from dataclasses import replace

from apb.bench.prefill.case import Case
from apb.bench.prefill.record import PrefillRow

__all__ = ["run_one"]


def run_one(case: Case) -> PrefillRow:
    """Count one layer of a case; `load` is each host's 10¹² operations.

    Raises:
        ValueError: the method has no plan for these numbers.
    """
    load = " ".join(f"{cost.flops / 1e12:.4g}" for cost in case.costs)
    return replace(case.row("counted"), load=load)
