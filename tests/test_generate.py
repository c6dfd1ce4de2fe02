"""Generation: the same tokens whatever the hosts are, agreed on before anything moves; and prompts from text."""

import pytest
import torch

from apb.compress import KeyNorm
from apb.generate import generate, generate_batch
from apb.hf import share_weights
from apb.methods import APB, Flash, Ring
from apb.parallel import HostFailed, PlanMismatch, run_processes, run_simulated, run_threads
from apb.prompt import Prompt, build_prompt
from apb.sampling import Sampling
from apb.testing import oracle
from apb.testing.tiny import tiny_model

NEW = 12
RUNNERS = {"threads": run_threads, "simulated": run_simulated, "gloo": run_processes}


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


def draw(seed, count, batch=1):
    return torch.randint(97, (batch, count), generator=torch.Generator().manual_seed(seed))


def prompt_of(document=50, query=3, suffix=2, batch=2, prefix_tokens=2):
    lengths = (document, query, suffix)
    ids = [draw(seed, count, batch) for seed, count in enumerate(lengths)]
    return Prompt(document=ids[0], query=ids[1], suffix=ids[2], prefix_tokens=prefix_tokens)


def answer(host, model, method, prompt, **options):
    result = generate(share_weights(model), method, host, prompt, **({"max_new_tokens": NEW} | options))
    return result.tokens, result


def greedy(model, plan, prompt, count):
    """Answer with the slow oracle."""
    stack, chosen = oracle.Stack(model, plan, oracle.query_aware), []
    stack.prefill(prompt.document, prompt.query)
    rest = prompt.suffix if plan.query_in == "prefill" else torch.cat((prompt.query, prompt.suffix), dim=1)
    if plan.query_in == "prefill":  # the question has run along, so only what follows it is new
        logits = stack.extend(rest) if rest.shape[1] else model.lm_head(stack.hidden[-1][:, -1])
    else:
        logits = stack.extend(rest)
    while True:
        chosen.append(logits.argmax(dim=-1))
        if len(chosen) == count:
            return torch.stack(chosen, dim=-1)
        logits = stack.extend(chosen[-1][:, None])


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


LENGTHS = [(50, 3, 2), (41, 3, 2), (50, 3, 2), (50, 4, 0), (41, 3, 2), (50, 3, 2)]


def prompts_of(*lengths):
    return [
        Prompt(
            document=draw(10 * i, document, 1),
            query=draw(10 * i + 1, query, 1),
            suffix=draw(10 * i + 2, suffix, 1),
            prefix_tokens=2,
        )
        for i, (document, query, suffix) in enumerate(lengths)
    ]


def batch_run(model, prompts, method, hosts=2, **options):
    options = {"max_new_tokens": 5} | options
    return run_threads(hosts, lambda host: generate_batch(share_weights(model), method, host, prompts, **options))


@pytest.mark.parametrize("most", [None, 1, 2])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_k=20, seed=3)])
@pytest.mark.parametrize("method", [APB(anchor=4, passing=3), Ring()])
def test_prompts_of_different_lengths_answer_as_one_by_one(model, method, sampling, most):
    prompts = prompts_of(*LENGTHS)
    runs = batch_run(model, prompts, method, most=most, sampling=sampling)
    alone = [batch_run(model, [prompt], method, sampling=sampling)[0][0] for prompt in prompts]
    for results in runs:
        for prompt, result, one in zip(prompts, results, alone, strict=True):
            assert torch.equal(result.tokens, one.tokens)
            assert result.plan.tokens == prompt.document.shape[1] and result.logits.shape == (1, 97)
    assert [result.tokens.tolist() for result in runs[0]] == [result.tokens.tolist() for result in runs[1]]


def test_a_batch_ends_each_answer_where_it_would_end_alone(model):
    prompts = prompts_of(*LENGTHS)
    free = [result.tokens[0].tolist() for result in batch_run(model, prompts, Ring())[0]]
    stop, told = free[0][2], []
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    results = batch_run(
        model, prompts, Ring(), hosts=1, stop_tokens=[stop], on_token=lambda *told_one: told.append(told_one)
    )[0]
    assert [result.tokens[0].tolist() for result in results] == expected
    assert [result.lengths for result in results] == [[len(row)] for row in expected]
    for i, row in enumerate(expected):
        assert [(number, token) for at, number, token in told if at == i] == list(enumerate(row))
    ended = batch_run(model, prompts, Ring(), hosts=2, on_token=lambda i, number, token: number == i % 3)[0]
    assert [len(result.tokens[0]) for result in ended] == [1 + i % 3 for i in range(len(prompts))]


def test_a_batch_may_be_empty_and_its_bound_at_least_one(model):
    assert batch_run(model, [], Ring()) == [[], []]
    with pytest.raises(ValueError, match="most: expected at least 1 row in a batch, got 0"):
        batch_run(model, prompts_of((20, 2, 0)), Ring(), most=0)


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


TEXT = "the grass is green and the sky blue . what colour has ? answer : <s> <user> </user> <bot>"


def tokenizer_of(chat_template=None, bos_token=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["[UNK]", *TEXT.split()]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos_token)
    tokenizer.chat_template = chat_template
    return tokenizer


TEMPLATE = "<s> {% for m in messages %}<user> {{ m['content'] }} </user> {% endfor %}<bot>"


@pytest.mark.parametrize(
    ("settings", "head", "tail"),
    [
        ({}, "", ""),
        ({"bos_token": "<s>"}, "<s>", ""),
        ({"chat_template": TEMPLATE, "bos_token": "<s>"}, "<s> <user>", "</user> <bot>"),
    ],
)
def test_a_prompt_is_prefix_and_document_then_question_then_what_precedes_the_answer(settings, head, tail):
    tokenizer = tokenizer_of(**settings)
    prompt = build_prompt(
        tokenizer, " the grass is green . ", " what colour has the sky ?\n", answer_prefix=" answer :"
    )
    text = [" ".join(tokenizer.convert_ids_to_tokens(ids[0])) for ids in (prompt.document, prompt.query, prompt.suffix)]
    assert text == [f"{head} the grass is green .".strip(), "what colour has the sky ?", f"{tail} answer :".strip()]
    assert prompt.prefix_tokens == len(head.split())
    assert all(ids.dtype == torch.int64 for ids in (prompt.document, prompt.query, prompt.suffix))
    assert build_prompt(tokenizer, "the sky", "what ?").suffix.shape == (1, len(tail.split()))


def test_a_prompt_from_text_is_answered(model):
    prompt = build_prompt(tokenizer_of(TEMPLATE), " ".join(TEXT.split()[:9] * 5), "what colour has the sky ?")
    method = APB(anchor=6, passing=4)
    (tokens, result), *_ = run_threads(2, answer, model, method, prompt, timeout_s=30)
    assert result.plan.query_offset == 2 and tokens.shape == (1, NEW)
    assert torch.equal(tokens, greedy(model, result.plan, prompt, NEW))
