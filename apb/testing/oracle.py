"""The slow oracle of all of APB: one process, a loop over the document's blocks, a loop over the layers.

It shares nothing with `apb.methods`, `apb.parallel`, `apb.compress` and `apb.hf`: of a plan it reads the numbers that
were asked for, never the blocks derived from them; of a model, the submodules; attention is `apb.reference`. Each
stream of rows — the anchor, every block, a running query — exists once, however many hosts hold it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from apb.plan import ContextPlan
from apb.reference import attention, kept_indices

__all__ = [
    "DocumentStack",
    "LayerResult",
    "Stack",
    "anchor_rows_of",
    "blocks_of",
    "key_norm",
    "layer",
    "nothing",
    "query_aware",
]

Rows = tuple[Tensor, Tensor, Tensor]
"""q, k and v after RoPE, `[batch, heads, rows, dim]`."""
Score = Callable[[Tensor, Tensor | None], Tensor]
"""(keys of the candidates, question vectors or None) → scores `[batch, kv_heads, tokens]`."""


def query_aware(k: Tensor, question: Tensor | None) -> Tensor:
    """Score by the mean of the group's question vectors, then take the highest of five neighbours."""
    assert question is not None
    group, scores = question.shape[1] // k.shape[1], torch.zeros(k.shape[:3], dtype=torch.float64)
    for h in range(k.shape[1]):
        mean = question[:, h * group : (h + 1) * group].double().mean(dim=(1, 2))
        scores[:, h] = (k[:, h].double() * mean[:, None]).sum(dim=-1)
    return max_of_five(scores)


def key_norm(k: Tensor, question: Tensor | None) -> Tensor:
    """Score by the smallest norm, then take the highest of five neighbours."""
    return max_of_five(-(k.double() ** 2).sum(dim=-1).sqrt())


def nothing(k: Tensor, question: Tensor | None) -> Tensor:
    """Score all alike, so that the first tokens are kept."""
    return torch.zeros(k.shape[:3])


def max_of_five(scores: Tensor) -> Tensor:
    """Give each token the highest score at most two tokens away, within these scores."""
    windows = [scores[..., max(0, t - 2) : t + 3].amax(dim=-1) for t in range(scores.shape[-1])]
    return torch.stack(windows, dim=-1) if windows else scores


def blocks_of(plan: ContextPlan) -> list[tuple[int, int, int]]:
    """Return (rank, start, stop) of every block in the document's order."""
    order = list(range(plan.hosts))
    if plan.layout == "zigzag":
        order += order[::-1]
    first = plan.anchor if plan.shared_prefix else 0
    size = -(-(plan.tokens - first) // len(order))
    return [
        (rank, min(first + i * size, plan.tokens), min(first + (i + 1) * size, plan.tokens))
        for i, rank in enumerate(order)
    ]


def needs_anchor(plan: ContextPlan, rank: int) -> bool:
    """Say whether a host has a use for the anchor: rows that see it, or the first block if it is told to."""
    mine = [(i, stop - start) for i, (owner, start, stop) in enumerate(blocks_of(plan)) if owner == rank]
    if plan.shared_prefix:
        return plan.anchor > 0
    return plan.anchor > 0 and any(tokens > 0 if i > 0 else plan.anchor_on_first for i, tokens in mine)


def anchor_rows_of(plan: ContextPlan, rank: int) -> list[int]:
    """Return which rows of the anchor a host runs: all if it needs any, or its share if the anchor is split."""
    rows = plan.anchor + (plan.query if plan.query_in == "anchor" else 0)
    if not plan.split_anchor:
        return list(range(rows)) if needs_anchor(plan, rank) else []
    needed = any(needs_anchor(plan, other) for other in range(plan.hosts))
    return share_of(rows, plan.hosts, rank) if needed else []


def share_of(rows: int, hosts: int, rank: int) -> list[int]:
    """Return pieces r and 2H − 1 − r of 2H."""
    pieces, mine = 2 * hosts, (rank, 2 * hosts - 1 - rank)
    return [row for row in range(rows) if any(rows * p // pieces <= row < rows * (p + 1) // pieces for p in mine)]


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """Attention of one layer by stream, and which document positions each block passed, `[batch, kv_heads, kept]`."""

    anchor: Tensor
    blocks: list[Tensor]
    query: Tensor
    kept: list[Tensor]


def layer(plan: ContextPlan, anchor: Rows, document: Rows, query: Rows, score: Score) -> LayerResult:
    """Attend once. `query` are the rows of a question that runs along; without one they are empty."""
    question = None
    if plan.query and plan.query_in == "prefill":
        question = query[0]
    elif plan.query and plan.anchor:
        question = anchor[0][:, :, plan.query_offset : plan.query_offset + plan.query]
    spans = blocks_of(plan)
    outs, kept = [], []
    received = tuple(x[:, :, :0] for x in document)
    for index, (_, start, stop) in enumerate(spans):
        q, k, v = (x[:, :, start:stop] for x in document)
        seen = [x[:, :, :0] if index == 0 and not plan.shared_prefix else x for x in anchor]
        keys, values = (torch.cat((seen[i], received[i], (k, v)[i - 1]), dim=2) for i in (1, 2))
        before = keys.shape[2] - (stop - start)
        mask = torch.tensor(
            [[c < before or c - before <= j for c in range(keys.shape[2])] for j in range(stop - start)],
            dtype=torch.bool,
        )
        outs.append(attention(q, keys, values, mask.reshape(stop - start, keys.shape[2]))[0])

        first = max(start, min(plan.anchor, stop)) if index == 0 else start
        count = 0 if index == len(spans) - 1 else min(plan.passing, stop - first)
        where = torch.zeros(*k.shape[:2], 0, dtype=torch.int64)
        if count:
            where = first + kept_indices(score(document[1][:, :, first:stop], question), count)
        kept.append(where)
        picks = (x.gather(2, where[..., None].expand(-1, -1, -1, x.shape[-1])) for x in document[1:])
        received = (received[0], *(torch.cat(pair, dim=2) for pair in zip(received[1:], picks, strict=True)))
    return LayerResult(
        anchor=causal(*anchor),
        blocks=outs,
        query=causal(query[0], *(torch.cat((document[i], query[i]), dim=2) for i in (1, 2))),
        kept=kept,
    )


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally with the last rows of the keys: row i of n sees keys 0 … m − n + i."""
    rows, columns = q.shape[2], k.shape[2]
    mask = torch.tensor([[c <= columns - rows + r for c in range(columns)] for r in range(rows)], dtype=torch.bool)
    mask = mask.reshape(rows, columns)
    return attention(q, k, v, mask)[0]


class Stack:
    """A whole model: prefill a document, then extend it token by token, with every block's cache at hand."""

    def __init__(self, model: Any, plan: ContextPlan, score: Score) -> None:
        self.model, self.plan, self.score = model, plan, score
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        """By layer: all blocks in the document's order, then what followed."""
        self.hidden: list[Tensor] = []
        """Last hidden states of [anchor, blocks …, running query]."""
        self.kept: list[list[Tensor]] = []

    @torch.no_grad()
    def prefill(self, document: Tensor, query: Tensor) -> None:
        """Run all streams through the model, each layer as `layer` attends."""
        plan, s = self.plan, min(self.plan.query_offset, self.plan.anchor)
        runs = query if plan.query_in == "prefill" else query[:, :0]
        inside = query if plan.query_in == "anchor" else query[:, :0]
        anchor = torch.cat((document[:, :s], inside, document[:, s : plan.anchor]), dim=1)
        anchor = anchor if plan.anchor else document[:, :0]
        spans = blocks_of(plan)
        streams = [anchor, *(document[:, start:stop] for _, start, stop in spans), runs]
        places = [torch.arange(anchor.shape[1]), *(torch.arange(start, stop) for _, start, stop in spans)]
        places.append(torch.arange(plan.tokens, plan.tokens + runs.shape[1]))
        hidden = [self.model.model.embed_tokens(ids) for ids in streams]
        for module in self.model.model.layers:
            rows = [self._project(module, x, place) for x, place in zip(hidden, places, strict=True)]
            wq, wk, wv = (torch.cat([r[i] for r in rows[not plan.shared_prefix : -1]], dim=2) for i in range(3))
            whole = (wq, wk, wv)
            result = layer(plan, rows[0], whole, rows[-1], self.score)
            outs = [result.anchor, *result.blocks, result.query]
            hidden = [self._finish(module, x, out) for x, out in zip(hidden, outs, strict=True)]
            self.keys.append(torch.cat((whole[1], rows[-1][1]), dim=2))
            self.values.append(torch.cat((whole[2], rows[-1][2]), dim=2))
            self.kept.append(result.kept)
        self.hidden = [self.model.model.norm(x) for x in hidden]

    @torch.no_grad()
    def extend(self, ids: Tensor) -> Tensor:
        """Run new tokens against everything cached; return the logits after the last one."""
        start = self.keys[0].shape[2]
        hidden = self.model.model.embed_tokens(ids)
        for i, module in enumerate(self.model.model.layers):
            q, k, v = self._project(module, hidden, torch.arange(start, start + ids.shape[1]))
            self.keys[i] = torch.cat((self.keys[i], k), dim=2)
            self.values[i] = torch.cat((self.values[i], v), dim=2)
            hidden = self._finish(module, hidden, causal(q, self.keys[i], self.values[i]))
        return self.model.lm_head(self.model.model.norm(hidden)[:, -1])

    def host_cache(self, i: int, rank: int) -> tuple[Tensor, Tensor]:
        """Return layer i's keys and values that belong on one host: its blocks; on the last one's, what followed."""
        spans = [(start, stop) for owner, start, stop in blocks_of(self.plan) if owner == rank]
        if self.plan.shared_prefix:
            spans += [(row, row + 1) for row in share_of(self.plan.anchor, self.plan.hosts, rank)]
        if rank == blocks_of(self.plan)[-1][0]:
            spans.append((self.plan.tokens, self.keys[i].shape[2]))
        k, v = (torch.cat([x[i][:, :, start:stop] for start, stop in spans], dim=2) for x in (self.keys, self.values))
        return k, v

    def host_hidden(self, rank: int) -> Tensor:
        """Return the last hidden states of the rows that one host runs."""
        mine = [self.hidden[0][:, anchor_rows_of(self.plan, rank)]]
        mine += [x for x, (owner, _, _) in zip(self.hidden[1:-1], blocks_of(self.plan), strict=True) if owner == rank]
        return torch.cat([*mine, self.hidden[-1]], dim=1)

    def _project(self, module: Any, hidden: Tensor, place: Tensor) -> Rows:
        attn, x = module.self_attn, module.input_layernorm(hidden)
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b n h d", d=attn.head_dim)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k, v = (rearrange(y, "b n h d -> b h n d") for y in (q, k, v))
        cos, sin = self.model.model.rotary_emb(x, place[None])
        q, k = sys.modules[type(self.model).__module__].apply_rotary_pos_emb(q, k, cos, sin)
        return q, k, v

    def _finish(self, module: Any, hidden: Tensor, out: Tensor) -> Tensor:
        out = rearrange(out.to(hidden.dtype), "b h n d -> b n (h d)")
        hidden = hidden + module.self_attn.o_proj(out)
        return hidden + module.mlp(module.post_attention_layernorm(hidden))


class DocumentStack(Stack):
    """A whole model under a mask over the document: what Star, APE and exact attention come to, on any hosts.

    Args:
        model: the model.
        mask: which document token sees which, `[tokens, tokens]`.
        place: position of each document token.
        next_place: position of what follows the document.
        ask: (q, k, v) → out, how later rows attend to all keys, the document's and then their own; None: causally.
    """

    def __init__(
        self,
        model: Any,
        mask: Tensor,
        *,
        place: Tensor,
        next_place: int,
        ask: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.mask, self.place, self.next_place, self.ask = model, mask, place, next_place, ask or causal
        self.keys, self.values, self.hidden = [], [], []

    @torch.no_grad()
    def prefill(self, document: Tensor, query: Tensor | None = None) -> None:
        """Run the document through the model, all of it at once; the query comes later."""
        hidden = self.model.model.embed_tokens(document)
        for module in self.model.model.layers:
            q, k, v = self._project(module, hidden, self.place)
            self.keys.append(k)
            self.values.append(v)
            hidden = self._finish(module, hidden, attention(q, k, v, self.mask)[0])
        self.hidden = [self.model.model.norm(hidden)]

    @torch.no_grad()
    def extend(self, ids: Tensor) -> Tensor:
        """Run new tokens against everything cached; return the logits after the last one."""
        place = torch.arange(self.next_place, self.next_place + ids.shape[1])
        self.next_place += ids.shape[1]
        hidden = self.model.model.embed_tokens(ids)
        for i, module in enumerate(self.model.model.layers):
            q, k, v = self._project(module, hidden, place)
            self.keys[i] = torch.cat((self.keys[i], k), dim=2)
            self.values[i] = torch.cat((self.values[i], v), dim=2)
            hidden = self._finish(module, hidden, self.ask(q, self.keys[i], self.values[i]))
        return self.model.lm_head(self.model.model.norm(hidden)[:, -1])
