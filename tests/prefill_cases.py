"""Small cases of the prefill benchmark that several test files run."""

from dataclasses import replace

import torch

from apb.bench.prefill.layer import Decoder
from apb.bench.prefill.methods import PRESETS, QUERY_TOKENS, line_up
from apb.bench.prefill.shapes import SHAPES
from apb.bench.prefill.share import Share
from apb.context import Trace

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def decoder(dtype=torch.float32, **changes):
    """Return a tiny decoder."""
    return Decoder(replace(TINY, bytes_per_value=dtype.itemsize, **changes), CPU, dtype)


def contender(name, tokens, hosts, model, **changes):
    """Return a preset's method, prepared, and its plan."""
    (found,) = line_up([name], tokens, hosts)
    method = replace(found.make(), **changes)
    plan = method.plan(tokens=tokens, hosts=found.hosts, query=QUERY_TOKENS)
    return method.prepare(model.shape, model.device, model.dtype), plan


def prefill_and_ask(host, model, method, plan):
    """Run one host's share with all layers; return the first logits."""
    share = Share(model, method, plan, host, caches=model.shape.layers)
    traces = [Trace()] * model.shape.layers
    share.prefill(traces).check()
    return share.ask(traces)


SPREAD = [name for name in PRESETS if name not in ("flash", "minference")]
"""Presets that split the document."""
