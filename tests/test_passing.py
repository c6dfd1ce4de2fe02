"""The communicator: every block receives what the earlier blocks kept, in the document's order, and nothing else."""

import pytest
import torch
from hypothesis import assume, example, given

from apb.parallel import Handle, HostFailed, run_processes, run_simulated, run_threads
from apb.parallel.passing import PassingBlocks, gather_document, gather_query
from apb.plan import plan_context
from apb.testing.oracle import anchor_rows_of
from apb.testing.strategies import SEEDS, plans

HEADS, DIM = 2, 16


def kept_of(block, batch=2):
    """Make keys and values that say which block and place they come from."""
    place = 1000.0 * block.index + torch.arange(block.kept_tokens)
    k = place[None, None, :, None].expand(batch, HEADS, -1, DIM) + torch.arange(HEADS)[None, :, None, None] / 4
    return k, -k


def anchor_of(rows, batch=2):
    """Make a message of K and V that say which row of the anchor they come from."""
    return torch.tensor(rows, dtype=torch.float32)[None, None, :, None].expand(batch, HEADS, -1, 2 * DIM)


def exchange(host, plan):
    """Send what each of this host's blocks kept; return what each received, by block index, and a split anchor."""
    passing = PassingBlocks(plan, host)
    share = plan.host(host.rank)
    own = anchor_of(anchor_rows_of(plan, host.rank)) if plan.split_anchor else None
    for slot, block in enumerate(share.blocks):
        passing.start(slot, torch.cat(kept_of(block), dim=-1), anchor=own)
    received = {block.index: passing.wait(block) for block in share.blocks}
    if plan.split_anchor:
        received["anchor"] = [passing.anchor()]
    return received, host.counters


SPLIT = plan_context(tokens=46, hosts=3, anchor=5, passing=2, query=2, layout="zigzag", split_anchor=True)
UNEVEN = plan_context(tokens=13, hosts=3, anchor=3, passing=4)  # the first block keeps 2, the second 4


@example(plan=UNEVEN)
@example(plan=SPLIT)
@given(plan=plans())
def test_a_block_receives_what_all_earlier_blocks_kept_in_the_documents_order(plan):
    received = {}
    rows = plan.anchor_rows if any(anchor_rows_of(plan, rank) for rank in range(plan.hosts)) else 0
    for blocks, _ in run_threads(plan.hosts, exchange, plan):
        received |= blocks
        for anchor in received.pop("anchor", []):
            assert torch.equal(anchor, anchor_of(range(rows)))
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
@pytest.mark.parametrize("plan", [UNEVEN, SPLIT])
def test_every_kind_of_host_passes_the_same(run, plan):
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


def test_a_first_block_and_the_anchor_do_not_wait_for_the_second_gather():
    """So that it is under way while they attend."""

    def body(host):
        share, waited = SPLIT.host(host.rank), []
        gather = host.all_gather

        def noted(x, *, what):
            handle, number = gather(x, what=what), len(started)
            started.append(number)
            return Handle(lambda: waited.append(number) or handle.wait())

        started, host.all_gather = [], noted
        passing = PassingBlocks(SPLIT, host)
        for slot, block in enumerate(share.blocks):
            passing.start(slot, torch.cat(kept_of(block), dim=-1), anchor=anchor_of(anchor_rows_of(SPLIT, host.rank)))
        passing.anchor()
        passing.received(share.blocks[0])
        first = list(waited)
        passing.received(share.blocks[1])
        passing.finish()
        return first, waited

    for rank, (first, waited) in enumerate(run_threads(3, body)):
        assert first == [0] and waited == [0, 1], rank


@example(plan=SPLIT)
@given(plan=plans(query_ins=("anchor",), min_query=1))
def test_every_host_gets_the_questions_vectors_from_inside_the_anchor(plan):
    assume(plan.anchor_rows > plan.anchor and any(anchor_rows_of(plan, rank) for rank in range(plan.hosts)))

    def body(host):
        rows = torch.tensor(anchor_rows_of(plan, host.rank), dtype=torch.float32)
        return gather_query(rows[None, None, :, None].expand(1, HEADS, -1, DIM), plan, host), len(rows)

    for got, rows in run_threads(plan.hosts, body):
        if plan.split_anchor or rows:
            expected = torch.arange(plan.query_offset, plan.query_offset + plan.query).float()
            assert torch.equal(got, expected[None, None, :, None].expand(1, HEADS, -1, DIM))


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_another_number_of_tokens_than_planned_is_an_error_on_every_host(tokens):
    told = [""] * 3

    def body(host):
        message = torch.zeros(1, HEADS, [tokens, 4, 0][host.rank], 2 * DIM)
        try:
            PassingBlocks(UNEVEN, host).start(0, message)
            host.all_gather(torch.zeros(1), what="next").wait()
        except (ValueError, HostFailed) as error:
            told[host.rank] = str(error)
            raise

    with pytest.raises(ValueError, match="kept: shape"):
        run_threads(3, body)
    says = f"kept: shape (1, 2, {tokens}, 32), expected [batch, kv_heads, 2 tokens, K and V side by side]"
    assert told[0].startswith(says) and "rank 0 passes on from its block number 0" in told[0]
    assert all("rank 0" in text and says in text for text in told)


def test_a_split_anchor_must_come_with_the_first_message():
    def body(host):
        kept = torch.cat(kept_of(SPLIT.host(host.rank).blocks[0]), dim=-1)
        PassingBlocks(SPLIT, host).start(0, kept)

    says = r"anchor: shape \(2, 2, 0, 32\), expected .* what rank \d runs of a split anchor"
    with pytest.raises(ValueError, match=says):
        run_threads(3, body)
