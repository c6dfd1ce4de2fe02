"""What hosts send to single hosts, `exchange` and `all_to_all`: the same on every kind of host."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from apb.parallel import ProcessGroupHost, run_processes, run_simulated, run_threads

pytestmark = pytest.mark.timeout(60)

RUNNERS = {"threads": run_threads, "simulated": run_simulated, "gloo": run_processes}
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


@pytest.fixture(params=[f"{kind}-{n}" for kind in RUNNERS for n in (1, 2, 3, 4)])
def group(request):
    kind, n = request.param.split("-")
    return RUNNERS[kind], int(n)


@pytest.fixture(params=list(RUNNERS))
def run(request):
    return RUNNERS[request.param]


def message(source, to, dtype=torch.float32, shape=(3, 5)):
    """What `source` sends to `to`: different for every pair."""
    generator = torch.Generator().manual_seed(10 * source + to)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def ring(host, step=1):
    return {"to": (host.rank + step) % host.world_size, "source": (host.rank - step) % host.world_size}


def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(got.float(), want.float())


def uneven(source, to):
    """The shape of what `source` sends to `to`; some are empty."""
    return ((source + 2 * to) % 3, 2)


def test_exchanges_every_dtype_and_shape(group):
    run, n = group

    def body(host):
        back, on = (host.rank - 1) % n, (host.rank + 1) % n
        for dtype in DTYPES:
            for shape in ((3, 5), (7,), (), (0, 4)):
                got = host.exchange(message(host.rank, on, dtype, shape), **ring(host), what="x").wait()
                assert same(got, message(back, host.rank, dtype, shape))
            mine, theirs = (message(*pair, dtype, uneven(*pair)) for pair in ((host.rank, on), (back, host.rank)))
            handle = host.exchange(mine, **ring(host), shape=list(theirs.shape), what="uneven")
            assert same(handle.wait(), theirs) and handle.wait() is handle.wait()
        got = host.exchange(message(host.rank, back).T, **ring(host, -1), what="transposed").wait()
        assert same(got, message(on, host.rank).T) and got.is_contiguous()
        got = host.exchange(message(host.rank, on)[::2, 1:], **ring(host), what="sliced").wait()
        assert same(got, message(back, host.rank)[::2, 1:])
        partner = host.rank ^ 1 if host.rank ^ 1 < n else host.rank  # in a group of odd size one is left over
        got = host.exchange(message(host.rank, partner), to=partner, source=partner, what="swap").wait()
        assert same(got, message(partner, host.rank))

    run(n, body)


def test_a_ring_brings_everybody_everything(group):
    run, n = group

    def body(host):
        held = [message(host.rank, 0)]
        for _ in range(n):
            held.append(host.exchange(held[-1], **ring(host), what="ring").wait())
        assert all(same(x, message((host.rank - step) % n, 0)) for step, x in enumerate(held))

    run(n, body)


def test_all_to_all_sends_every_dtype_and_shape(group):
    run, n = group

    def body(host):
        for dtype in DTYPES:
            for shape in ((3, 5), (), (0, 4)):
                parts = [message(host.rank, to, dtype, shape) for to in range(n)]
                got = host.all_to_all(parts, what="even").wait()
                assert all(same(x, message(source, host.rank, dtype, shape)) for source, x in enumerate(got))
            parts = [message(host.rank, to, dtype, uneven(host.rank, to)) for to in range(n)]
            shapes = [uneven(source, host.rank) for source in range(n)]
            got = host.all_to_all(parts, shapes=shapes, what="uneven").wait()
            assert len(got) == n
            assert all(same(x, message(s, host.rank, dtype, shapes[s])) for s, x in enumerate(got))
        got = host.all_to_all([message(host.rank, to).T for to in range(n)], what="transposed").wait()
        assert all(same(x, message(source, host.rank).T) for source, x in enumerate(got))

    run(n, body)


def test_all_to_all_twice_with_swapped_shapes_is_the_identity(group):
    run, n = group

    def body(host):
        x = message(host.rank, 0, shape=(n, 4, 6))
        parts = [part[: 1 + (host.rank + to) % 2, :, to:].transpose(1, 2) for to, part in enumerate(x.split(1))]
        mine = [part.shape for part in parts]
        theirs = host.all_gather_object([list(shape) for shape in mine], what="shapes")
        got = host.all_to_all(parts, shapes=[shapes[host.rank] for shapes in theirs], what="there").wait()
        again = host.all_to_all(got, shapes=mine, what="back").wait()
        assert all(same(x, part) for x, part in zip(again, parts, strict=True))

    run(n, body)


def test_several_in_flight_in_any_order(group):
    run, n = group

    def body(host):
        def start(i, kind):
            x = torch.full((4,), 10 * i + host.rank)
            if kind == "gather":
                return host.all_gather(x, what=f"gather {i}")
            if kind == "ring":
                return host.exchange(x, **ring(host, i), what=f"ring {i}")
            return host.all_to_all([x + 100 * to for to in range(n)], what=f"all to all {i}")

        kinds = ["gather", "ring", "all to all"] * 2
        handles = [start(i, kind) for i, kind in enumerate(kinds)]
        for i in (4, 0, 5, 2, 3, 1):
            for _ in range(2):  # wait may be called again
                got = handles[i].wait()
                if kinds[i] == "ring":
                    assert got.tolist() == [10 * i + (host.rank - i) % n] * 4
                else:
                    to = 100 * host.rank if kinds[i] == "all to all" else 0
                    assert [x.tolist() for x in got] == [[to + 10 * i + rank] * 4 for rank in range(n)]

    run(n, body)


@pytest.mark.parametrize("n", [1, 2])
def test_hosts_share_no_memory(run, n):
    def body(host):
        mine, parts = torch.ones(3, requires_grad=True), list(torch.ones(n, 3))
        one = host.exchange(mine, **ring(host), what="x").wait()
        several = host.all_to_all(parts, what="x").wait()
        assert not one.requires_grad
        for x in (mine.detach(), *parts):
            x.fill_(-1)
        host.all_gather_object(None, what="all have written")
        assert all(torch.equal(x, torch.ones(3)) for x in (one, *several))
        for x in (one, *several):
            x.fill_(5)
        host.all_gather_object(None, what="all have written")
        assert all(torch.equal(x, -torch.ones(3)) for x in (mine, *parts))

    run(n, body)


def test_counters_follow_the_formula(group):
    run, n = group

    def body(host):
        for _ in range(3):
            host.exchange(torch.zeros(5, 7, dtype=torch.bfloat16), **ring(host), what="ring").wait()
        host.exchange(torch.zeros(2), to=host.rank, source=host.rank, what="self").wait()
        parts = [torch.zeros(2 + to) for to in range(n)]
        host.all_to_all(parts, shapes=[(2 + host.rank,)] * n, what="heads").wait()
        return host.counters.sent_bytes, host.counters.messages

    for rank, (sent, messages) in enumerate(run(n, body)):
        heads = 4 * sum(2 + to for to in range(n) if to != rank)
        assert sent == {"ring": 3 * 70 if n > 1 else 0, "self": 0, "heads": heads}
        assert messages == {"ring": 3, "self": 1, "heads": 1}


def test_subgroups_and_mesh_dimensions(tmp_path):
    def check(host, members, own):
        handle = host.all_to_all([torch.full((2,), 10 * own + to) for to in members], what="x")
        got = host.exchange(torch.tensor([own]), **ring(host), what="x").wait()
        assert got.tolist() == [members[host.rank - 1]]
        assert [x.tolist() for x in handle.wait()] == [[10 * other + own] * 2 for other in members]

    def body(world):
        store = dist.FileStore(str(tmp_path / "store"), 4)
        for members in ((0, 1, 2), (3, 1)):
            group = dist.new_group(list(members))
            if world.rank in members:
                ranks = dist.get_process_group_ranks(group)
                check(ProcessGroupHost(group, "cpu", store, timeout_s=10), ranks, world.rank)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "data"))
        check(ProcessGroupHost(mesh["sequence"], "cpu"), [world.rank % 2, world.rank % 2 + 2], world.rank)

    run_processes(4, body)
