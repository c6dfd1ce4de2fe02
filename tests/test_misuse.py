"""Modules put together wrongly: refused with one clear error, before anything is computed or sent."""

import re

import pytest
import torch

from apb.compress import Candidates, KeyNorm, QueryAware, load_retaining_head
from apb.context import Context
from apb.methods import APB, APE, Flash, MInference, Ring, Star, Ulysses
from apb.parallel import run_threads
from apb.parallel.passing import PassingBlocks
from apb.session import Session
from apb.testing.tiny import tiny_model

KEY_NORM = APB(anchor=2, passing=3, compressor=KeyNorm())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"anchor": -1, "passing": 0}, "anchor: expected an integer ≥ 0, got -1"),
        ({"anchor": 0, "passing": -1}, "passing: expected an integer ≥ 0, got -1"),
        ({"anchor": 2.0, "passing": 1}, "anchor: expected an integer ≥ 0, got 2.0"),
        ({"anchor": 2, "passing": 1, "compressor": "query-aware"}, "compressor: expected a Compressor such as"),
    ],
)
def test_a_method_that_cannot_be_says_why(settings, says):
    with pytest.raises(ValueError, match=says):
        APB(**settings)


def test_a_plan_for_another_number_of_hosts_is_refused():
    plan = KEY_NORM.plan(tokens=20, hosts=2)
    with pytest.raises(ValueError, match="plan: made for 2 hosts, but the group has 3"):
        run_threads(3, lambda host: PassingBlocks(plan, host))


def test_passing_blocks_are_started_once_each_in_order_and_all_before_the_wait():
    plan = KEY_NORM.plan(tokens=20, hosts=1)
    k = torch.zeros(1, 2, 0, 16)

    def start(host, *slots):
        passing = PassingBlocks(plan, host)
        for slot in slots:
            passing.start(slot, torch.cat((k, k), dim=-1))
        return passing.wait(plan.blocks[0])

    for slots in [(1,), (-1,), (0, 0)]:
        with pytest.raises(ValueError, match=f"slot: expected .*got {slots[-1]}"):
            run_threads(1, start, *slots)
    with pytest.raises(ValueError, match="0 of 1 gathers are started"):
        run_threads(1, start)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_rope_that_depends_on_the_length_is_refused_on_several_hosts(rope):
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    plan = KEY_NORM.plan(tokens=20, hosts=2)
    with pytest.raises(ValueError, match=f"RoPE of type '{rope}' depends on the length that each host sees"):
        run_threads(2, lambda host: Session(model, KEY_NORM, plan, host))


def test_a_session_whose_prefill_failed_refuses_to_go_on():
    plan = KEY_NORM.plan(tokens=20, hosts=1)

    def fail(done, total):
        raise OSError("no more room")

    def body(host):
        session = Session(tiny_model(), KEY_NORM, plan, host, on_layer=fail)
        document = torch.arange(20)[None]
        with pytest.raises(OSError, match="no more room"):
            session.prefill(document, document[:, :0])
        with pytest.raises(ValueError, match="an earlier call failed half-way"):
            session.prefill(document, document[:, :0])

    run_threads(1, body)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"v": torch.zeros(1, 2, 9, 16)}, r"k, v: expected .* got \(1, 2, 8, 16\) and \(1, 2, 9, 16\)"),
        ({"q": torch.zeros(1, 3, 8, 16)}, r"q: expected \[batch 1, a multiple of 2 heads .*got \(1, 3, 8, 16\)"),
        ({"query": torch.zeros(1, 2, 3, 16)}, r"query: expected .*got \(1, 2, 3, 16\)"),
        ({"query": torch.zeros(1, 4, 0, 16)}, r"query: expected .*at least 1 tokens.*got \(1, 4, 0, 16\)"),
    ],
)
def test_candidates_that_do_not_fit_each_other_are_named(change, says):
    k = torch.zeros(1, 2, 8, 16)
    good = {"q": torch.zeros(1, 4, 8, 16), "k": k, "v": k, "query": torch.zeros(1, 4, 3, 16)}
    with pytest.raises(ValueError, match=says):
        QueryAware().compress(Candidates(**(good | change)), 3)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pt"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(250)))
    with pytest.raises(ValueError, match=f"retaining heads: cannot read .*{name} as a checkpoint"):
        load_retaining_head(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list; expected a flat state dict"):
        load_retaining_head(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("method", "maker", "hosts", "says"),
    [
        (
            Ulysses(),
            Ring(layout="zigzag"),
            3,
            "plan: Ulysses takes layout='contiguous', got 'zigzag'; make the plan with",
        ),
        (Ring(), Star(), 3, "plan: Ring takes no anchor and no query in the prefill, got an anchor of 7"),
        (Star(), APE(), 3, "plan: Star takes shared_prefix=False, got True"),
        (APE(), Star(), 3, "plan: APE takes shared_prefix=True, got False"),
        (Star(), APB(anchor=2, passing=0, compressor=KeyNorm()), 3, "plan: Star takes no query in the prefill"),
        (Flash(), Ring(), 3, "hosts: flash attention runs on one host, got 3"),
        (MInference(), Ring(), 3, "hosts: MInference runs on one host, got 3"),
        (APB(), APE(), 3, "plan: APB takes no shared prefix"),
    ],
)
def test_a_plan_of_another_method_is_refused(method, maker, hosts, says):
    plan = maker.plan(tokens=20, hosts=hosts, query=2)
    with pytest.raises(ValueError, match=re.escape(says)):
        rows = [[torch.zeros(1, 2, plan.host(rank).rows, 16)] * 3 for rank in range(hosts)]
        run_threads(hosts, lambda host: method.attend(*rows[host.rank], Context(plan, host)))


@pytest.mark.parametrize("method", [Ring(), Ulysses(), Star(), APE(), APB(anchor=0, passing=1, compressor=KeyNorm())])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_plan_for_another_group_is_refused_alike(method, group):
    plan = method.plan(tokens=20, hosts=3)

    def body(host):
        rows = [torch.zeros(1, 2, plan.host(0).rows, 16)] * 3
        with pytest.raises(ValueError, match=f"plan: made for 3 hosts, but the group has {group}; plan with hosts="):
            method.attend(*rows, Context(plan, host))

    run_threads(group, body)
