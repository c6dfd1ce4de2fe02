"""The communicator: every block receives what the earlier blocks kept, in the document's order, and nothing else."""

import pytest
import torch
from hypothesis import example, given

from apb.parallel import HostFailed, run_processes, run_simulated, run_threads
from apb.parallel.passing import PassingBlocks, gather_document
from apb.plan import plan_context
from apb.testing.strategies import SEEDS, plans

HEADS, DIM = 2, 16


def kept_of(block, batch=2):
    """Make keys and values that say which block and place they come from."""
    place = 1000.0 * block.index + torch.arange(block.kept_tokens)
    k = place[None, None, :, None].expand(batch, HEADS, -1, DIM) + torch.arange(HEADS)[None, :, None, None] / 4
    return k, -k


def exchange(host, plan):
    """Send what each of this host's blocks kept; return what each received, by block index."""
    passing = PassingBlocks(plan, host)
    share = plan.host(host.rank)
    for slot, block in enumerate(share.blocks):
        passing.start(slot, *kept_of(block))
    received = {block.index: passing.wait(block) for block in share.blocks}
    return received, host.counters


UNEVEN = plan_context(tokens=13, hosts=3, anchor=3, passing=4)  # the first block keeps 2, the second 4


@example(plan=UNEVEN)
@given(plan=plans())
def test_a_block_receives_what_all_earlier_blocks_kept_in_the_documents_order(plan):
    received = {}
    for blocks, _ in run_threads(plan.hosts, exchange, plan):
        received |= blocks
    assert sorted(received) == list(range(len(plan.blocks)))
    for block in plan.blocks:
        earlier = [kept_of(other) for other in plan.blocks[: block.index]]
        for got, sent in zip(received[block.index], zip(*earlier, strict=True) if earlier else [[], []], strict=True):
            assert got.shape == (2, HEADS, block.passing_tokens, DIM)
            assert torch.equal(got, torch.cat([got[:, :, :0], *sent], dim=2))


@given(plan=plans())
def test_bytes_and_messages_are_the_formula(plan):
    """(H − 1) · kept · Hkv · 2d · itemsize a host and gather; a gather of nothing is no message."""
    gathered = [plan.message_tokens(slot) for slot in range(plan.blocks_per_host)]
    for _, counters in run_threads(plan.hosts, exchange, plan):
        assert counters.messages.get("passing", 0) == sum(tokens > 0 for tokens in gathered)
        assert counters.sent_bytes.get("passing", 0) == 2 * (plan.hosts - 1) * sum(gathered) * HEADS * 2 * DIM * 4


@pytest.mark.parametrize("run", [run_simulated, run_processes])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_kind_of_host_passes_the_same(run, layout):
    plan = plan_context(tokens=29, hosts=3, anchor=2, passing=4, layout=layout)
    threads, others = run_threads(3, exchange, plan), run(3, exchange, plan)
    for (received, counters), (other, other_counters) in zip(threads, others, strict=True):
        assert received.keys() == other.keys() and counters == other_counters
        assert all(torch.equal(x, y) for i in received for x, y in zip(received[i], other[i], strict=True))


@given(plan=plans(), seed=SEEDS)
def test_the_oracles_gather_returns_the_document(plan, seed):
    generator = torch.Generator().manual_seed(seed)
    document = torch.randn(2, HEADS, plan.tokens, DIM, generator=generator)
    parts = plan.split(document, dim=2)

    def body(host):
        share = plan.host(host.rank)
        noise = [torch.full((2, HEADS, rows, DIM), torch.nan) for rows in (share.anchor_rows, share.query_rows)]
        return gather_document(torch.cat((noise[0], parts[host.rank], noise[1]), dim=2), plan, host)

    assert all(torch.equal(gathered, document) for gathered in run_threads(plan.hosts, body))


@pytest.mark.parametrize("shapes", [(1, 2), (2, 3), (0, 0), (1, 1)])
def test_another_number_of_tokens_than_planned_is_an_error_on_every_host(shapes):
    told = [""] * 3

    def body(host):
        k, v = (torch.zeros(1, HEADS, count, DIM) for count in [shapes, (4, 4), (0, 0)][host.rank])
        try:
            PassingBlocks(UNEVEN, host).start(0, k, v)
            host.all_gather(torch.zeros(1), what="next").wait()
        except (ValueError, HostFailed) as error:
            told[host.rank] = str(error)
            raise

    with pytest.raises(ValueError, match="k, v: shapes"):
        run_threads(3, body)
    assert told[0].startswith("k, v: shapes (1, 2, ") and "expected 2 tokens along dim 2" in told[0]
    assert "rank 0's block number 0" in told[0]
    assert all("rank 0" in text and "expected 2 tokens" in text for text in told)
