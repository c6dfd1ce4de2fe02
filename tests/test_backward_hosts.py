"""Gradients across hosts: every host's equal those of one process that builds all attention by hand."""

from dataclasses import replace

import pytest
import torch
from attention_cases import draw_inputs
from gradient_cases import assert_gradients, draw_grads
from hypothesis import given, settings
from hypothesis import strategies as st

from apb.attend import masked_attention
from apb.compress import KeyNorm
from apb.context import Context
from apb.methods import APB, APE, Ring, Star, Ulysses
from apb.parallel import run_processes, run_simulated, run_threads
from apb.parallel.gradient import all_gather
from apb.parallel.passing import PassingBlocks
from apb.plan import plan_context
from apb.reference import apb_mask, attention
from apb.testing.oracle import key_norm, layer
from apb.testing.strategies import LAYOUTS, SEEDS, document_rows

METHOD = APB(anchor=3, passing=4, compressor=KeyNorm(), query_in="after", backend="reference")


def draw_document(tokens, heads=(2, 2, 2), dim=16):
    """Draw q, k, v of a document, and a weight for each element of the output, in float64."""
    q, k, v = (x.double() for x in draw_inputs(0, heads, tokens, tokens, dim, torch.float32))
    return [q / 6, k, v, draw_grads(0, q)[0]]


def by_hosts(host, method, plan, document, layers=1):
    """Run this host's rows through `layers` of attention and back; return the gradients of its q, k and v."""
    rows = [document_rows(plan, host.rank, x).requires_grad_() for x in document[:3]]
    share, hidden = plan.host(host.rank), rows[0]
    for number in range(layers):  # each layer's keys follow from the one before, as in a model
        mixed = hidden[:, : rows[1].shape[1]] if number else 0
        hidden = method.attend(hidden, rows[1] + mixed, rows[2], Context(plan, host, layer=number))
    weight = document_rows(plan, host.rank, document[3])
    weight[:, :, : share.anchor_rows] = 0  # those rows are the first host's to count
    return torch.autograd.grad(hidden, rows, weight), dict(host.counters.messages)


def by_hand(plan, document):
    """Run the document through the oracle and back; return the gradients of each host's rows.

    A host's anchor rows are a copy, whose gradients are only its own: each host differentiates its outputs alone, with
    the other hosts' rows held still, but for what it passed on to them.
    """
    found = []
    for host in range(plan.hosts):
        leaves = [document_rows(plan, host, x).detach().requires_grad_() for x in document[:3]]
        found.append((leaves, loss_with(plan, document, host, leaves)))
    return [torch.autograd.grad(loss, leaves) for leaves, loss in found]


def loss_with(plan, document, host, leaves):
    """Return the sum of all hosts' losses where `host` holds `leaves` for its rows."""
    held = [[document_rows(plan, rank, x) for x in document[:3]] for rank in range(plan.hosts)]
    held[host] = leaves
    whole = [x[:, :, : plan.anchor] for x in document[:3]], [x for x in document[:3]]
    kept = layer(plan, *whole, [x[:, :, :0] for x in document[:3]], key_norm).kept
    spans = {block.index: (rank, span) for rank, share in enumerate(plan.host_plans)
             for block, span in zip(share.blocks, share.block_spans, strict=True)}  # fmt: skip
    loss = document[0].new_zeros(())
    for block in plan.blocks:
        rank, span = spans[block.index]
        q, k, v = (x[:, :, span] for x in held[rank])
        seen = plan.host(rank).anchor_rows if block.sees_anchor else 0
        passed = [[x[:, :, :0]] for x in held[rank][1:]]
        for earlier in plan.blocks[: block.index]:
            owner, rows = spans[earlier.index]
            where = (kept[earlier.index] - earlier.start)[..., None].expand(-1, -1, -1, k.shape[-1])
            for i in (0, 1):
                passed[i].append(held[owner][i + 1][:, :, rows].gather(2, where))
        keys, values = (torch.cat((held[rank][i + 1][:, :, :seen], *passed[i], (k, v)[i]), dim=2) for i in (0, 1))
        out, _ = attention(q, keys, values, apb_mask(q.shape[2], keys.shape[2], 0, keys.shape[2] - q.shape[2]))
        loss = loss + (out * document[3][:, :, block.start : block.stop]).sum()
    return loss


@given(seed=SEEDS, hosts=st.integers(1, 4), tokens=st.integers(1, 40), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=15)
def test_gradients_of_every_host_equal_those_by_hand(seed, hosts, tokens, layout):
    block = -(-tokens // (hosts * (2 if layout == "zigzag" else 1)))
    method = APB(anchor=min(3, block), passing=4, compressor=KeyNorm(), query_in="after", layout=layout,
                 backend="reference")  # fmt: skip
    plan, document = method.plan(tokens=tokens, hosts=hosts), draw_document(tokens, (1, 2, 2))
    expected = by_hand(plan, document)
    for (grads, _), wanted in zip(run_threads(hosts, by_hosts, method, plan, document), expected, strict=True):
        for x, y in zip(grads, wanted, strict=True):
            torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("run", [run_processes, run_simulated])
@pytest.mark.parametrize("hosts", [2, 3])
def test_every_kind_of_host_has_them(run, hosts):
    plan, document = METHOD.plan(tokens=31, hosts=hosts), draw_document(31)
    for (grads, messages), wanted in zip(
        run(hosts, by_hosts, METHOD, plan, document), by_hand(plan, document), strict=True
    ):
        assert messages == {"passing": 1, "passing gradient": 1}
        for x, y in zip(grads, wanted, strict=True):
            torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("run", [run_threads, run_processes])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_anchor_gets_what_all_its_copies_would(run, layout):
    plain = APB(anchor=5, passing=4, compressor=KeyNorm(), query_in="after", layout=layout, backend="reference")
    split, document = replace(plain, split_anchor=True), draw_document(37)
    plans = [method.plan(tokens=37, hosts=3) for method in (plain, split)]
    copies, shares = (
        [grads for grads, _ in run(3, by_hosts, method, plan, document)]
        for method, plan in zip((plain, split), plans, strict=True)
    )
    for i in range(3):
        whole = torch.zeros_like(document[i][:, :, :5])
        for grads, host in zip(copies, plans[0].host_plans, strict=True):
            whole[:, :, : host.anchor_rows] += grads[i][:, :, : host.anchor_rows]
        for mine, other, a, b in zip(copies, shares, plans[0].host_plans, plans[1].host_plans, strict=True):
            blocks = mine[i][:, :, a.anchor_rows :], other[i][:, :, b.anchor_rows :]
            torch.testing.assert_close(*blocks, atol=1e-10, rtol=1e-9)
            for start, stop in b.anchor_spans:
                got = other[i][:, :, b.anchor_slice(start, stop)]
                torch.testing.assert_close(got, whole[:, :, start:stop], atol=1e-10, rtol=1e-9)
        assert i == 0 or whole.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hosts_come_back_through_several_layers_in_one_order(layout):
    """Threads refuse to meet under different names or shapes, and hang where one does not come."""
    method = APB(anchor=3, passing=4, compressor=KeyNorm(), query_in="after", layout=layout, backend="reference")
    plan, document = method.plan(tokens=31, hosts=3), draw_document(31)
    threads = run_threads(3, by_hosts, method, plan, document, 3, timeout_s=20)
    processes = run_processes(3, by_hosts, method, plan, document, 3, timeout_s=20)
    gathers = 3 * plan.blocks_per_host
    for (grads, messages), (theirs, _) in zip(threads, processes, strict=True):
        assert messages == {"passing": gathers, "passing gradient": gathers}
        assert all(torch.equal(x, y) for x, y in zip(grads, theirs, strict=True))
    assert all(x.any() for x in threads[0][0])


def by_kernel(host, plan, document):
    """Attend with the kernel to what PassingBlocks yields, each block passing its first tokens; go back."""
    share, block = plan.host(host.rank), plan.host(host.rank).blocks[0]
    q, k, v, weight = (x.detach().clone() for x in document_rows_of_all(plan, host.rank, document))
    for x in (q, k, v):
        x.requires_grad_()
    passing = PassingBlocks(plan, host)
    span = share.block_spans[0]
    passing.start(0, torch.cat((k, v), dim=-1)[:, :, span][:, :, : block.kept_tokens])
    received = passing.wait(block)
    keys, values = (torch.cat((x, y[:, :, span]), dim=2) for x, y in zip(received, (k, v), strict=True))
    out, _ = masked_attention(q, keys, values, anchor_tokens=0, passing_tokens=received[0].shape[2], backend="triton")
    return torch.autograd.grad(out, (q, k, v), weight)


def document_rows_of_all(plan, rank, document):
    return [document_rows(plan, rank, x) for x in document]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs under the interpreter; see tests/gpu")
def test_the_kernels_gradients_reach_the_hosts_that_passed_the_keys():
    plan = plan_context(tokens=45, hosts=3, anchor=0, passing=7)
    document = [x.float() for x in draw_document(45, (1, 1, 2))]
    found = run_simulated(3, by_kernel, plan, document)
    q, k, v, weight = document
    row, column = torch.arange(45)[:, None], torch.arange(45)[None]
    mask = (column <= row) & ((row // 15 == column // 15) | (column % 15 < 7))
    whole = [torch.cat(parts, dim=2) for parts in zip(*found, strict=True)]
    assert_gradients(whole, q, k, v, mask, weight, torch.zeros(q.shape[:-1]))


def test_a_gather_yields_the_sum_of_what_the_hosts_make_of_it():
    def body(host):
        x = torch.full((2,), float(host.rank), dtype=torch.float64, requires_grad=True)
        first = all_gather(x, host, what="first")
        second = all_gather(x * x, host, what="second", after=first)
        parts = [10.0**host.rank * part for part in first.wait()]
        loss = sum(part.sum() for part in parts) + second.wait()[1].sum()
        return torch.autograd.grad(loss, x)[0].tolist()

    assert run_threads(3, body) == [[111.0] * 2, [117.0] * 2, [111.0] * 2]


@pytest.mark.parametrize("run", [run_threads, run_simulated])
def test_a_second_derivative_is_refused(run):
    """It would miss what the other hosts make of the tensor: wrong, and silently."""

    def body(host, create_graph):
        x = torch.full((2,), 1.0 + host.rank, dtype=torch.float64, requires_grad=True)
        loss = sum(part.square().sum() for part in all_gather(x * x, host, what="squares").wait())
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0].tolist()

    assert run(2, body, False) == [[2 * 4.0] * 2, [2 * 32.0] * 2]
    with pytest.raises(RuntimeError, match=r"'squares gradient'\): a gather is differentiable once"):
        run(2, body, True)


def test_without_a_gradient_nothing_changes():
    plan, document = METHOD.plan(tokens=31, hosts=3), draw_document(31)

    def body(host):
        rows = [document_rows(plan, host.rank, x) for x in document[:3]]
        with torch.no_grad():
            rows[0].requires_grad_()
            out = METHOD.attend(*rows, Context(plan, host))
        return out.requires_grad, dict(host.counters.messages)

    assert run_threads(3, body) == [(False, {"passing": 1})] * 3


@pytest.mark.parametrize("method", [Ring(), Ring(layout="zigzag"), Ulysses()])
def test_methods_whose_exchanges_have_no_gradient_say_so(method):
    plan = method.plan(tokens=12, hosts=2)

    def body(host):
        rows = [document_rows(plan, host.rank, x).requires_grad_() for x in draw_document(12)[:3]]
        method.attend(*rows, Context(plan, host))

    with pytest.raises(RuntimeError, match=r"has no backward pass here: .*, no backend has one here"):
        run_threads(2, body)


@pytest.mark.parametrize("method", [Star(), APE()])
def test_decoding_over_hosts_has_no_gradient_and_says_so(method):
    plan = method.plan(tokens=12, hosts=2)

    def body(host):
        q, k, v = (x.requires_grad_() for x in draw_document(12)[:3])
        method.decode(q[:, :, :1], k[:, :, :6], v[:, :, :6], Context(plan, host))

    with pytest.raises(RuntimeError, match="all hosts' caches has no gradient"):
        run_threads(2, body)
