"""Spava (arXiv 2601.21444): APB's successor, by its authors. Zigzag blocks, and the question runs along."""

from dataclasses import dataclass

from apb.methods.apb import APB
from apb.methods.method import check_choice
from apb.plan import ContextPlan, Layout, QueryIn, plan_context

__all__ = ["Spava"]


@dataclass(frozen=True, kw_only=True)
class Spava(APB):
    """APB with another plan; it attends as APB does.

    - The anchor is the document's first l_a tokens, without the question. They belong to no block: the 2H blocks split
      what follows, all of them see the anchor, and its keys stay in the hosts' caches in shares.
    - The question runs along behind every host's blocks, and the tokens that are kept depend on it in every layer.

    Attributes:
        anchor: l_a ≥ 0; None is n/64, rounded up to a multiple of 128.
        passing: l_p ≥ 0, tokens that each block passes on; None is n/128, rounded up likewise.
        query_in: "prefill", or "after" for a compressor that does not read the question.
    """

    query_in: QueryIn = "prefill"
    layout: Layout = "zigzag"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("query_in", self.query_in, ("prefill", "after"))

    def plan(self, *, tokens: int, hosts: int, query: int = 0, query_offset: int = 0) -> ContextPlan:
        """Split what follows the anchor over `hosts` hosts; arguments and errors as `APB.plan`."""
        anchor = min(tokens, _round_up(tokens, 64)) if self.anchor is None else self.anchor
        passing = _round_up(tokens, 128) if self.passing is None else self.passing
        self.reads_query(anchor, passing, query, blocks=hosts * (2 if self.layout == "zigzag" else 1))
        return plan_context(
            tokens=tokens,
            hosts=hosts,
            anchor=anchor,
            passing=passing,
            query=query,
            query_in=self.query_in,
            layout=self.layout,
            shared_prefix=True,
            split_anchor=self.split_anchor,
            split_anchor_cache=True,
        )

    def check_plan(self, plan: ContextPlan) -> None:
        """Take any plan whose anchor belongs to no block and stays in shares."""
        if not (plan.shared_prefix and plan.split_anchor_cache) or plan.reuse_positions:
            raise ValueError(
                "plan: Spava takes shared_prefix=True, split_anchor_cache=True and true positions; make the plan with "
                "this method's plan(…)"
            )


def _round_up(tokens: int, part: int) -> int:
    """Return a `part`-th of the tokens, rounded up to a multiple of 128."""
    return -(-tokens // (128 * part)) * 128
