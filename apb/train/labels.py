"""What a head sees of each document token and what it should say: one pass of the frozen model, attending exactly."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from apb.compress.compressor import Candidates
from apb.compress.query_aware import QueryAware
from apb.costs import ModelShape
from apb.hf import IMPLEMENTATION, model_shape, register, run_layers
from apb.projections import capture_projections
from apb.train.examples import Example
from apb.train.settings import SeenIn

__all__ = ["Observed", "answer_logits", "observe"]

_ANSWER_ROWS = 64  # whose logits are held at once


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One example as the heads are trained on it; only the document's tokens, in the document's order.

    Attributes:
        features: concat(q, k, v) before RoPE, in the model's dtype.
        labels: float32, see `answer_logits`.
        query_aware: what the training-free compressor would say, if asked for.
    """

    features: Float[Tensor, "layers tokens inputs"]
    labels: Float[Tensor, "layers kv_heads tokens"]
    query_aware: Float[Tensor, "layers kv_heads tokens"] | None = None


def answer_logits(
    q: Float[Tensor, "q_heads answer dim"], k: Float[Tensor, "kv_heads tokens dim"], scale: float
) -> Float[Tensor, "kv_heads tokens"]:
    """Return label(t) = max over the answer's tokens i and the group's query heads of scale · q_i · k_t (Locret).

    Args:
        q: the answer tokens' queries, after RoPE.
        k: the document tokens' keys, after RoPE.
        scale: the attention's factor on q · k.
    """
    q = rearrange(q.float(), "(h g) a d -> h (g a) d", h=len(k))
    keys = k.float().mT
    best = [torch.bmm(rows, keys).amax(dim=1) for rows in q.split(_ANSWER_ROWS, dim=1)]
    return torch.stack(best).amax(dim=0) * scale


@torch.no_grad()
def observe(model: Any, example: Example, query_in: SeenIn, *, reference: bool = False) -> Observed:
    """Run the frozen model once over the example, and note features and labels of the document's tokens.

    The rows are [document, query, suffix, answer] at consecutive positions under causal attention; with
    `query_in="anchor"` a copy of the query stands behind the document's prefix, so that what follows has seen it.

    Args:
        model: a causal language model with plain causal attention; put into the "apb" implementation.
        example: document, question and answer, of batch 1.
        query_in: whether the document's tokens have seen the question.
        reference: also note the scores of `QueryAware`.

    Raises:
        ValueError: more rows than the model has positions, or an example without document, query or answer.
    """
    prompt, answer = example.prompt, example.answer
    for name, part in (("document", prompt.document), ("query", prompt.query), ("answer", answer)):
        if part.ndim != 2 or len(part) != 1 or part.shape[1] == 0:
            raise ValueError(f"{name}: expected ids [1, at least 1 token], got shape {tuple(part.shape)}")
    tokens, embedded = prompt.document.shape[1], prompt.query.shape[1] if query_in == "anchor" else 0
    prefix = prompt.prefix_tokens if embedded else 0
    head, rest = prompt.document[:, :prefix], prompt.document[:, prefix:]
    ids = torch.cat((head, prompt.query[:, :embedded], rest, prompt.query, prompt.suffix, answer), dim=1)
    positions = getattr(model.config, "max_position_embeddings", ids.shape[1])
    if ids.shape[1] > positions:
        raise ValueError(
            f"length: {example.name} with its question and answer has {ids.shape[1]} tokens, but the model "
            f"{positions} positions; take shorter lengths"
        )
    if model.config._attn_implementation != IMPLEMENTATION:
        register()
        model.set_attn_implementation(IMPLEMENTATION)
    query_start = prefix if embedded else tokens
    watcher = _Watcher(
        model_shape(model.config),
        parts=(slice(0, prefix), slice(prefix + embedded, tokens + embedded)),
        query=slice(query_start, query_start + prompt.query.shape[1]) if reference else None,
        answer=answer.shape[1],
    )
    with capture_projections(model, watcher.projections):
        run_layers(model, ids.to(model.device), torch.arange(ids.shape[1]), watcher)
    assert watcher.features is not None
    return Observed(
        features=watcher.features,
        labels=torch.stack(watcher.labels),
        query_aware=torch.stack(watcher.query_aware) if reference else None,
    )


class _Watcher:
    """Exact causal attention that notes features and labels on the way."""

    def __init__(self, shape: ModelShape, *, parts: tuple[slice, slice], query: slice | None, answer: int) -> None:
        self.shape, self.parts, self.query, self.answer = shape, parts, query, answer
        self.projections: dict[tuple[int, str], Tensor] = {}
        self.features: Tensor | None = None
        self.labels: list[Tensor] = []
        self.query_aware: list[Tensor] = []

    def _document(self, x: Tensor) -> Tensor:
        """Take the document's rows, `[heads, rows, dim]`."""
        return torch.cat([x[0, :, rows] for rows in self.parts], dim=1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attend causally; the layers come in order."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        seen = [self._document(self.projections.pop((layer, name))) for name in "qkv"]
        parts = [rearrange(x, "h n d -> n (h d)") for x in seen]
        if self.features is None:  # allocated whole: with many layers it is most of the memory
            self.features = q.new_empty(self.shape.layers, len(parts[0]), sum(part.shape[1] for part in parts))
        torch.cat(parts, dim=-1, out=self.features[layer])
        keys = self._document(k)
        self.labels.append(answer_logits(q[0, :, -self.answer :], keys, scale))
        if self.query is not None:
            candidates = Candidates(q=q[:, :, :0], k=keys[None], v=keys[None], query=q[:, :, self.query])
            self.query_aware.append(QueryAware().score(candidates)[0])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
