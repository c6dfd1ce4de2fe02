"""The same promises on CUDA: threads on one device, and NCCL with one process for each device."""

import os
import signal
import time

import pytest
import torch

from apb.parallel import HostFailed, PlanMismatch, run_processes, run_simulated, run_threads

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

WORLD = min(4, torch.cuda.device_count())


def share_of(rank, dtype):
    return torch.arange(rank, rank + 6).reshape(2, 3).to(dtype)


def ring(host, step=1):
    return {"to": (host.rank + step) % host.world_size, "source": (host.rank - step) % host.world_size}


def conform(host):
    """Send every dtype, several at once, and objects; return what the counters say."""
    n, back = host.world_size, (host.rank - 1) % host.world_size

    def same(x, want):
        return x.device == host.device and x.dtype == want.dtype and torch.equal(x.cpu().float(), want.float())

    def part(source, to, dtype):  # 0, 1 or 2 rows
        return share_of(10 * source + to, dtype)[: (source + 2 * to) % 3]

    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn]
    for dtype in dtypes:
        got = host.all_gather(share_of(host.rank, dtype).to(host.device), what="x").wait()
        assert all(same(x, share_of(rank, dtype)) for rank, x in enumerate(got))
        got = host.exchange(share_of(host.rank, dtype).to(host.device), **ring(host), what="ring").wait()
        assert same(got, share_of(back, dtype))
        parts = [part(host.rank, to, dtype).to(host.device) for to in range(n)]
        wanted = [part(source, host.rank, dtype) for source in range(n)]
        got = host.all_to_all(parts, shapes=[x.shape for x in wanted], what="parts").wait()
        assert all(same(x, want) for x, want in zip(got, wanted, strict=True))
        on = (host.rank + 1) % n
        handle = host.exchange(parts[on], **ring(host), shape=wanted[back].shape, what="uneven ring")
        assert same(handle.wait(), wanted[back])
    handles = [host.all_gather(torch.full((1000,), 10 * i + host.rank, device=host.device), what="y") for i in range(4)]
    for i in (3, 0, 2, 1):
        assert [int(x[0]) for x in handles[i].wait()] == [10 * i + rank for rank in range(n)]
    x = torch.full((1000,), host.rank, device=host.device)
    exchanges = [host.exchange(x + 10 * i, **ring(host, i), what="z") for i in range(4)]
    gather, swap = host.all_gather(x, what="y"), host.all_to_all([x + 100 * to for to in range(n)], what="w")
    assert [int(x[0]) for x in swap.wait()] == [100 * host.rank + rank for rank in range(n)]
    for i in (3, 0, 2, 1):
        assert int(exchanges[i].wait()[-1]) == 10 * i + (host.rank - i) % n
    assert [int(x[0]) for x in gather.wait()] == list(range(n))
    nothing = torch.zeros(0, 3, device=host.device)
    empty = host.all_gather(nothing, what="empty").wait() + host.all_to_all([nothing] * n, what="empty").wait()
    assert [x.shape for x in (*empty, host.exchange(nothing, **ring(host), what="empty").wait())] == [(0, 3)] * (
        2 * n + 1
    )
    assert host.all_gather_object({"rank": host.rank}, what="o") == [{"rank": rank} for rank in range(n)]
    try:
        host.agree(host.rank, what="plan")
        raise AssertionError("expected a PlanMismatch")
    except PlanMismatch:
        pass
    return host.counters.sent_bytes


@pytest.mark.multigpu
def test_nccl_processes_conform():
    results = run_processes(WORLD, conform, backend="nccl", timeout_s=60)
    for result in results:
        assert result["y"] == 5 * (WORLD - 1) * 8000 and result["w"] == (WORLD - 1) * 8000
        assert result["z"] == sum(i % WORLD != 0 for i in range(4)) * 8000


@pytest.mark.parametrize("run", [run_threads, run_simulated])
def test_threads_on_one_device_conform(run):
    results = run(4, conform, device="cuda:0")
    assert all(result["y"] == 5 * 3 * 8000 and result["w"] == result["z"] == 3 * 8000 for result in results)


def overlapped(host):
    """Send while the current stream is busy, on a side stream; stale data would show."""
    n, x = host.world_size, torch.zeros(1 << 20, device=host.device)
    back = (host.rank - 1) % n
    for step in range(20):
        x.fill_(step * 10 + host.rank)
        side = torch.cuda.Stream(host.device)
        side.wait_stream(torch.cuda.current_stream(host.device))
        with torch.cuda.stream(side):
            got = host.all_gather(x, what="x").wait()
            got.append(host.exchange(x, **ring(host), what="x").wait())
            got += host.all_to_all([x] * n, what="x").wait()
            sums = torch.stack([part.sum(dtype=torch.float64) for part in got])
        torch.cuda.current_stream(host.device).wait_stream(side)
        assert sums.tolist() == [(step * 10 + rank) * 2.0**20 for rank in (*range(n), back, *range(n))]


def waited_for_elsewhere(host):
    """Start on the current stream, wait on a late side stream, and drop all: nobody may take the memory over early."""
    n, x = host.world_size, torch.zeros(1 << 20, device=host.device)
    back, side = (host.rank - 1) % n, torch.cuda.Stream(host.device)
    for step in range(20):
        x.fill_(step * 10 + host.rank)
        one = host.exchange(x.clone(), **ring(host), what="x")
        several = host.all_to_all([x.clone() for _ in range(n)], what="x")
        with torch.cuda.stream(side):
            torch.cuda._sleep(5_000_000)
            got = [one.wait(), *several.wait()]
            torch.cuda._sleep(5_000_000)
            sums = torch.stack([part.sum(dtype=torch.float64) for part in got])
        del one, several, got
        junk = [torch.full_like(x, -1) for _ in range(4 * n)]  # on the current stream, which has not waited
        with torch.cuda.stream(side):
            assert sums.tolist() == [(step * 10 + rank) * 2.0**20 for rank in (back, *range(n))]
        del junk


@pytest.mark.multigpu
@pytest.mark.parametrize("body", [overlapped, waited_for_elsewhere])
def test_nccl_on_side_streams(body):
    run_processes(WORLD, body, backend="nccl", timeout_s=60)


@pytest.mark.parametrize("body", [overlapped, waited_for_elsewhere])
def test_threads_on_side_streams(body):
    run_threads(4, body, device="cuda:0")


COLLECTIVES = ["all_gather", "exchange", "all_to_all"]


def send(host, collective, what):
    x = torch.ones(2, device=host.device)
    if collective == "all_gather":
        host.all_gather(x, what=what).wait()
    elif collective == "exchange":
        host.exchange(x, **ring(host), what=what).wait()
    else:
        host.all_to_all([x] * host.world_size, what=what).wait()


def raising(host, collective):
    send(host, collective, "first")
    if host.rank == 1:
        raise ValueError("anchor too long")
    send(host, collective, "second")
    torch.cuda.synchronize()


@pytest.mark.multigpu
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_nccl_a_body_that_raises(collective):
    began = time.monotonic()
    with pytest.raises(ValueError, match="anchor too long"):
        run_processes(WORLD, raising, collective, backend="nccl", timeout_s=30)
    assert time.monotonic() - began < 60


def killed(host, collective, folder):
    send(host, collective, "first")
    torch.cuda.synchronize()
    if host.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        send(host, collective, "second")
        torch.cuda.synchronize()
        host.check()
    except HostFailed as error:
        with open(f"{folder}/{host.rank}", "w") as file:
            file.write(str(error))
        raise


@pytest.mark.multigpu
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_nccl_a_killed_process(collective, tmp_path):
    with pytest.raises(HostFailed, match=f"rank 1 of {WORLD} was killed by SIGKILL"):
        run_processes(WORLD, killed, collective, str(tmp_path), backend="nccl", timeout_s=12)
    texts = [path.read_text() for path in tmp_path.iterdir()]
    assert len(texts) == WORLD - 1
    assert all(f"rank 1 of {WORLD}" in text and "collective 1 ('second')" in text for text in texts)
