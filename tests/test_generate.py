"""Generation: the same tokens whatever the hosts are, agreed on before anything moves."""

import pytest
import torch
from generation_cases import NEW, answer, greedy, prompt_of

from apb.compress import KeyNorm
from apb.generate import generate
from apb.hf import share_weights
from apb.methods import APB, Flash
from apb.parallel import HostFailed, PlanMismatch, run_processes, run_simulated, run_threads
from apb.prompt import Prompt
from apb.sampling import Sampling
from apb.testing.tiny import tiny_model

RUNNERS = {"threads": run_threads, "simulated": run_simulated, "gloo": run_processes}


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize(
    ("method", "suffix"),
    [
        (APB(anchor=4, passing=3), 2),
        (APB(anchor=4, passing=3, query_in="prefill", layout="zigzag"), 2),
        (APB(anchor=4, passing=3, query_in="prefill"), 0),
        (APB(anchor=4, passing=3, layout="zigzag"), 0),
    ],
)
def test_every_kind_of_host_answers_as_the_oracle(model, kind, method, suffix):
    prompt = prompt_of(suffix=suffix)
    results = RUNNERS[kind](3, answer, model, method, prompt, timeout_s=30)
    plan = method.plan(tokens=50, hosts=3, query=3, query_offset=2)
    expected = greedy(model, plan, prompt, NEW)
    for rank, (tokens, result) in enumerate(results):
        assert torch.equal(tokens, expected)
        assert result.plan == plan
        assert set(result.phase_ms) >= {"plan", "prefill", "query", "decode", "compress", "pass", "attend"}
        assert result.counters.messages["passing"] == 2 * plan.blocks_per_host  # two layers
        assert result.counters.messages["token"] == NEW
        assert result.cost.rows == plan.host(rank).rows


def test_one_host_answers_as_the_model_itself(model):
    prompt = prompt_of()
    tokens, _ = run_threads(1, answer, model, Flash(), prompt)[0]
    model.set_attn_implementation("sdpa")
    ids = torch.cat((prompt.document, prompt.query, prompt.suffix), dim=1)
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(tokens, expected[:, ids.shape[1] :])


def options_run(model, prompt, hosts=2, **options):
    method = APB(anchor=4, passing=3)
    return run_threads(hosts, lambda host: answer(host, model, method, prompt, **options)[1])


def test_a_row_repeats_its_stop_token_and_all_rows_end_together(model):
    prompt = prompt_of(batch=2)
    free = options_run(model, prompt)[0].tokens
    first, second = free.tolist()
    stop = next(t for t in first if t not in second)  # stops the first row alone
    at = first.index(stop)
    expected = torch.tensor([first[: at + 1] + [stop] * (NEW - 1 - at), second])
    for result in options_run(model, prompt, stop_tokens=[stop]):
        assert torch.equal(result.tokens, expected)
    both = options_run(model, prompt, stop_tokens=[stop, second[at + 1]])[0].tokens
    last = max(at, second.index(second[at + 1]))
    assert both.shape == (2, last + 1)
    assert torch.equal(both, torch.tensor([first[: at + 1] + [stop] * (last - at), second[: last + 1]]))


def test_a_batch_answers_as_its_items_alone(model):
    prompt = prompt_of(batch=2)
    together = options_run(model, prompt, max_new_tokens=6)[0].tokens
    for row in range(2):
        one = Prompt(
            **{name: getattr(prompt, name)[row : row + 1] for name in ("document", "query", "suffix")}, prefix_tokens=2
        )
        assert torch.equal(options_run(model, one, max_new_tokens=6)[0].tokens, together[row : row + 1])


@pytest.mark.parametrize("kind", ["threads", "gloo"])
def test_a_row_ends_for_all_hosts_if_one_says_so(model, kind):
    """Only ranks 0 and 2 of three watch, each another row; and one host ends an answer for two."""
    prompt, told = prompt_of(batch=2), {}

    def body(host, ends):
        def on_token(number, ids):
            told.setdefault(host.rank, []).append(number)
            return [number == at for at in ends[host.rank]]

        watching = on_token if host.rank in ends else None
        return answer(host, model, APB(anchor=4, passing=3), prompt, on_token=watching)[1]

    free = options_run(model, prompt, hosts=3)[0].tokens.tolist()
    for result in RUNNERS[kind](3, body, {0: (3, -1), 2: (-1, 1)}):
        assert result.lengths == [4, 2]
        assert result.tokens.tolist() == [free[0][:4], free[1][:2] + [free[1][1]] * 2]
    if kind == "threads":
        assert told == {0: [0, 1, 2, 3], 2: [0, 1, 2, 3]}
    free = options_run(model, prompt)[0].tokens
    for result in RUNNERS[kind](2, body, {0: (2, 2)}):
        assert torch.equal(result.tokens, free[:, :3]) and result.lengths == [3, 3]
    for result in RUNNERS[kind](2, body, {0: (NEW - 1, NEW - 1)}):  # with the last one
        assert torch.equal(result.tokens, free)


def test_the_walk_can_be_watched(model):
    seen = []
    results = options_run(
        model,
        prompt_of(),
        hosts=1,
        max_new_tokens=3,
        keep_indices=True,
        on_token=lambda number, ids: seen.append((number, ids.tolist())),
        on_phase=lambda *phase: seen.append(phase),
    )
    layers = [("prefill", 0, 0), ("prefill", 1, 2), ("prefill", 2, 2)]
    assert seen[:6] == [("plan", 0, 0), *layers, ("query", 0, 0), ("decode", 0, 0)]
    assert seen[6:] == [(i, column.tolist()) for i, column in enumerate(results[0].tokens.T)]
    plan = results[0].plan
    assert {key: x.shape[-1] for key, x in results[0].kept.items()} == {
        (layer, block.index): block.kept_tokens for layer in range(2) for block in plan.blocks
    }


@pytest.mark.parametrize("kind", ["threads", "gloo"])
@pytest.mark.parametrize("what", ["document", "method", "max_new_tokens", "sampling"])
def test_hosts_that_came_with_different_questions_all_say_so(model, kind, what, tmp_path):
    def body(host):
        odd = host.rank == 1
        prompt = prompt_of()
        if what == "document" and odd:
            prompt.document[0, 7] += 1
        method = APB(anchor=4, passing=2 if what == "method" and odd else 3)
        try:
            count = 2 if what == "max_new_tokens" and odd else 3
            sampling = Sampling(temperature=1.0) if what == "sampling" and odd else None
            answer(host, model, method, prompt, max_new_tokens=count, sampling=sampling)
        except PlanMismatch as error:
            (tmp_path / str(host.rank)).write_text(str(error))
            raise

    with pytest.raises(PlanMismatch, match="plan: the 3 hosts must hold the same value, but ranks") as raised:
        RUNNERS[kind](3, body)
    assert "ranks [0, 2] hold" in str(raised.value) and "ranks [1] hold" in str(raised.value)
    assert len({(tmp_path / str(rank)).read_text() for rank in range(3)}) == 1


def test_hosts_that_made_the_same_method_each_for_themselves_agree(model):
    """A pooling function has an address in its text, and another one in every process."""

    def body(host):
        method = APB(anchor=4, passing=3, compressor=KeyNorm(pool=lambda scores: scores))
        return answer(host, model, method, prompt_of(), max_new_tokens=2)[0]

    first, second = run_threads(2, body)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("where", ["plan", "prefill"])
def test_an_error_on_one_host_reaches_all(model, kind, where, tmp_path):
    def body(host):
        mine = share_weights(model)
        method = Flash() if host.rank == 1 and where == "plan" else APB(anchor=4, passing=3)
        if host.rank == 1 and where == "prefill":
            mine.model.layers[1].mlp.register_forward_hook(lambda *args: 1 / 0)
        try:
            generate(mine, method, host, prompt_of())
        except (HostFailed, ValueError, ZeroDivisionError) as error:
            (tmp_path / str(host.rank)).write_text(f"{type(error).__name__}: {error}")
            raise

    own, text = {
        "plan": (ValueError, "flash attention runs on one host"),
        "prefill": (ZeroDivisionError, "division by zero"),
    }[where]
    with pytest.raises(own, match=text):
        RUNNERS[kind](3, body)
    told = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert told[1].startswith(own.__name__)
    assert all(t.startswith("HostFailed: ") and "rank 1" in t and text in t for t in (told[0], told[2]))
