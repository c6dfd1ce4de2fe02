"""Every method on CUDA: thread hosts on one GPU and NCCL against the reference, row by row, and whole models."""

import pytest
import torch

from apb.attend import AShape
from apb.compress import KeyNorm
from apb.context import Context
from apb.generate import generate
from apb.hf import share_weights
from apb.methods import APB, APE, Flash, MInference, Ring, Star, Ulysses
from apb.parallel import run_processes, run_threads
from apb.prompt import Prompt
from apb.reference import ape_mask, ape_mix, attention, causal_mask, star_mask
from apb.testing.strategies import document_rows, held_rows, peaked
from apb.testing.tiny import tiny_model
from apb.testing.tolerance import assert_rows_close, eager_attention

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

HOSTS = max(1, min(4, torch.cuda.device_count()))
TOKENS, QUESTION, DIM = 1003, 5, 64
METHODS = {
    "flash": Flash(),
    "ring": Ring(),
    "ring-zigzag": Ring(layout="zigzag"),
    "ulysses": Ulysses(),
    "minference": MInference(pattern=AShape(sink=900, local=1003), dense_below=0),  # all selected: exact
    "star": Star(anchor=70),
    "ape": APE(prefix=33, temperature=0.8, scale=0.9),
    "apb": APB(anchor=0, passing=TOKENS, compressor=KeyNorm(), query_in="after"),  # all passed: exact
    "apb-star": APB(anchor=70, passing=0, compressor=KeyNorm(), query_in="after"),
}
SPREAD = [name for name, method in METHODS.items() if not method.one_host]


def rows_of(dtype, heads):
    """Draw q, k, v of the document and what follows it, on the CPU, alike on every host."""
    return tuple(x.to(dtype) for x in peaked(7, TOKENS + QUESTION + 1, heads=heads, dim=DIM, batch=2,
                                             dtype=torch.float32))  # fmt: skip


def attended(host, name, dtype, heads):
    """Prefill, ask and decode one token in one layer; return what this host holds of the outputs, on the CPU."""
    method = METHODS[name]
    plan = method.plan(tokens=TOKENS, hosts=host.world_size, query=QUESTION)
    everything = rows_of(dtype, heads)
    document = [x[:, :, :TOKENS] for x in everything]
    new = [x[:, :, TOKENS:].to(host.device) for x in everything]
    context = Context(plan, host)
    with torch.inference_mode():
        out = method.attend(*(document_rows(plan, host.rank, x).to(host.device) for x in document), context)
        held = torch.cat([out[:, :, span] for span in plan.host(host.rank).held_spans], dim=2)
        cache = [held_rows(plan, host.rank, x).to(host.device) for x in document[1:]]
        answers = []
        for rows in (slice(0, QUESTION), slice(QUESTION, QUESTION + 1)):
            if host.rank == plan.owner:
                cache = [torch.cat((x, y[:, :, rows]), dim=2) for x, y in zip(cache, new[1:], strict=True)]
            answers.append(method.decode(new[0][:, :, rows], *cache, context))
    return held.cpu(), torch.cat(answers, dim=2).cpu()


def check(name, dtype, heads, results):
    """Compare with float64 on the quantised inputs; the yardstick is the textbook formula in the working dtype."""
    method, hosts = METHODS[name], len(results)
    plan = method.plan(tokens=TOKENS, hosts=hosts, query=QUESTION)
    everything = [x.cuda() for x in rows_of(dtype, heads)]
    document, (new, keys, values) = [x[:, :, :TOKENS] for x in everything], everything
    new = new[:, :, TOKENS:]
    mask = causal_mask(TOKENS)
    if name in ("star", "apb-star"):
        mask = star_mask(TOKENS, hosts, 70)
    if name == "ape":
        mask = ape_mask(TOKENS, hosts, 33)
    mask, size = mask.cuda(), float(values.abs().max())
    if dtype == torch.float32:  # scores are rounded, too, as in `assert_attention`
        size *= 1 + DIM**-0.5 * float(everything[0].norm(dim=-1).max() * keys.norm(dim=-1).max())
    out = plan.join([held for held, _ in results], dim=2)
    assert out.dtype == dtype
    truth, eager = attention(*document, mask)[0], eager_attention(*document, mask)
    assert_rows_close(out, truth, eager=eager, value_scale=size)

    causal = causal_mask(TOKENS + QUESTION + 1)[TOKENS:].cuda()
    truth, eager = attention(new, keys, values, causal)[0], eager_attention(new, keys, values, causal)
    if name == "ape":  # no textbook formula: what rounding costs the exact attention of these rows
        rounding = (eager.double() - truth).abs().amax(dim=-1, keepdim=True)
        contexts = tuple(x[:, :, 33:TOKENS] for x in (keys, values))
        other = tuple(torch.cat((x[:, :, :33], x[:, :, TOKENS:]), dim=2) for x in (keys, values))
        truth = ape_mix(new, contexts, other, temperature=method.temperature, scale=method.scale)
        eager = truth + rounding
    for _, answers in results:
        assert_rows_close(answers, truth, eager=eager, value_scale=size)
        assert torch.equal(answers, results[0][1])


@pytest.mark.parametrize("heads", [(8, 2), (9, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", list(METHODS))
def test_thread_hosts_on_one_gpu_equal_the_reference(name, dtype, heads):
    hosts = 1 if METHODS[name].one_host else 4
    check(name, dtype, heads, run_threads(hosts, attended, name, dtype, heads, device="cuda"))


@pytest.mark.multigpu
@pytest.mark.parametrize("name", SPREAD)
def test_nccl_equals_the_reference(name):
    heads = (9, 3)
    check(name, torch.bfloat16, heads, run_processes(HOSTS, attended, name, torch.bfloat16, heads, backend="nccl"))


def answer(host, name, weights=None):
    model = share_weights(weights) if weights is not None else tiny_model(layers=3).to(host.device)
    draw = torch.Generator().manual_seed(5)
    document, query = (torch.randint(0, 97, (2, n), generator=draw) for n in (301, 6))
    prompt = Prompt(document=document, query=query, suffix=query[:, :2], prefix_tokens=3)
    return generate(model, METHODS[name], host, prompt, max_new_tokens=8).tokens.tolist()


@pytest.mark.parametrize("name", list(METHODS))
def test_a_model_answers_on_the_gpu_as_on_the_cpu(name):
    hosts, weights = 1 if METHODS[name].one_host else 3, tiny_model(layers=3)
    on_cpu = run_threads(hosts, answer, name, weights)
    assert run_threads(hosts, answer, name, weights.cuda(), device="cuda") == on_cpu


@pytest.mark.multigpu
@pytest.mark.parametrize("name", SPREAD)
def test_a_model_answers_over_nccl_as_on_threads(name):
    weights = tiny_model(layers=3).cuda()
    on_threads = run_threads(HOSTS, answer, name, weights, device="cuda")
    assert run_processes(HOSTS, answer, name, backend="nccl") == on_threads


def few_tokens(host, name):
    """Attend to fewer tokens than there are hosts, with fewer heads than hosts; return this host's rows."""
    method = METHODS[name]
    plan = method.plan(tokens=HOSTS - 1, hosts=HOSTS)
    document = [
        x[:, :, : HOSTS - 1].to(torch.bfloat16) for x in peaked(3, 8, heads=(1, 1), dim=DIM, dtype=torch.float32)
    ]
    return method.attend(
        *(document_rows(plan, host.rank, x).to(host.device) for x in document), Context(plan, host)
    ).cpu()


@pytest.mark.multigpu
@pytest.mark.parametrize("name", ["ring", "ring-zigzag", "ulysses"])
def test_nccl_with_hosts_that_have_no_row_or_no_head(name):
    plan = METHODS[name].plan(tokens=HOSTS - 1, hosts=HOSTS)
    document = [
        x[:, :, : HOSTS - 1].to(torch.bfloat16) for x in peaked(3, 8, heads=(1, 1), dim=DIM, dtype=torch.float32)
    ]
    out = plan.join(run_processes(HOSTS, few_tokens, name, backend="nccl"), dim=2)
    mask = causal_mask(HOSTS - 1)
    truth, eager = attention(*document, mask)[0], eager_attention(*document, mask)
    assert_rows_close(out, truth, eager=eager, value_scale=float(document[2].abs().max()))
