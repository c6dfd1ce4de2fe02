"""One suite for every kind of host: what a group does when nothing goes wrong."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from apb.parallel import (
    HostFailed,
    PlanMismatch,
    ProcessGroupHost,
    host_from_env,
    run_processes,
    run_simulated,
    run_threads,
)

pytestmark = pytest.mark.timeout(60)

RUNNERS = {"threads": run_threads, "simulated": run_simulated, "gloo": run_processes}


@pytest.fixture(params=[f"{kind}-{n}" for kind in RUNNERS for n in (1, 2, 3, 4)])
def group(request):
    kind, n = request.param.split("-")
    return RUNNERS[kind], int(n)


@pytest.fixture(params=list(RUNNERS))
def run(request):
    return RUNNERS[request.param]


def tensor_of(rank, dtype, shape=(3, 5)):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn]


def test_gathers_every_dtype_and_shape_in_rank_order(group):
    run, n = group

    def body(host):
        for dtype in DTYPES:
            for shape in ((3, 5), (7,), (), (0, 4)):
                mine = tensor_of(host.rank, dtype, shape)
                got = host.all_gather(mine, what="x").wait()
                assert len(got) == n
                for rank, x in enumerate(got):
                    want = tensor_of(rank, dtype, shape)
                    assert x.dtype == dtype and x.shape == want.shape
                    assert torch.equal(x.float(), want.float())
        transposed = host.all_gather(tensor_of(host.rank, torch.float32).T, what="x").wait()
        assert all(torch.equal(x, tensor_of(rank, torch.float32).T) for rank, x in enumerate(transposed))
        return host.rank, host.world_size, host.device.type

    assert run(n, body) == [(rank, n, "cpu") for rank in range(n)]


def test_several_gathers_in_flight_in_any_order(group):
    run, n = group

    def body(host):
        handles = [host.all_gather(torch.full((4,), 10 * i + host.rank), what=f"x{i}") for i in range(6)]
        for i in (5, 0, 3, 1, 4, 2):
            for _ in range(2):  # wait may be called again
                assert [int(x[0]) for x in handles[i].wait()] == [10 * i + rank for rank in range(n)]

    run(n, body)


def test_hosts_share_no_memory(run):
    def body(host):
        mine = torch.ones(3)
        got = host.all_gather(mine, what="x").wait()
        mine.fill_(-1)
        got[0].fill_(host.rank)
        host.all_gather_object(None, what="all have written")
        assert torch.equal(got[0], torch.full((3,), float(host.rank))) and torch.equal(got[1], torch.ones(3))

    run(2, body)


def test_counters_follow_the_formula(group):
    run, n = group

    def body(host):
        for _ in range(3):
            host.all_gather(torch.zeros(5, 7, dtype=torch.bfloat16), what="passing").wait()
        host.all_gather(torch.zeros(2, dtype=torch.int64), what="query").wait()
        host.agree("plan", what="plan")
        return host.counters.sent_bytes, host.counters.messages

    for sent, messages in run(n, body):
        assert sent == {"passing": 3 * (n - 1) * 70, "query": (n - 1) * 16}
        assert messages == {"passing": 3, "query": 1}


def test_objects(group):
    run, n = group
    values = [{"rank": rank, "text": "é" * rank, "list": [1, None, 2.5, True]} for rank in range(n)]
    assert run(n, lambda host: host.all_gather_object(values[host.rank], what="v")) == [values] * n
    with pytest.raises(TypeError, match="JSON"):
        run(n, lambda host: host.all_gather_object(torch.ones(1), what="v"))


def test_agree_raises_the_same_text_everywhere(group):
    run, n = group

    def body(host):
        host.agree({"tokens": 7}, what="plan")
        try:
            host.agree(("anchor", host.rank // 2), what="plan")
        except PlanMismatch as error:
            return str(error)

    texts = run(n, body)
    assert len(set(texts)) == 1
    if n > 2:
        assert "ranks [0, 1] hold ('anchor', 0)" in texts[0] and "('anchor', 1)" in texts[0]
    else:
        assert texts[0] is None


def test_together_fails_alike_or_not_at_all(group):
    run, n = group

    def body(host):
        with host.together("load"):
            pass
        try:
            with host.together("load"):
                if host.rank == n - 1:
                    raise KeyError("weights")
        except (KeyError, HostFailed) as error:
            return type(error).__name__, str(error)

    *others, last = run(n, body)
    assert last == ("KeyError", "'weights'")
    assert all(other[0] == "HostFailed" and f"rank {n - 1} of {n}" in other[1] for other in others)


def test_world_size_is_checked(run):
    with pytest.raises(ValueError, match="at least 1 host, got 0"):
        run(0, lambda host: None)


def test_threads_take_over_the_callers_modes():
    def body(host):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    assert run_threads(2, body) == [(True, False, False)] * 2
    with torch.no_grad():
        assert run_threads(2, body) == [(False, False, False)] * 2
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert run_simulated(2, body) == [(False, True, True)] * 2


def test_thread_groups_nested_and_side_by_side():
    def inner(host, outer_rank):
        return [int(x) for x in host.all_gather(torch.tensor(10 * outer_rank + host.rank), what="x").wait()]

    def outer(host):
        host.all_gather(torch.zeros(1), what="before").wait()
        got = run_threads(2, inner, host.rank) + run_simulated(2, inner, host.rank)
        host.all_gather(torch.zeros(1), what="after").wait()
        return got

    for runner in (run_threads, run_simulated):
        assert runner(3, outer) == [[[10 * r, 10 * r + 1]] * 4 for r in range(3)]

    results = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run_threads(3, inner, i)})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [[10 * i, 10 * i + 1, 10 * i + 2]] * 3 for i in range(3)}


def test_threads_free_what_all_have_read():
    def body(host):
        for _ in range(20):
            host.all_gather(torch.zeros(10), what="x").wait()
        host.all_gather_object(None, what="all have read")
        return len(host._group.meetings)

    assert max(run_threads(3, body)) <= 1


def test_simulated_hosts_take_turns_and_time_their_own_share():
    computing, turns = [], []

    def body(host):
        for step in range(3):
            computing.append(host.rank)
            assert len(computing) == 1
            time.sleep(0.01 * (host.rank + 1))
            turns.append((step, host.rank))
            computing.pop()
            handle = host.all_gather(torch.ones(1), what="x")
            handle.wait()
        return host.compute_ms

    times = run_simulated(4, body)
    assert turns == [(step, rank) for step in range(3) for rank in range(4)]
    for rank, ms in enumerate(times):
        assert 30 * (rank + 1) <= ms < 30 * (rank + 1) + 100  # with the others it would be 300


def test_a_hundred_small_gathers_are_quick(run):
    def body(host):
        host.agree(0, what="start")
        began = time.monotonic()
        for _ in range(100):
            host.all_gather(torch.ones(2), what="x").wait()
        return time.monotonic() - began

    assert max(run(4, body)) < 5  # 0.1 to 0.6 s on two idle cores; the limit allows for busy ones


def test_overlapping_subgroups(tmp_path):
    def body(world):
        store = dist.FileStore(str(tmp_path / "store"), 4)
        hosts = {}
        for members in ((0, 1, 2), (1, 2, 3)):
            group = dist.new_group(list(members))
            if world.rank in members:
                hosts[members] = ProcessGroupHost(group, "cpu", store, timeout_s=10)
        handles = {members: host.all_gather(torch.tensor([world.rank]), what="x") for members, host in hosts.items()}
        for members, handle in handles.items():
            assert [int(x) for x in handle.wait()] == list(members)
            assert hosts[members].rank == members.index(world.rank)
        again = [ProcessGroupHost(dist.group.WORLD, "cpu", store, timeout_s=10) for _ in range(2)]
        assert [host.all_gather_object(host.rank, what="again") for host in again] == [[0, 1, 2, 3]] * 2

    run_processes(4, body)


def test_device_mesh_dimension():
    def body(world):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
        host = ProcessGroupHost(mesh["sequence"], "cpu")
        got = [int(x) for x in host.all_gather(torch.tensor([world.rank]), what="x").wait()]
        assert got == [world.rank // 2 * 2, world.rank // 2 * 2 + 1] and host.rank == world.rank % 2
        with pytest.raises(ValueError, match=r"one dimension, got 2 .*sequence"):
            ProcessGroupHost(mesh, "cpu")
        with pytest.raises(TypeError, match="ProcessGroup or a DeviceMesh"):
            ProcessGroupHost(None, "cpu")

    run_processes(4, body)


TORCHRUN_BODY = """
import atexit, pathlib, sys, torch
from apb.parallel import host_from_env

@atexit.register  # runs after what host_from_env registers
def threads_left():
    names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    open(f"{sys.argv[1]}/{host.rank}.threads", "w").write(" ".join(names))

host = host_from_env(timeout_s=30)
got = [int(x) for x in host.all_gather(torch.tensor([host.rank]), what="x").wait()]
objects = host.all_gather_object(str(host.device), what="devices")
open(f"{sys.argv[1]}/{host.rank}", "w").write(f"{got} {objects}")
"""


def test_torchrun(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert host_from_env() is None
    script = tmp_path / "body.py"
    script.write_text(TORCHRUN_BODY)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[0, 1] ['cpu', 'cpu']"] * 2
    # A gloo thread that frees a tensor while the interpreter ends would abort the process, now and then.
    left = [(tmp_path / f"{rank}.threads").read_text() for rank in range(2)]
    assert not any("gloo" in names for names in left) and (all(left) or sys.platform != "linux"), left
