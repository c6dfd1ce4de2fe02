"""One host's share of a benchmarked prefill: its rows through the layers, its caches, and the question's pass."""

import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from apb.bench.prefill.layer import Decoder
from apb.compress.compressor import Projections
from apb.compress.nan import NanWatch
from apb.context import Context, Trace
from apb.methods import Method
from apb.parallel.host import Host
from apb.plan import ContextPlan

__all__ = ["Share"]


class Share:
    """What `apb.session.Session` is for a Hugging Face model, for a decoder whose layers are one.

    The caches are there from the first: what fits here fits.

    Args:
        decoder: the model.
        method: prepared for it.
        plan: how the document is split.
        host: this member of the group.
        caches: how many layers keep their keys and values; further layers overwrite them in turn.
        seed: starts the draw of the document's tokens; the same on every host.

    Attributes:
        queued_ms: the least time that Python took to queue a layer of the last prefill.
    """

    def __init__(
        self, decoder: Decoder, method: Method, plan: ContextPlan, host: Host, *, caches: int, seed: int = 0
    ) -> None:
        self.decoder, self.method, self.plan, self.host = decoder, method, plan, host
        self._share, self._owns = plan.host(host.rank), host.rank == plan.owner
        generator, shape = torch.Generator().manual_seed(seed), decoder.shape
        self.document = torch.randint(shape.vocab, (plan.tokens,), generator=generator)
        self.query = torch.randint(shape.vocab, (plan.query,), generator=generator)
        # On the device before anything is timed: a copy to it waits until the device has done all it was given.
        rows, asked = plan.host_rows(host.rank, self.document, self.query), torch.arange(plan.query)
        self._rows, self._positions = rows.to(decoder.device), plan.positions(host.rank).to(decoder.device)
        self._asked, self._asked_positions = (x.to(decoder.device) for x in (self.query, asked + plan.next_position))
        room = self._share.held_rows + (plan.query if self._owns else 0)
        sizes = (caches, 2, 1, shape.kv_heads, room, shape.head_dim)
        self._caches = [tuple(cache) for cache in torch.empty(sizes, dtype=decoder.dtype, device=decoder.device)]
        self._last: Tensor | None = None
        self.queued_ms = math.inf

    @torch.inference_mode()
    def prefill(self, traces: Sequence[Trace]) -> NanWatch:
        """Run this host's rows through as many layers as there are traces, each noting the layer's phases in its own.

        Returns:
            What to ask whether the method's scores were NaN; asking waits for the device, and this does not.

        Raises:
            HostFailed: another host failed.
        """
        watch = NanWatch()
        needs = "projections" in self.method.needs
        x, rope = self.decoder.embed(self._rows), self.decoder.rope(self._positions)
        self.queued_ms = math.inf
        for number, trace in enumerate(traces):
            attend = partial(self._attend, number, trace, watch)
            began = time.perf_counter()
            with trace.phase("layer"):
                self.decoder.layer(x, rope, attend, trace, projections=needs)
            # The least, since Python waits, too, once it has queued as much as the device takes.
            self.queued_ms = min(self.queued_ms, 1e3 * (time.perf_counter() - began))
        self._last = x[-1:].clone() if self._share.query_rows else None
        return watch

    @torch.inference_mode()
    def ask(self, traces: Sequence[Trace]) -> Tensor:
        """Run the question against all hosts' caches, unless it has run along; return the first logits `[1, vocab]`.

        Args:
            traces: one for each layer.

        Raises:
            HostFailed: another host failed.
        """
        if self._last is not None:
            return self.decoder.logits(self._last)
        x, rope = self.decoder.embed(self._asked), self.decoder.rope(self._asked_positions)
        for number, trace in enumerate(traces):
            with trace.phase("layer"):
                self.decoder.layer(x, rope, partial(self._decode, number, trace), trace)
        return self.decoder.logits(x[-1:])

    def _attend(
        self, number: int, trace: Trace, watch: NanWatch, q: Tensor, k: Tensor, v: Tensor, before: Projections | None
    ) -> Tensor:
        """Attend as the method does, and put the rows that stay here into the layer's cache."""
        layer, share = number % self.decoder.shape.layers, self._share
        context = Context(self.plan, self.host, layer, projections=before, trace=trace, watch=watch)
        out = self.method.attend(q, k, v, context)
        query = slice(share.rows - share.query_rows, share.rows)  # a running question's: behind them, on the owner
        for cache, rows in zip(self._caches[number % len(self._caches)], (k, v), strict=True):
            start = 0
            for span in [*share.held_spans, query] if self._owns else share.held_spans:
                stop = start + span.stop - span.start
                cache[:, :, start:stop] = rows[:, :, span]
                start = stop
        return out

    def _decode(self, number: int, trace: Trace, q: Tensor, k: Tensor, v: Tensor, before: Projections | None) -> Tensor:
        """Let the question attend to all hosts' caches; its own keys belong to the owner."""
        cache = self._caches[number % len(self._caches)]
        if self._owns:
            for held, new in zip(cache, (k, v), strict=True):
                held[:, :, self._share.held_rows :] = new
        layer = number % self.decoder.shape.layers
        return self.method.decode(q, *cache, Context(self.plan, self.host, layer, trace=trace))
