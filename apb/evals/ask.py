"""Ask a batch of questions: prefill on all hosts, then score the right answer and decode greedily on one.

Merging the hosts' partial attentions is exact, so once the prefill is done one host that holds every host's cache
answers as all of them together do, without their thousands of small messages. That is what makes evaluating many
questions on one device quick; the prefill, where the methods differ, runs on every host as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from apb.decoding import decode
from apb.evals.sample import Sample
from apb.hf import share_weights
from apb.methods import Method
from apb.parallel import Host, ThreadHost, run_threads
from apb.parallel.meeting import Group
from apb.session import Session

__all__ = ["Answer", "Asker"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said, and how likely it held the right answer.

    Attributes:
        tokens: generated greedily, without the stop token.
        nll: mean negative log-likelihood of the right answer's tokens, in nats.
    """

    tokens: list[int]
    nll: float


class Asker:
    """Asks one model, on any number of hosts that are threads of this process.

    Args:
        model: a causal language model on one device.
        stop_tokens: an answer ends at the first of these.
        timeout_s: longest wait of a host for another one.
    """

    def __init__(self, model: Any, *, stop_tokens: Sequence[int] = (), timeout_s: float = 600.0) -> None:
        self.model, self.device, self.timeout_s = model, model.device, timeout_s
        self.stop_tokens = frozenset(stop_tokens)
        self._copies: list[Any] = []

    def ask(self, samples: Sequence[Sample], method: Method, hosts: int, *, max_new_tokens: int) -> list[Answer]:
        """Answer samples whose documents, questions and suffixes have equal lengths, as one batch.

        Args:
            samples: at least one.
            method: how to attend; prepared for the model.
            hosts: H ≥ 1.
            max_new_tokens: most tokens to generate, ≥ 1.

        Raises:
            ValueError: lengths differ, or the method cannot do it.
        """
        prompts = [sample.prompt for sample in samples]
        shapes = {(p.document.shape, p.query.shape, p.suffix.shape, p.prefix_tokens) for p in prompts}
        if len(shapes) != 1:
            raise ValueError(f"samples: expected at least one, all of the same lengths, got {sorted(map(str, shapes))}")
        document, query, suffix = (
            torch.cat([getattr(p, part) for p in prompts]) for part in ("document", "query", "suffix")
        )
        session, ran = self._prefill(method, hosts, document, query, prompts[0].prefix_tokens)
        logits = session.extend(suffix if ran else torch.cat((query, suffix), dim=1))
        asked = session.tokens
        nll = _answer_nll(session, logits, [sample.answer_ids for sample in samples])
        session.rewind(asked)
        tokens, lengths = decode(session, logits, max_new_tokens=max_new_tokens, stop_tokens=sorted(self.stop_tokens))
        return [
            Answer(tokens=row[: length - (row[length - 1] in self.stop_tokens)], nll=value)
            for row, length, value in zip(tokens.tolist(), lengths, nll.tolist(), strict=True)
        ]

    def _prefill(
        self, method: Method, hosts: int, document: Tensor, query: Tensor, prefix_tokens: int
    ) -> tuple[Session, bool]:
        """Prefill on all hosts; return one host's session with every host's cache, and whether the query has run."""
        lengths = {"tokens": document.shape[1], "query": query.shape[1], "query_offset": prefix_tokens}
        plan = method.plan(hosts=hosts, **lengths)
        while len(self._copies) < hosts:
            self._copies.append(share_weights(self.model))

        def body(host: Host) -> Session:
            session = Session(self._copies[host.rank], method, plan, host)
            session.prefill(document, query)
            return session

        parts = run_threads(hosts, body, device=self.device, timeout_s=self.timeout_s)
        alone = ThreadHost(Group(1, self.timeout_s), 0, self.device)
        session = Session.join(parts, method.plan(hosts=1, **lengths), alone)
        return session, plan.host(plan.owner).query_rows > 0


def _answer_nll(
    session: Session, logits: Float[Tensor, "batch vocab"], answers: Sequence[Int[Tensor, " answer"]]
) -> Float[Tensor, " batch"]:
    """Return the mean NLL of each right answer, given its earlier tokens; shorter ones are filled up and left out."""
    longest = max(len(answer) for answer in answers)
    targets = torch.stack([F.pad(answer, (0, longest - len(answer)), value=-100) for answer in answers])
    targets = targets.to(logits.device)
    nll = F.cross_entropy(logits.float(), targets[:, 0], reduction="none")
    if longest > 1:
        given = targets[:, :-1].clamp(min=0)
        after = session.extend(given, every_row=True)
        rest = F.cross_entropy(after.float().flatten(0, 1), targets[:, 1:].flatten(), reduction="none")
        nll = nll + rest.unflatten(0, (len(answers), -1)).sum(dim=1)
    return nll / (targets >= 0).sum(dim=1)
