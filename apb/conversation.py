"""Several questions about one document: prefill it once, then ask, each question straight behind the document.

The caches stay on the hosts. A question does not follow the earlier ones: the caches are taken back to the document's
end first, so that its answer does not depend on what was asked before. Whether it is the answer of a prefill of its own
depends on whether the prefill read the first question; every answer says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from apb.context import Trace
from apb.decoding import OnToken, check_new_tokens, decode
from apb.digest import digest
from apb.generation import Generation
from apb.hf import check_positions, model_shape
from apb.memory import PeakMemory
from apb.methods import Method
from apb.parallel.host import Host
from apb.plan import ContextPlan
from apb.sampling import Sampling
from apb.session import Session

__all__ = ["Conversation", "prefill_reads_query"]


class Conversation:
    """One document, prefilled once over all hosts, and any number of questions about it.

    Every host makes its own with the same arguments and calls the same methods in the same order.

        conversation = Conversation(model, method, host)
        conversation.prefill(document)          # or (document, query), if the method's plan wants the question
        first = conversation.ask(query)         # a Generation
        second = conversation.ask(other)        # from the same caches; `second.sound` says what that means

    Args:
        model: a transformers causal language model, on this host's device.
        method: how to attend to the document.
        host: this member of the group.
        on_phase: called with (phase, 0, 0) as each phase starts, and with ("prefill", done, total) after each layer.
        timed: measure the phases.
        keep_indices: note in `kept` and `indices` what each layer chose.
        keep_layer: note it of this layer only.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        host: Host,
        *,
        on_phase: Callable[[str, int, int], None] | None = None,
        timed: bool = True,
        keep_indices: bool = False,
        keep_layer: int | None = None,
    ) -> None:
        self.model, self.method, self.host = model, method, host
        self._told = on_phase or (lambda name, done, total: None)
        self._new_trace = partial(
            Trace, timed=timed, keep_indices=keep_indices, keep_layer=keep_layer, counted=True, device=host.device
        )
        self._session: Session | None = None
        self._query = torch.empty(0)
        self._hidden: Tensor | None = None
        self._begin()

    def _begin(self) -> None:
        """Start the counts of an answer."""
        self._trace, self._before = self._new_trace(), self.host.counters.copy()
        self._memory, self._prefill_bytes = PeakMemory(self.host.device), 0

    def prefill(
        self,
        document: Int[Tensor, "batch tokens"],
        query: Int[Tensor, "batch query"] | None = None,
        *,
        prefix_tokens: int = 0,
        room: int = 0,
    ) -> ContextPlan:
        """Make the plan and prefill the document.

        Args:
            document: its token ids, the same on every host.
            query: the first question's token ids, for methods whose prefill reads it; None plans without a question.
            prefix_tokens: how many tokens of the document the query must not precede.
            room: how many tokens the longest question and its answer will have, if that is known.

        Raises:
            ValueError: an empty document, a second one, a plan that is not possible, or more tokens than the model has
                positions.
            PlanMismatch: the hosts came with different documents, methods or models.
            HostFailed: another host failed.
        """
        if self._session is not None:
            raise ValueError("prefill: this conversation has a document already; make a new one for another document")
        if document.shape[-1] == 0:
            raise ValueError("document: it is empty; expected at least 1 token")
        query = document[:, :0] if query is None else query
        host, trace = self.host, self._trace
        self._told("plan", 0, 0)
        with trace.phase("plan"), host.together("plan"):
            shape = replace(model_shape(self.model.config), bytes_per_value=self.model.dtype.itemsize)
            plan = self.method.plan(
                tokens=document.shape[-1],
                hosts=host.world_size,
                query=query.shape[-1],
                query_offset=prefix_tokens,
            )
            check_positions(self.model.config, plan.next_position + max(room, query.shape[-1]))
        host.agree((plan, self.method, shape, digest(document, query)), what="plan")
        self._memory = PeakMemory(host.device)
        session = Session(self.model, self.method, plan, host, trace=trace, on_layer=partial(self._told, "prefill"))
        self._told("prefill", 0, 0)
        with trace.phase("prefill"):
            hidden = session.prefill(document, query, agreed=True)
        self._prefill_bytes = sum(host.counters.since(self._before).sent_bytes.values())
        self._hidden = hidden[:, -1] if plan.host(host.rank).query_rows else None
        self._query, self._session, self._shape = query, session, shape
        return plan

    def ask(
        self,
        query: Int[Tensor, "batch query"],
        suffix: Int[Tensor, "batch suffix"] | None = None,
        *,
        max_new_tokens: int = 32,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling | None = None,
        on_token: OnToken | None = None,
    ) -> Generation:
        """Ask a question behind the document, and answer it.

        Args:
            query: its token ids, the same on every host.
            suffix: what follows the question before the answer.
            max_new_tokens: most tokens to generate, ≥ 1.
            stop_tokens: a row ends at the first of these.
            sampling: how to choose tokens; None is greedily.
            on_token: called with (number, `[batch]` ids) of each new token; may return which rows end with it. A row
                ends if any host says so.

        Raises:
            ValueError: an argument out of range, or nothing prefilled yet.
            PlanMismatch: the hosts came with different questions.
            HostFailed: another host failed.
        """
        suffix = query[:, :0] if suffix is None else suffix
        sampling = sampling or Sampling()
        if self._session is None:
            raise ValueError("ask: nothing has been prefilled; call prefill(document) first")
        check_new_tokens(max_new_tokens)
        if query.shape[-1] == 0:
            raise ValueError("query: it is empty; expected at least 1 token")
        sampling.check_rows(len(query))
        rows = query.shape[-1] + suffix.shape[-1] + max_new_tokens
        check_positions(self.model.config, self._session.document_end + rows)
        agreed = (digest(query, suffix), max_new_tokens, tuple(stop_tokens), sampling)
        self.host.agree(agreed, what="question")
        same = torch.equal(query.cpu(), self._query.cpu())
        logits = self._run_query(self._session, query, suffix, same=same)
        self._told("decode", 0, 0)
        with self._trace.phase("decode"):
            tokens, lengths = decode(
                self._session,
                logits,
                max_new_tokens=max_new_tokens,
                stop_tokens=stop_tokens,
                sampling=sampling,
                on_token=on_token,
            )
        generation = self._generation(self._session, logits, tokens, lengths, same=same)
        self._begin()
        return generation

    def _run_query(self, session: Session, query: Tensor, suffix: Tensor, *, same: bool) -> Tensor:
        """Run a question straight behind the document, unless it is there already; return the logits after it.

        Args:
            session: with the document prefilled.
            query, suffix: as in `ask`.
            same: whether it is the question that the prefill was for.
        """
        session.trace = self._trace
        self._told("query", 0, 0)
        with self._trace.phase("query"):
            if self._hidden is not None and same:  # it has run along with the prefill, and nothing else since
                logits = session.extend(suffix) if suffix.shape[-1] else session.logits(self._hidden)
            else:
                session.rewind()
                logits = session.extend(torch.cat((query, suffix), dim=-1))
        self._hidden = None
        return logits

    def _generation(
        self, session: Session, logits: Tensor, tokens: Tensor, lengths: list[int], *, same: bool
    ) -> Generation:
        """Put an answer together with what it took since `_begin`."""
        plan, trace = session.plan, self._trace
        return Generation(
            tokens=tokens,
            lengths=lengths,
            sound=same or not prefill_reads_query(self.method, plan),
            plan=plan,
            cost=self.method.cost(plan, self.host.rank, self._shape),
            counters=self.host.counters.since(self._before),
            prefill_bytes=self._prefill_bytes,
            logits=logits,
            pairs=trace.pairs,
            phase_ms=trace.phase_ms,
            peak_bytes=self._memory.bytes,
            kept=trace.kept,
            indices=trace.indices,
        )


def prefill_reads_query(method: Method, plan: ContextPlan) -> bool:
    """Whether the caches depend on the plan's question: a block sees it in the anchor, or a compressor reads it."""
    if not plan.query:
        return False
    embedded = plan.anchor_rows > plan.anchor and any(block.sees_anchor and block.tokens for block in plan.blocks)
    return embedded or ("query" in method.needs and any(block.passing_tokens for block in plan.blocks))
