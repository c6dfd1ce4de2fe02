"""What `exchange` and `all_to_all` do when they are misused, or when a host brings the wrong thing, raises or dies."""

import os
import signal
import time

import pytest
import torch
from test_host_failures import EVERYWHERE, IN_THREADS, survivors

from apb.parallel import HostError, HostFailed, run_processes, run_threads

pytestmark = pytest.mark.timeout(60)

ONES, HALVES = torch.ones(2), torch.ones(2, dtype=torch.half)


def ring(host):
    return {"to": (host.rank + 1) % host.world_size, "source": (host.rank - 1) % host.world_size}


EXCHANGE_MISUSES = [
    ({"to": 2, "source": 1}, r"to: expected a rank from 0 to 1, got 2 on rank 0 \('kv'\).* modulo"),
    ({"to": 1, "source": -1}, "source: expected a rank from 0 to 1, got -1"),
    ({"to": 0, "source": 1}, "permutation of the hosts, got to=0 and source=1 on rank 0"),
    ({"to": 1, "source": 0}, "permutation of the hosts, got to=1 and source=0 on rank 0"),
    ({"to": 0, "source": 0, "shape": (3,)}, r"shape: expected \(2,\), .* rank 0 sends to itself, got \(3,\)"),
]
ALL_TO_ALL_MISUSES = [
    ({"parts": [ONES] * 3}, "parts: expected one for each of the 2 hosts, got 3 .* empty tensor"),
    ({"parts": [ONES] * 2, "shapes": [(2,)]}, "shapes: expected one for each of the 2 hosts, got 1 "),
    ({"parts": [ONES, HALVES]}, "parts: expected one dtype, got torch.float16, torch.float32 on rank 0"),
    ({"parts": [ONES] * 2, "shapes": [(1, 2), (2,)]}, r"shapes\[0\]: expected \(2,\), .* got \(1, 2\)"),
]


@pytest.mark.parametrize(("arguments", "text"), EXCHANGE_MISUSES + ALL_TO_ALL_MISUSES)
def test_misuse_is_refused_before_anything_is_sent(arguments, text):
    def body(host):
        if host.rank == 0:
            with pytest.raises(ValueError, match=text):
                if "parts" in arguments:
                    host.all_to_all(what="kv", **arguments)
                else:
                    host.exchange(ONES, what="kv", **arguments)
        assert not host.counters.messages
        assert int(host.exchange(torch.tensor(host.rank), **ring(host), what="after").wait()) == 1 - host.rank

    run_threads(2, body)


@pytest.mark.parametrize("run", IN_THREADS)
def test_threads_that_differ_all_say_the_same(run):
    def check(body, *parts):
        texts = {}

        def watched(host):
            try:
                body(host).wait()
            except HostError as error:
                texts[host.rank] = str(error)
                raise

        with pytest.raises(HostError) as caught:
            run(3, watched)
        assert not isinstance(caught.value, HostFailed)
        assert len(texts) == 3 and len(set(texts.values())) == 1
        assert all(part in texts[0] for part in parts), texts[0]

    check(
        lambda host: host.exchange(torch.ones(2 + host.rank // 2), **ring(host), shape=(2,), what="kv"),
        "collective 0 ('kv'): rank 0 expects shape (2,) from rank 2, which sends it shape (3,)",
    )
    check(
        lambda host: host.all_to_all([ONES] * 3, shapes=[(2,), (2,), (2 - host.rank % 2,)], what="kv"),
        "collective 0 ('kv'): rank 1 expects shape (1,) from rank 2, which sends it shape (2,)",
    )
    check(
        lambda host: host.exchange(ONES, to=host.rank or 1, source=host.rank or 2, what="kv"),
        "rank 1 expects nothing from rank 0, which sends it shape (2,)",
    )
    check(
        lambda host: host.exchange([ONES, HALVES][host.rank // 2], **ring(host), what="kv"),
        "ranks [0, 1] bring 'kv', an exchange of torch.float32",
        "ranks [2] bring 'kv', an exchange of torch.float16",
    )
    check(
        lambda host: host.exchange(ONES, **ring(host), what=f"x{host.rank // 2}"),
        "ranks [0, 1] bring 'x0'",
        "ranks [2] bring 'x1'",
    )
    check(
        lambda host: host.exchange(ONES, **ring(host), what="kv") if host.rank else host.all_gather(ONES, what="kv"),
        "ranks [0] bring 'kv', shape (2,)",
        "ranks [1, 2] bring 'kv', an exchange",
    )


def exchange(host, what):
    return host.exchange(ONES, **ring(host), what=what).wait()


def all_to_all(host, what):
    return host.all_to_all([ONES] * host.world_size, what=what).wait()


@pytest.mark.parametrize("run", EVERYWHERE)
@pytest.mark.parametrize("send", [exchange, all_to_all])
def test_a_body_that_raises(run, send, tmp_path):
    def body(host):
        send(host, "first")
        if host.rank == 1:
            raise ValueError("anchor too long")
        send(host, "second")

    error, said = survivors(run, 4, body, tmp_path, timeout_s=20)
    assert isinstance(error, ValueError) and sorted(said) == [0, 2, 3]
    for rank, (took, text) in said.items():
        assert took < 6 and "rank 1" in text and "ValueError: anchor too long" in text
        assert f"rank {rank} of 4 was waiting in collective 1 ('second')" in text


@pytest.mark.parametrize("run", EVERYWHERE)
@pytest.mark.parametrize("send", [exchange, all_to_all])
def test_a_host_that_never_comes(run, send, tmp_path):
    def body(host):
        send(host, "first")
        if host.rank == 1:
            time.sleep(2.2)
            send(host, "late")
        send(host, "second")

    error, said = survivors(run, 3, body, tmp_path, timeout_s=1.2)
    assert isinstance(error, HostFailed)
    for rank in (0, 2):
        took, text = said[rank]
        assert took < 4 and "1.2 s" in text and "rank 1" in text and "collective 0 ('first')" in text, text


@pytest.mark.parametrize("send", [exchange, all_to_all])
def test_a_killed_process_is_named_by_every_survivor(send, tmp_path):
    def body(host):
        send(host, "first")
        time.sleep(1)
        if host.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        send(host, "second")

    error, said = survivors(run_processes, 4, body, tmp_path, timeout_s=10)
    assert isinstance(error, HostFailed) and str(error) == "rank 2 of 4 was killed by SIGKILL"
    assert sorted(said) == [0, 1, 3]
    for rank, (took, text) in said.items():
        assert took < 8 and "rank 2 of 4 (last seen in collective 0 ('first')) died: no sign of life" in text
        assert f"rank {rank} of 4 was waiting in collective 1 ('second')" in text
