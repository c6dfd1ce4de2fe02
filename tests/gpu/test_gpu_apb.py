"""The whole of APB on a GPU: the modules composed, a model on thread hosts, and NCCL against both."""

import pytest
import torch

import apb
from apb.generate import generate
from apb.hf import share_weights
from apb.parallel import run_processes, run_simulated, run_threads
from apb.prompt import Prompt
from apb.reference import apb_mask, attention
from apb.testing.tiny import tiny_model
from apb.testing.tolerance import assert_rows_close, eager_attention

pytestmark = pytest.mark.gpu

METHODS = {
    "anchor": apb.methods.APB(anchor=12, passing=9),
    "prefill": apb.methods.APB(anchor=12, passing=9, query_in="prefill"),
    "zigzag": apb.methods.APB(anchor=6, passing=5, layout="zigzag", compressor=apb.compress.SnapKV()),
    "exact": apb.methods.APB(anchor=0, passing=200, compressor=apb.compress.KeyNorm()),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_host_attends_as_the_reference_on_its_passing_block(dtype):
    method = apb.methods.APB(anchor=64, passing=48)
    plan = method.plan(tokens=1000, hosts=4, query=20, query_offset=8)

    def body(host):
        draw = torch.Generator().manual_seed(host.rank)
        rows = plan.host(host.rank).rows
        q, k, v = (torch.randn(2, heads, rows, 64, generator=draw).to(host.device, dtype) for heads in (8, 2, 2))
        trace = apb.Trace(keep_indices=True)
        out = method.attend(6 * q, k, v, apb.Context(plan, host, trace=trace))
        return 6 * q, k, v, out, trace.kept

    hosts = run_threads(4, body, device="cuda")
    for rank in range(1, 4):
        q, k, v, out, _ = hosts[rank]
        passed = []
        for other in range(rank):
            share, block = plan.host(other), plan.blocks[other]
            at = hosts[other][4][0, other] - block.start + share.anchor_rows
            passed.append([x.gather(2, at[..., None].expand(-1, -1, -1, 64)) for x in hosts[other][1:3]])
        a = plan.host(rank).anchor_rows
        k, v = (torch.cat((x[:, :, :a], *(p[i] for p in passed), x[:, :, a:]), dim=2) for i, x in enumerate((k, v)))
        mask = apb_mask(q.shape[2], k.shape[2], a, k.shape[2] - q.shape[2]).cuda()
        truth, _ = attention(q, k, v, mask)
        eager = eager_attention(q, k, v, mask)
        assert_rows_close(out, truth, eager=eager, value_scale=float(v.abs().max()))


def answer(host, name, weights=None):
    model = share_weights(weights) if weights is not None else tiny_model(layers=3).to(host.device)
    draw = torch.Generator().manual_seed(5)
    document, query = (torch.randint(0, 97, (2, n), generator=draw) for n in (101, 6))
    prompt = Prompt(document=document, query=query, suffix=query[:, :2], prefix_tokens=3)
    return generate(model, METHODS[name], host, prompt, max_new_tokens=8).tokens.tolist()


@pytest.mark.parametrize("name", list(METHODS))
def test_hosts_on_one_gpu_answer_as_on_the_cpu(name):
    weights = tiny_model(layers=3)
    on_cpu = run_threads(3, answer, name, weights)
    weights = weights.cuda()
    assert run_threads(3, answer, name, weights, device="cuda") == on_cpu
    assert run_simulated(3, answer, name, weights, device="cuda") == on_cpu


@pytest.mark.multigpu
@pytest.mark.parametrize("name", list(METHODS))
def test_nccl_answers_as_threads(name):
    weights = tiny_model(layers=3).cuda()
    assert run_processes(2, answer, name, backend="nccl") == run_threads(2, answer, name, weights, device="cuda")
