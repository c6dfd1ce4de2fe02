"""APB and Spava as users set them up, and one layer of them on raw tensors and real hosts."""

import torch
from hypothesis import example
from hypothesis import strategies as st

from apb.compress import KeyNorm, QueryAware
from apb.context import Context, Trace
from apb.methods import APB, Spava
from apb.parallel import run_threads
from apb.reference import apb_mask, attention
from apb.testing import oracle
from apb.testing.strategies import host_rows, plan_arguments


@st.composite
def methods_and_plans(draw, compressor=None, spava=False, **limits):
    """Draw a method as a user would set it up, and the plan that it makes; Spava too, if told."""
    arguments = draw(plan_arguments(**limits))
    where = {name: arguments.pop(name) for name in ("anchor", "passing", "query_in", "layout", "split_anchor")}
    del arguments["anchor_on_first"]
    readable = arguments["query"] and (where["anchor"] or where["query_in"] == "prefill")
    make = Spava if spava and where["query_in"] == "prefill" and draw(st.booleans()) else APB
    method = make(compressor=compressor or (QueryAware() if readable else KeyNorm()), **where)
    return method, method.plan(**arguments)


def also_rich(spava=False, **others):
    """Try, before all drawn cases, one that has everything: uneven blocks, an anchor, a late query, tokens passed."""

    def decorate(test):
        for query_in in ("anchor", "prefill"):
            for layout, split in (("contiguous", False), ("zigzag", False), ("contiguous", True), ("zigzag", True)):
                for make in (APB, Spava) if query_in == "prefill" and spava else (APB,):
                    method = make(anchor=3, passing=4, query_in=query_in, layout=layout, split_anchor=split)
                    case = method, method.plan(tokens=57, hosts=3, query=3, query_offset=2)
                    test = example(case=case, seed=1, **others)(test)
        return test

    return decorate


def attend(host, method, plan, streams, keep_indices=False, scale=None):
    trace = Trace(keep_indices=keep_indices)
    q, k, v = (host_rows(plan, host.rank, streams, i) for i in range(3))
    return method.attend(q, k, v, Context(plan, host, scale=scale, trace=trace)), trace.kept


def run(method, plan, streams, runner=run_threads, **options):
    """Return the document's rows in order, and the anchor's and the running query's rows by host."""
    body = lambda host: attend(host, method, plan, streams, **options)[0]  # noqa: E731
    outs = runner(plan.hosts, body)
    mine = list(zip(outs, plan.host_plans, strict=True))
    held = [torch.cat([out[:, :, span] for span in share.held_spans], dim=2) for out, share in mine]
    anchors = [out[:, :, : share.anchor_rows] for out, share in mine]
    return plan.join(held, dim=2), anchors, [out[:, :, share.rows - share.query_rows :] for out, share in mine]


def causal(q, k, v):
    return attention(q, k, v, apb_mask(q.shape[2], k.shape[2], 0, 0))[0]


def naive_score(method):
    return oracle.query_aware if isinstance(method.compressor, QueryAware) else oracle.key_norm
