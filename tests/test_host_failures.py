"""What a group does when a host raises, dies, never comes, or brings the wrong thing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from apb.parallel import HostError, HostFailed, ProcessGroupHost, run_processes, run_simulated, run_threads
from apb.parallel.heartbeat import Heartbeat

pytestmark = pytest.mark.timeout(60)

IN_THREADS = [run_threads, run_simulated]
EVERYWHERE = [*IN_THREADS, run_processes]


def gather(host, what):
    return host.all_gather(torch.ones(2), what=what).wait()


def survivors(run, n, body, folder, **options):
    """Run `body`, and return the error run raises and, by rank, how long hosts took to raise and what they said."""

    def watched(host):
        began = time.monotonic()
        try:
            body(host)
        except HostFailed as error:
            (folder / str(host.rank)).write_text(f"{time.monotonic() - began} {error}")
            raise

    with pytest.raises(BaseException) as caught:
        run(n, watched, **options)
    said = {int(path.name): path.read_text().split(" ", 1) for path in folder.iterdir() if path.name.isdigit()}
    return caught.value, {rank: (float(took), text) for rank, (took, text) in said.items()}


@pytest.mark.parametrize("run", EVERYWHERE)
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_body_that_raises(run, culprit, tmp_path):
    def body(host):
        gather(host, "first")
        if host.rank == culprit:
            raise ValueError("anchor too long")
        gather(host, "second")

    error, said = survivors(run, 4, body, tmp_path, timeout_s=20)
    assert isinstance(error, ValueError) and str(error) == "anchor too long"
    assert f"raised on rank {culprit} of 4" in error.__notes__[0]
    assert sorted(said) == [rank for rank in range(4) if rank != culprit]
    for rank, (took, text) in said.items():
        assert took < 6
        assert f"rank {culprit}" in text and "ValueError: anchor too long" in text
        assert f"rank {rank} of 4 was waiting in collective 1 ('second')" in text


@pytest.mark.parametrize("run", EVERYWHERE)
def test_only_the_original_error_is_raised(run):
    def body(host):
        with host.together("load"):
            if host.rank == 1:
                time.sleep(0.1)
                raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        run(3, body)


@pytest.mark.parametrize("run", EVERYWHERE)
def test_a_host_that_ends_early(run):
    def body(host):
        gather(host, "first")
        if host.rank != 1:
            gather(host, "second")

    with pytest.raises(
        HostFailed, match=r"rank 1 .*has (ended|left the group), last (seen )?in collective 0"
    ) as caught:
        run(3, body, timeout_s=20)
    assert "was waiting in collective 1 ('second')" in str(caught.value)


@pytest.mark.parametrize("run", IN_THREADS)
def test_threads_that_differ_all_say_the_same(run, tmp_path):
    def check(body, *parts):
        texts = {}

        def watched(host):
            try:
                body(host)
            except HostError as error:
                texts[host.rank] = str(error)
                raise

        with pytest.raises(HostError) as caught:
            run(3, watched)
        assert not isinstance(caught.value, HostFailed)
        assert len(texts) == 3 and len(set(texts.values())) == 1
        assert all(part in texts[0] for part in ("collective 0", *parts)), texts[0]

    check(
        lambda host: host.all_gather(torch.ones(2 + host.rank % 2), what="kv").wait(),
        "ranks [0, 2] bring 'kv', shape (2,)",
        "ranks [1] bring 'kv', shape (3,)",
    )
    check(lambda host: gather(host, f"x{host.rank // 2}"), "ranks [0, 1] bring 'x0'", "ranks [2] bring 'x1'")
    check(
        lambda host: host.all_gather(torch.ones(2, dtype=[torch.half, torch.long][host.rank // 2]), what="x").wait(),
        "float16",
        "int64",
    )
    check(
        lambda host: gather(host, "x") if host.rank else host.all_gather_object(1, what="x"),
        "an object",
        "shape (2,)",
    )


@pytest.mark.parametrize("run", EVERYWHERE)
def test_a_host_that_never_comes(run, tmp_path):
    def body(host):
        gather(host, "first")
        if host.rank == 1:
            time.sleep(2.2)
            gather(host, "late")
        gather(host, "second")

    error, said = survivors(run, 3, body, tmp_path, timeout_s=1.2)
    assert isinstance(error, HostFailed)
    for rank in (0, 2):
        took, text = said[rank]
        assert took < 4
        assert "1.2 s" in text and "rank 1" in text and "collective 0 ('first')" in text, text
        assert f"rank {rank} of 3 was waiting in collective 1 ('second')" in text or rank == 2


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_by_every_survivor(victim, tmp_path):
    def body(host):
        gather(host, "first")
        time.sleep(1)
        if host.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        gather(host, "second")

    began = time.monotonic()
    error, said = survivors(run_processes, 4, body, tmp_path, timeout_s=10)
    assert time.monotonic() - began < 10
    assert isinstance(error, HostFailed) and str(error) == f"rank {victim} of 4 was killed by SIGKILL"
    assert sorted(said) == [rank for rank in range(4) if rank != victim]
    for rank, (took, text) in said.items():
        assert took < 8
        assert f"rank {victim} of 4 (last seen in collective 0 ('first')) died: no sign of life" in text
        assert f"rank {rank} of 4 was waiting in collective 1 ('second')" in text


def test_the_host_that_serves_the_store_is_killed(tmp_path):
    def body(world):
        port = tmp_path / "port"
        if world.rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            port.write_text(str(store.port))
        world.agree("the store is up", what="store")
        if world.rank != 0:
            store = dist.TCPStore("127.0.0.1", int(port.read_text()), wait_for_workers=False)
        host = ProcessGroupHost(dist.group.WORLD, "cpu", store, timeout_s=12)
        gather(host, "first")
        if host.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        gather(host, "second")

    error, said = survivors(run_processes, 3, body, tmp_path, timeout_s=20)
    assert "rank 0 of 3 was killed by SIGKILL" in str(error) and sorted(said) == [1, 2]
    for rank, (took, text) in said.items():
        assert took < 10
        assert "the store does not answer: the process that serves it (often rank 0) is gone" in text
        assert f"rank {rank} of 3 was waiting in collective 1 ('second')" in text


def test_a_killed_process_without_a_store(tmp_path):
    def body(world):
        host = ProcessGroupHost(dist.group.WORLD, "cpu", timeout_s=2)
        if host.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        gather(host, "first")

    _, said = survivors(run_processes, 3, body, tmp_path, timeout_s=10)
    assert sorted(said) == [0, 2]
    for rank, (took, text) in said.items():
        assert took < 4
        assert f"no store was given, so which host failed is unknown; rank {rank} of 3 was waiting" in text


def test_failure_is_final_and_announcements_reach_the_others(tmp_path):
    def body(host):
        if host.rank == 1:
            host.announce(RuntimeError("out of memory"))
            time.sleep(3)
            return None
        texts = []
        for _ in range(2):
            try:
                gather(host, "first")
            except HostFailed as error:
                texts.append(str(error))
        assert texts[0] == texts[1]
        return texts[0]

    for text in run_processes(3, body, timeout_s=20)[::2]:
        assert "rank 1 of 3 (last seen in no collective yet) failed: RuntimeError: out of memory" in text


def test_heartbeat_tells_the_silent_from_the_gone():
    store = dist.HashStore()
    beats = []

    def make(rank):
        beats.append((rank, Heartbeat(store, "group", rank, 3, 5.0)))

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    zero, one, two = (beat for _, beat in sorted(beats, key=lambda pair: pair[0]))
    one.enter(4, "collective 4 ('kv')")
    time.sleep(1.6)
    assert zero.cause(5, 30) is None
    assert "rank 1 of 3 is alive but has not arrived: last seen in collective 4 ('kv')" in zero.absent(5)
    one._stop.set()  # it falls silent without leaving
    two.stop()
    until = time.monotonic() + 20
    while "died" not in (zero.cause(0, 1.5) or "") and time.monotonic() < until:
        time.sleep(0.05)
    assert "rank 1 of 3 (last seen in collective 4 ('kv')) died: no sign of life for" in zero.cause(0, 1.5)
    assert zero.cause(0, 30) == "rank 2 of 3 has left the group, last seen in no collective yet"
    zero.stop()
    with pytest.raises(HostFailed, match=r"ranks \[1\] gave no sign of life within 0.2 s"):
        Heartbeat(store, "other", 0, 2, 0.2)


def test_errors_that_cannot_be_pickled_keep_their_text():
    class Local(Exception):
        pass

    def body(host):
        raise Local("odd")

    with pytest.raises(HostError, match="Local: odd"):
        run_processes(2, body)


INTERRUPTED = """
import os, signal, sys, time
from apb.parallel import run_processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
def body(host):
    host.agree(0, what="all are up")
    open(f"{sys.argv[1]}/pid-{os.getpid()}", "w").close()
    time.sleep(60)
run_processes(2, body)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(how, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 40
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    children = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    assert len(children) == 2 and all(alive(pid) for pid in children)
    parent.send_signal(how)
    _, text = parent.communicate(timeout=20)
    assert how != signal.SIGINT or "KeyboardInterrupt" in text
    until = time.monotonic() + 5
    while time.monotonic() < until and (any(alive(pid) for pid in children) or list(tmp_path.glob("apb-hosts-*"))):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in children)
    assert not list(tmp_path.glob("apb-hosts-*"))
