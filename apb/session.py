"""One host's share of a question about a document: prefill once, then ask and decode.

A `Session` runs the model over this host's rows, keeps this host's keys and values, and answers from all hosts'
caches.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apb.compress.compressor import Projections
from apb.compress.nan import NanWatch
from apb.context import Context, Trace
from apb.digest import digest
from apb.hf import IMPLEMENTATION, model_shape, register, run_layers
from apb.methods import Method
from apb.parallel.host import Host
from apb.plan import ContextPlan
from apb.projections import capture_projections

__all__ = ["Session"]

_SPARE_TOKENS = 256


class Session:
    """One host's share of one document: prefill it once, then ask and decode.

    Every host makes its own session with the same arguments and calls the same methods in the same order.

        session = Session(model, method, plan, host)
        session.prefill(document, query)        # [batch, tokens], [batch, query]
        logits = session.extend(query)          # [batch, vocab], the same on every host
        logits = session.extend(next_token)     # and so on, a token at a time
        session.rewind()                        # back to the document alone: ask another question

    Args:
        model: a causal language model with plain causal attention; put into the "apb" implementation.
        method: how to attend to the document.
        plan: how the document is split; the same on every host.
        host: this member of the group.
        trace: where to note times and kept indices.
        on_layer: called with (layers done, layers in all) during the prefill.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        plan: ContextPlan,
        host: Host,
        *,
        trace: Trace | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> None:
        plan.check_group(host.world_size)
        _check_rope(model.config, plan)
        register()
        model.set_attn_implementation(IMPLEMENTATION)
        self.model, self.method, self.plan, self.host = model, method, plan, host
        self.trace = trace or Trace()
        self.on_layer = on_layer or (lambda done, total: None)
        self.tokens = 0
        """The next position: what has been run, on all hosts together (fewer where positions are reused)."""
        self.document_end = 0
        """The position after the document."""
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        """This host's cache by layer, `[batch, kv_heads, tokens, dim]`: its blocks, and on the owner what follows."""
        self._prefilling = False
        self._broken = False
        self._projections: dict[tuple[int, str], Tensor] = {}
        self._watch = NanWatch()
        self._spare: dict[tuple[int, str], Tensor] = {}

    @torch.inference_mode()
    def prefill(
        self, document: Int[Tensor, "batch tokens"], query: Int[Tensor, "batch query"], *, agreed: bool = False
    ) -> Float[Tensor, "batch rows hidden"]:
        """Run this host's rows through the model's layers and keep its blocks' keys and values.

        Args:
            document: the whole document's token ids; every host takes its own rows.
            query: the question's token ids, as many as the plan has; `[batch, 0]` with a query-free plan.
            agreed: the hosts have compared plan, method and tokens already.

        Returns:
            The last hidden states of this host's rows (never logits).

        Raises:
            ValueError: shapes or lengths that are not the plan's.
            PlanMismatch: the hosts came with different plans, methods or tokens; raised on every host.
            HostFailed: another host failed.
        """
        if self.tokens:
            raise ValueError("prefill: this session holds a document already; make a new Session for another one")
        for name, ids in (("document", document), ("query", query)):
            if ids.ndim != 2 or ids.is_floating_point() or len(ids) != len(document):
                raise ValueError(
                    f"{name}: expected integer ids [batch, tokens] of one batch, got {ids.dtype} {tuple(ids.shape)}"
                )
        if not agreed:
            self.host.agree((self.plan, self.method, digest(document, query)), what="plan")
        share = self.plan.host(self.host.rank)
        ids = self.plan.host_rows(self.host.rank, document, query).to(self.host.device)
        positions = self.plan.positions(self.host.rank)
        reads = "projections" in self.method.needs
        with self._whole_or_broken(), capture_projections(self.model, self._projections) if reads else nullcontext():
            self._prefilling = True
            hidden = run_layers(self.model, ids, positions, self) if share.rows else self._keep_up(len(ids))
            self._prefilling = False
            self._watch.check()
        self.document_end = self.plan.next_position
        self.tokens = self.document_end + share.query_rows
        return hidden

    @torch.inference_mode()
    def extend(
        self, ids: Int[Tensor, "batch rows"], *, every_row: bool = False
    ) -> Float[Tensor, "batch vocab"] | Float[Tensor, "batch rows vocab"]:
        """Run new tokens, the same on every host, against all hosts' caches; return the logits after the last one.

        Args:
            ids: the question, or the token chosen last; they take the next positions after what has been run.
            every_row: return the logits after each of them.

        Raises:
            ValueError: no tokens, or nothing prefilled yet.
            HostFailed: another host failed.
        """
        if not self.tokens:
            raise ValueError("extend: nothing has been prefilled; call prefill(document, query) first")
        batch = len(self.keys[0])
        if ids.ndim != 2 or len(ids) != batch or ids.shape[1] == 0:
            raise ValueError(f"ids: expected [batch, rows] = [{batch}, at least 1 token], got {tuple(ids.shape)}")
        positions = torch.arange(self.tokens, self.tokens + ids.shape[-1])
        with self._whole_or_broken():
            hidden = run_layers(self.model, ids.to(self.host.device), positions, self)
        self.tokens += ids.shape[-1]
        return self.logits(hidden if every_row else hidden[:, -1])

    def rewind(self, tokens: int | None = None) -> None:
        """Forget what was run from position `tokens` on; by default everything behind the document.

        Only the owner holds keys of what follows the document, so nothing is sent.

        Raises:
            ValueError: a position inside the document, or one that has not been reached.
        """
        tokens = self.document_end if tokens is None else tokens
        if not self.document_end <= tokens <= self.tokens:
            span = f"{self.document_end} (the document's end) to {self.tokens}"
            raise ValueError(f"tokens: expected {span}, got {tokens}")
        if self.host.rank == self.plan.owner:
            for cache in (self.keys, self.values):
                for layer, held in cache.items():
                    cache[layer] = held[:, :, : held.shape[2] - (self.tokens - tokens)]
        self.tokens = tokens

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Apply the model's output embedding to last hidden states."""
        return self.model.get_output_embeddings()(hidden)

    @classmethod
    def join(cls, sessions: Sequence["Session"], plan: ContextPlan, host: Host) -> "Session":
        """Bring the caches of a group's sessions together on one host, which then answers as all of them would.

        Merging partial attentions is exact, so the answers are the same, without the group's messages. The sessions
        give up their caches.

        Args:
            sessions: every host's, prefilled, all in this process and on one device.
            plan: the same method's plan for the same document on one host.
            host: a group of one.
        """
        first, owner = sessions[0], sessions[0].plan.owner
        session = cls(first.model, first.method, plan, host)
        session.tokens, session.document_end = first.tokens, first.document_end
        ordered = [part for part in sessions if part.host.rank != owner] + [sessions[owner]]  # its keys go on growing
        for layer in range(model_shape(first.model.config).layers):
            session.keys[layer] = torch.cat([part.keys.pop(layer) for part in ordered], dim=2)
            session.values[layer] = torch.cat([part.values.pop(layer) for part in ordered], dim=2)
            for part in ordered:
                for name in "kv":
                    part._spare.pop((layer, name))
        return session

    @contextmanager
    def _whole_or_broken(self) -> Generator[None]:
        """Refuse further calls once one has failed half-way: some layers' caches would have its tokens, some not."""
        if self._broken:
            raise ValueError("session: an earlier call failed half-way and left its caches so; make a new Session")
        self._broken = True
        yield
        self._broken = False

    def _keep_up(self, batch: int) -> Tensor:
        """Take part in every layer's messages without a row: there are more hosts than tokens."""
        config, dtype = self.model.config, self.model.dtype
        shape = model_shape(config)
        q, k = (torch.empty(batch, h, 0, shape.head_dim, dtype=dtype, device=self.host.device)
                for h in (shape.heads, shape.kv_heads))  # fmt: skip
        scales = {
            module.layer_idx: getattr(module, "scaling", None)
            for module in self.model.modules()
            if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "o_proj")
        }
        for layer in range(shape.layers):
            for name, x in zip("qkv", (q, k, k), strict=True):
                self._projections[layer, name] = x
            self.attend(layer, q, k, k, scales.get(layer))  # with Ulysses it attends for other hosts' rows
        return torch.empty(batch, 0, shape.hidden, dtype=dtype, device=self.host.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attend in one layer for the model that runs: in a prefill as the method does, else to all hosts' caches."""
        share, owns = self.plan.host(self.host.rank), self.host.rank == self.plan.owner
        if self._prefilling:
            found = {name: self._projections.pop((layer, name)) for name in "qkv" if (layer, name) in self._projections}
            projections = Projections(**found) if found else None
            context = Context(self.plan, self.host, layer, scale, projections, self.trace, watch=self._watch)
            out = self.method.attend(q, k, v, context)
            query = slice(share.rows - share.query_rows, share.rows)
            kept = [*share.held_spans, query] if owns else share.held_spans
            for rows in kept:
                self._append(layer, k[:, :, rows], v[:, :, rows], room=share.rows)
            self.on_layer(layer + 1, self.model.config.num_hidden_layers)
            return out
        if owns:
            self._append(layer, k, v)
        context = Context(self.plan, self.host, layer, scale, trace=self.trace)
        return self.method.decode(q, self.keys[layer], self.values[layer], context)

    def _append(self, layer: int, k: Tensor, v: Tensor, room: int = 0) -> None:
        """Put new keys and values behind the cached ones, in room made for `room` tokens and a few hundred more."""
        for name, cache, new in (("k", self.keys, k), ("v", self.values, v)):
            start = cache[layer].shape[2] if layer in cache else 0
            stop = start + new.shape[2]
            spare = self._spare.get((layer, name))
            if spare is None or spare.shape[2] < stop:
                spare = new.new_empty(*new.shape[:2], max(room, stop) + _SPARE_TOKENS, new.shape[3])
                if start:
                    spare[:, :, :start] = cache[layer]
                self._spare[layer, name] = spare
            spare[:, :, start:stop] = new
            cache[layer] = spare[:, :, :stop]


def _check_rope(config: Any, plan: ContextPlan) -> None:
    """Refuse rotations that depend on the longest position a host sees: hosts would rotate their keys apart."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type")
    if plan.hosts > 1 and kind in ("dynamic", "longrope"):
        raise ValueError(
            f"model: its RoPE of type {kind!r} depends on the length that each host sees, so the hosts' keys would not "
            f"fit together; use one host, or a model with a fixed RoPE (default, linear, llama3, yarn)"
        )
