"""A host without its group gets what it would get, but for the values; it sends nothing, and counts all the same."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefill_cases import SPREAD, contender, decoder, prefill_and_ask

from apb.parallel import LoneHost, run_threads


def watched(host, model, method, plan):
    """Run a share; return the shapes that each collective brought, and the counts."""
    brought = []

    def watch(start):
        def started(*args):
            finish = start(*args)

            def finished():
                found = finish()
                brought.append([(tuple(x.shape), x.dtype, x.device) for x in found])
                assert not any(x.isnan().any() for x in found)
                return found

            return finished

        return started

    host._start_all_gather = watch(host._start_all_gather)
    host._start_all_to_all = watch(host._start_all_to_all)
    logits = prefill_and_ask(host, model, method, plan)
    assert logits.isfinite().all()
    return brought, host.counters


@pytest.mark.parametrize("hosts", [2, 3])
@pytest.mark.parametrize("name", SPREAD)
def test_alone_a_host_gets_what_it_gets_among_others(name, hosts):
    model = decoder()
    method, plan = contender(name, 821, hosts, model)  # uneven blocks, and heads that 3 hosts do not divide
    among = run_threads(hosts, watched, model, method, plan)
    for rank, expected in enumerate(among):
        assert watched(LoneHost(rank, hosts), model, method, plan) == expected


@given(
    world=st.integers(2, 4),
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_the_others_bring_noise_that_is_drawn_once(world, sizes, dtype):
    host = LoneHost(world - 1, world)
    parts = [torch.full(size, 1e3).to(dtype) for size in sizes[:world]]
    shapes = [*sizes[1:world], sizes[world - 1]]

    def check(found, expected, own=None):
        assert [tuple(x.shape) for x in found] == [tuple(shape) for shape in expected]
        for rank, x in enumerate(found):
            assert x.dtype == dtype
            assert torch.equal(x, own) if rank == host.rank else (x.double().abs() < 900).all()

    for part, other in zip(parts, shapes, strict=True):
        check([host.exchange(part, to=0, source=0, shape=other, what="x").wait()], [other])
        found = host.all_gather(part, what="y").wait()
        check(found, [part.shape] * world, part)
        again = host.all_gather(part, what="y").wait()
        assert all(one is other for one, other in zip(found, again, strict=True))
    check(host.all_to_all(parts, shapes=shapes, what="z").wait(), shapes, parts[-1])
    drawn = {*shapes, *(tuple(part.shape) for part in parts)}
    assert host.noise_bytes == sum(math.prod(shape) for shape in drawn) * dtype.itemsize
    sent = sum(part.numel() for part in parts) * dtype.itemsize
    assert host.counters.sent_bytes == {
        "x": sent,
        "y": 2 * (world - 1) * sent,
        "z": sent - parts[-1].numel() * dtype.itemsize,
    }


@pytest.mark.parametrize("name", ["apb", "apb-balanced"])
def test_the_last_host_attends_to_no_zeros(name):
    """It has nothing to pass on, and sends padding; what it receives is what costs power to compute with."""
    model, host, received = decoder(), LoneHost(3, 4), []
    start = host._start_all_gather

    def watch(x, what):
        finish = start(x, what)
        return lambda: received.append((x, finish())) or received[-1][1]

    host._start_all_gather = watch
    prefill_and_ask(host, model, *contender(name, 1021, 4, model))
    assert received
    for x, found in received:
        for rank, part in enumerate(found):
            assert part is x if rank == 3 else part.flatten(0, -2).abs().sum(dim=-1).min() > 0


def test_objects_and_agreement():
    host = LoneHost(1, 3, "cpu")
    assert host.all_gather_object({"a": (1, 2)}, what="o") == [{"a": [1, 2]}] * 3
    host.agree("plan", what="plan")
    with pytest.raises(ZeroDivisionError), host.together("step"):
        _ = 1 // 0
    host.announce(ValueError("nobody hears it"))


def test_a_group_of_one_is_a_whole_group():
    host = LoneHost(0, 1)
    x = torch.arange(3)
    assert torch.equal(host.all_gather(x, what="x").wait()[0], x)
    assert torch.equal(host.exchange(x, to=0, source=0, what="x").wait(), x)
    assert host.counters.sent_bytes == {"x": 0}


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_errors(rank, world):
    with pytest.raises(ValueError, match=f"rank: expected 0 to {world - 1} in a group of {world}, got {rank}"):
        LoneHost(rank, world)
