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


def conform(host):
    """Gather every dtype, several at once, and objects; return what the counters say."""
    n = host.world_size
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn]
    for dtype in dtypes:
        got = host.all_gather(share_of(host.rank, dtype).to(host.device), what="x").wait()
        for rank, x in enumerate(got):
            assert x.dtype == dtype and x.device == host.device
            assert torch.equal(x.cpu().float(), share_of(rank, dtype).float())
    handles = [host.all_gather(torch.full((1000,), 10 * i + host.rank, device=host.device), what="y") for i in range(4)]
    for i in (3, 0, 2, 1):
        assert [int(x[0]) for x in handles[i].wait()] == [10 * i + rank for rank in range(n)]
    empty = host.all_gather(torch.zeros(0, 3, device=host.device), what="empty").wait()
    assert [x.shape for x in empty] == [(0, 3)] * n
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
    assert all(result["y"] == 4 * (WORLD - 1) * 8000 for result in results)


@pytest.mark.parametrize("run", [run_threads, run_simulated])
def test_threads_on_one_device_conform(run):
    results = run(4, conform, device="cuda:0")
    assert all(result["y"] == 4 * 3 * 8000 for result in results)


def overlapped(host):
    """Gather while the current stream is busy, on a side stream; stale data would show."""
    x = torch.zeros(1 << 20, device=host.device)
    for step in range(20):
        x.fill_(step * 10 + host.rank)
        side = torch.cuda.Stream(host.device)
        side.wait_stream(torch.cuda.current_stream(host.device))
        with torch.cuda.stream(side):
            got = host.all_gather(x, what="x").wait()
            sums = torch.stack([part.sum(dtype=torch.float64) for part in got])
        torch.cuda.current_stream(host.device).wait_stream(side)
        assert sums.tolist() == [(step * 10 + rank) * 2.0**20 for rank in range(host.world_size)]


@pytest.mark.multigpu
def test_nccl_on_side_streams():
    run_processes(WORLD, overlapped, backend="nccl", timeout_s=60)


def test_threads_on_side_streams():
    run_threads(4, overlapped, device="cuda:0")


def raising(host):
    host.all_gather(torch.ones(2, device=host.device), what="first").wait()
    if host.rank == 1:
        raise ValueError("anchor too long")
    host.all_gather(torch.ones(2, device=host.device), what="second").wait()
    torch.cuda.synchronize()


@pytest.mark.multigpu
def test_nccl_a_body_that_raises():
    began = time.monotonic()
    with pytest.raises(ValueError, match="anchor too long"):
        run_processes(WORLD, raising, backend="nccl", timeout_s=30)
    assert time.monotonic() - began < 60


def killed(host, folder):
    host.all_gather(torch.ones(2, device=host.device), what="first").wait()
    torch.cuda.synchronize()
    if host.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        host.all_gather(torch.ones(2, device=host.device), what="second").wait()
        torch.cuda.synchronize()
        host.check()
    except HostFailed as error:
        with open(f"{folder}/{host.rank}", "w") as file:
            file.write(str(error))
        raise


@pytest.mark.multigpu
def test_nccl_a_killed_process(tmp_path):
    with pytest.raises(HostFailed, match=f"rank 1 of {WORLD} was killed by SIGKILL"):
        run_processes(WORLD, killed, str(tmp_path), backend="nccl", timeout_s=12)
    texts = [path.read_text() for path in tmp_path.iterdir()]
    assert len(texts) == WORLD - 1
    assert all(f"rank 1 of {WORLD}" in text and "collective 1 ('second')" in text for text in texts)
