"""Decode: choose a token for each row, see which rows have ended, and go on with it until all have."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apb.parallel.host import Host
from apb.sampling import Sampling
from apb.session import Session

__all__ = ["OnToken", "check_new_tokens", "decode"]

OnToken = Callable[[int, Tensor], Sequence[bool] | None]


def check_new_tokens(max_new_tokens: int) -> None:
    """Raise unless it is an integer ≥ 1."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens!r}")


def decode(
    session: Session,
    logits: Float[Tensor, "batch vocab"],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    sampling: Sampling | None = None,
    on_token: OnToken | None = None,
) -> tuple[Int[Tensor, "batch new"], list[int]]:
    """Choose tokens until every row has ended; the same on every host.

    What `on_token` says on one host reaches the others along with the next token, so that no message is added: an
    answer that it ends costs a group of several hosts one step more, whose token is dropped.

    Args:
        session: after the question.
        logits: that the first token is chosen by.
        max_new_tokens: most tokens to generate, ≥ 1.
        stop_tokens: a row ends at the first of these.
        sampling: how to choose tokens; None is greedily.
        on_token: called with (number, `[batch]` ids) of each new token; may return which rows end with it. A row ends
            if any host says so; hosts may come with different ones, or without.

    Returns:
        The tokens, of which a row that has ended repeats its last; and how many each row has until it ended, its stop
        token among them.
    """
    host, sampling = session.host, sampling or Sampling()
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)  # as every host knows
    votes = ended  # what `on_token` has said here
    lengths = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    chosen: list[Tensor] = []
    while True:
        token = sampling.choose(logits, len(chosen))
        if host.world_size > 1:
            token, said = _share(host, session.plan.owner, token, votes)
            ended = ended | said
        if chosen:
            token = torch.where(ended, chosen[-1], token)
        chosen.append(token)
        lengths = lengths + ~ended
        if on_token and not bool(ended.all()):
            found = on_token(len(chosen) - 1, token)
            if found is not None:
                votes = votes | torch.tensor(list(found), dtype=torch.bool, device=votes.device)
        ended = ended | torch.isin(token, stops)
        if host.world_size == 1:
            ended = ended | votes
        if len(chosen) == max_new_tokens or bool(ended.all()):
            counts = lengths.tolist()
            return torch.stack(chosen, dim=-1)[:, : max(counts)], counts
        logits = session.extend(token[:, None])


def _share(host: Host, owner: int, token: Tensor, votes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the owner's tokens, and which rows any host has ended.

    Unlike machines may round a tie apart, so one host's choice holds for all.
    """
    gathered = torch.stack(host.all_gather(torch.stack((token, votes.long())), what="token").wait())
    return gathered[owner, 0], gathered[:, 1].any(dim=0)
