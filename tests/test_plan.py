"""The context splitter: every token in one place, at its true position, and nothing lost between split and join."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.plan import plan_context
from apb.testing.oracle import anchor_rows_of
from apb.testing.strategies import plan_arguments, plans

LEADING = st.sampled_from([(), (3,), (2, 1, 4)])


@given(plan=plans(), leading=LEADING, trailing=st.sampled_from([(), (5,)]))
def test_join_undoes_split(plan, leading, trailing):
    shape = (*leading, plan.tokens, *trailing)
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = plan.split(x, dim=len(leading))
    assert [part.shape[len(leading)] for part in parts] == [host.block_rows for host in plan.host_plans]
    assert torch.equal(plan.join(parts, dim=len(leading)), x)
    assert torch.equal(plan.join(plan.split(x, dim=-1 - len(trailing)), dim=-1 - len(trailing)), x)


@given(plan=plans())
def test_every_token_is_in_exactly_one_block_on_exactly_one_host(plan):
    held = [token for host in plan.host_plans for block in host.blocks for token in range(block.start, block.stop)]
    assert sorted(held) == list(range(plan.tokens))
    in_order = [token for block in plan.blocks for token in range(block.start, block.stop)]
    assert in_order == list(range(plan.tokens))
    assert sorted(block.index for host in plan.host_plans for block in host.blocks) == list(range(len(plan.blocks)))


@given(plan=plans())
def test_hosts_hold_the_blocks_of_the_layout(plan):
    expected = [[r] if plan.layout == "contiguous" else [r, 2 * plan.hosts - 1 - r] for r in range(plan.hosts)]
    assert [[block.index for block in host.blocks] for host in plan.host_plans] == expected
    assert all(block.rank == host.rank for host in plan.host_plans for block in host.blocks)
    assert plan.owner == (0 if plan.layout == "zigzag" else plan.hosts - 1)


@given(plan=plans())
def test_blocks_are_as_even_as_a_shorter_end_allows(plan):
    count = plan.hosts * (2 if plan.layout == "zigzag" else 1)
    lengths = [block.tokens for block in plan.blocks]
    block = -(-plan.tokens // count)
    assert len(lengths) == count
    assert lengths == [max(0, min(block, plan.tokens - i * block)) for i in range(count)]


@given(plan=plans())
def test_positions_are_true(plan):
    for rank, host in enumerate(plan.host_plans):
        expected = anchor_rows_of(plan, rank)
        for block in host.blocks:
            expected += range(block.start, block.stop)
        expected += range(plan.tokens, plan.tokens + host.query_rows)
        assert plan.positions(rank).tolist() == expected
        assert len(expected) == host.rows
        assert [plan.positions(rank)[span].tolist() for span in host.block_spans] == [
            list(range(block.start, block.stop)) for block in host.blocks
        ]


@given(plan=plans(), leading=LEADING)
def test_host_rows_are_anchor_with_the_query_inside_then_blocks_then_the_running_query(plan, leading):
    ids = torch.arange(plan.tokens).expand(*leading, -1)
    query = (1000 + torch.arange(plan.query)).expand(*leading, -1)
    s, asked = min(plan.query_offset, plan.anchor), list(range(1000, 1000 + plan.query))
    for rank, host in enumerate(plan.host_plans):
        rows = plan.host_rows(rank, ids, query)
        assert rows.shape == (*leading, host.rows)
        anchor = [*range(s), *(asked if plan.query_in == "anchor" else []), *range(s, plan.anchor)]
        expected = [anchor[row] for row in anchor_rows_of(plan, rank)]
        for block in host.blocks:
            expected += range(block.start, block.stop)
        expected += asked if plan.query_in == "prefill" else []
        assert rows[(0,) * len(leading)].tolist() == expected


@given(plan=plans())
def test_the_anchor_never_reaches_the_second_block(plan):
    """Else a token would be seen twice, or a position used twice."""
    assert plan.anchor <= plan.block_tokens
    if len(plan.blocks) > 1 and plan.blocks[1].tokens:
        assert plan.anchor_rows <= plan.blocks[1].start
        assert not any(plan.anchor_rows > block.start for block in plan.blocks if block.sees_anchor and block.tokens)


@given(plan=plans())
def test_each_block_passes_its_best_and_receives_all_earlier_ones(plan):
    received = 0
    for block in plan.blocks:
        assert block.passing_tokens == received
        later = block.index < len(plan.blocks) - 1
        passable = [t for t in range(block.start, block.stop) if t >= plan.anchor]
        assert block.kept_tokens == (min(plan.passing, len(passable)) if later else 0)
        assert block.skipped == block.tokens - len(passable)
        assert block.sees_anchor == (block.index > 0)
        received += block.kept_tokens


def test_a_zigzag_first_host_runs_the_anchor_for_its_second_block():
    plan = plan_context(tokens=16, hosts=2, anchor=2, layout="zigzag")
    assert [host.anchor_rows for host in plan.host_plans] == [2, 2]
    assert [host.anchor_rows for host in plan_context(tokens=16, hosts=2, anchor=2).host_plans] == [0, 2]


@given(plan=plans())
def test_a_split_anchor_is_run_once_and_in_even_shares(plan):
    rows = [anchor_rows_of(plan, rank) for rank in range(plan.hosts)]
    assert [[row for span in host.anchor_spans for row in range(*span)] for host in plan.host_plans] == rows
    if plan.split_anchor:
        assert sorted(row for mine in rows for row in mine) == list(range(plan.anchor_rows if any(rows) else 0))
        assert max(map(len, rows)) - min(map(len, rows)) <= 2
        work = [sum(row + 1 for row in mine) for mine in rows]  # row i sees i + 1 keys
        assert max(work) - min(work) <= 3 * plan.anchor_rows


@given(arguments=plan_arguments())
def test_plans_are_values(arguments):
    plan = plan_context(**arguments)
    assert plan == plan_context(**arguments) and hash(plan) == hash(plan_context(**arguments))
    for frozen, name in ((plan, "tokens"), (plan.blocks[0], "start"), (plan.host(0), "rank")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, 7)
    with pytest.raises(TypeError):
        plan_context(7, 2)


@given(plan=plans())
def test_the_text_names_every_block(plan):
    text = str(plan)
    assert len(text.splitlines()) == 2 + len(plan.blocks)
    assert all(f"[{block.start}, {block.stop})" in text for block in plan.blocks)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 0}, "tokens: expected an integer ≥ 1, got 0"),
        ({"tokens": 7.0}, "tokens: expected an integer ≥ 1, got 7.0"),
        ({"tokens": True}, "tokens: expected an integer ≥ 1, got True"),
        ({"hosts": 0}, "hosts: expected an integer ≥ 1, got 0"),
        ({"anchor": -1}, "anchor: expected an integer ≥ 0, got -1"),
        ({"passing": -2}, "passing: expected an integer ≥ 0, got -2"),
        ({"query": -1}, "query: expected an integer ≥ 0, got -1"),
        ({"query_offset": -1}, "query_offset: expected an integer ≥ 0, got -1"),
        ({"query_offset": 3}, "query_offset: the query follows 3 document tokens in the anchor, which has 2"),
        ({"layout": "ring"}, r"layout: expected one of \('contiguous', 'zigzag'\), got 'ring'"),
        ({"query_in": "both"}, r"query_in: expected one of \('anchor', 'prefill', 'after'\), got 'both'"),
        ({"anchor": 7}, "anchor: 7 tokens reach into the second block.*at most block_tokens = 6.*fewer hosts"),
        ({"anchor": 4, "layout": "zigzag"}, "anchor: 4 tokens reach into the second block.*block_tokens = 3"),
        ({"query": 5}, "query: 5 tokens beside an anchor of 2 .*0 … 6.*second block at 6.*at most 4 query"),
        ({"query": 4, "hosts": 1, "layout": "zigzag", "tokens": 10}, "query: 4 tokens beside an anchor of 2"),
    ],
)
def test_a_plan_that_is_not_possible_says_why_and_the_way_out(change, says):
    good = {"tokens": 12, "hosts": 2, "anchor": 2, "passing": 1, "query": 1, "query_offset": 1}
    plan_context(**good)
    with pytest.raises(ValueError, match=says):
        plan_context(**(good | change))


def test_lengths_that_are_not_the_plans_are_named():
    plan = plan_context(tokens=5, hosts=2, query=2)
    document, query = torch.arange(5), torch.arange(2)
    with pytest.raises(ValueError, match="x: 4 tokens along dim -1, the plan is for 5"):
        plan.split(document[:4])
    with pytest.raises(ValueError, match=r"parts: lengths \[2, 3\] along dim -1, the plan's hosts hold \[3, 2\]"):
        plan.join(plan.split(document)[::-1])
    with pytest.raises(ValueError, match=r"parts: lengths \[3\]"):
        plan.join(plan.split(document)[:1])
    with pytest.raises(ValueError, match="document: 4 tokens, the plan is for 5"):
        plan.host_rows(0, document[:4], query)
    with pytest.raises(ValueError, match="query: 3 tokens, the plan is for 2"):
        plan.host_rows(0, document, torch.arange(3))
