"""The backward pass on a GPU: every dtype and head dim against float64, compiled, at the edge of memory, over hosts."""

from contextlib import nullcontext

import pytest
import torch
from attention_cases import assert_attention, draw_inputs, lay_out
from gradient_cases import assert_gradients, draw_grads

from apb import reference
from apb.attend import decode_attention, masked_attention
from apb.merge import merge
from apb.parallel import run_processes, run_simulated, run_threads
from apb.parallel.passing import PassingBlocks
from apb.plan import plan_context
from apb.reference import apb_mask

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)
DIMS = (16, 32, 64, 80, 96, 112, 128, 192, 256)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
SHAPES = [(0, 0, 1), (0, 0, 300), (129, 0, 0), (33, 70, 1), (128, 128, 256), (200, 333, 517), (1, 0, 1000)]


def check(q, k, v, anchor, passing, layout="dense", backend="triton"):
    grads = draw_grads(0, q, layout)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = masked_attention(*inputs, anchor_tokens=anchor, passing_tokens=passing, backend=backend)
    found = torch.autograd.grad((out, lse), inputs, grads)
    assert_gradients(found, q, k, v, apb_mask(q.shape[2], k.shape[2], anchor, passing), *grads)
    return found


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_dtypes_and_head_dims(dtype, dim):
    for seed, (anchor, passing, block) in enumerate(SHAPES):
        q, k, v = draw_inputs(seed, (2, 2, 2), anchor + block, anchor + passing + block, dim, dtype, device="cuda")
        check(q, k, v, anchor, passing)


@pytest.mark.parametrize("layout", ["tokens_first", "step_2", "nan_around"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layouts_and_left_out_anchor_rows(dtype, layout):
    for rows in (1, 517, 600, 717):
        q, k, v = draw_inputs(rows, (2, 2, 3), rows, 1050, 128, dtype, layout, device="cuda")
        check(q, k, v, 200, 333, layout)


def test_auto_takes_a_backend_with_a_gradient():
    q, k, v = (x.requires_grad_() for x in draw_inputs(0, (1, 2, 2), 300, 400, 128, torch.bfloat16, device="cuda"))
    out, _ = masked_attention(q, k, v, anchor_tokens=100, passing_tokens=100)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_equal_bits_every_time():
    q, k, v = draw_inputs(1, (2, 2, 4), 1200, 1700, 128, torch.bfloat16, device="cuda")
    once, twice = (check(q, k, v, 300, 500) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))


def test_operators():
    q, k, v = (x.requires_grad_() for x in draw_inputs(3, (1, 2, 2), 90, 120, 64, torch.float16, device="cuda"))
    out, lse = masked_attention(q, k, v, anchor_tokens=40, passing_tokens=30, backend="triton")
    torch.library.opcheck(torch.ops.apb.masked_flash.default, (q, k, v, 40, 30, 0.125))
    saved = [x.detach() for x in (q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.apb.masked_flash_backward.default, (*draw_grads(3, q), *saved, 40, 30, 0.125, True))


def test_compiled_with_changing_lengths():
    def loss(q, k, v, anchor, passing):
        out, lse = masked_attention(2 * q, k, v, anchor_tokens=anchor, passing_tokens=passing, backend="triton")
        return out.float().square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for anchor, passing, block in [(10, 20, 40), (33, 64, 70), (100, 1, 200)]:
        sizes = anchor + block, anchor + passing + block
        inputs = [x.requires_grad_() for x in draw_inputs(0, (1, 2, 2), *sizes, 64, torch.float16, device="cuda")]
        pairs = zip(*(torch.autograd.grad(f(*inputs, anchor, passing), inputs) for f in (loss, compiled)), strict=True)
        for x, y in pairs:
            torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)


def test_inputs_at_the_end_of_an_allocation():
    """Tensors that end where their memory ends: reading on would fault, or take up the NaN that follows."""
    for columns in (1, 127, 129, 1000):
        for dim in (64, 80):
            ends = []
            for x in draw_inputs(columns, (1, 1, 2), columns, columns, dim, torch.float16, device="cuda"):
                flat = torch.full((2**20,), torch.nan, dtype=x.dtype, device="cuda")
                flat[-x.numel() :] = x.flatten()
                ends.append(flat[-x.numel() :].view_as(x))
            check(*ends, 0, 0)
            torch.cuda.synchronize()


def test_offsets_beyond_two_to_the_31():
    """Tokens 2^22 elements apart, so that the last lie beyond 2^31."""
    apart, tokens = 2**22, 700
    store = torch.empty(tokens * apart, dtype=torch.float16, device="cuda")
    q, small_k, small_v = draw_inputs(1, (1, 1, 1), tokens, tokens, 64, torch.float16, device="cuda")
    for step in (1, 2):
        k, v = (store.as_strided((1, 1, tokens, 64), (tokens * apart,) * 2 + (apart, step), at) for at in (0, 2**20))
        k.copy_(small_k)
        v.copy_(small_v)
        grads = draw_grads(1, q)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = masked_attention(*inputs, anchor_tokens=0, passing_tokens=0, backend="triton")
        found = torch.autograd.grad((out, lse), inputs, grads)
        assert_gradients(found, q, small_k, small_v, apb_mask(tokens, tokens, 0, 0), *grads)


def test_an_expanded_gradient():
    q, k, v = (x.requires_grad_() for x in draw_inputs(4, (1, 2, 2), 300, 400, 64, torch.bfloat16, device="cuda"))
    out, _ = masked_attention(q, k, v, anchor_tokens=50, passing_tokens=100, backend="triton")
    by_sum = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    by_ones = torch.autograd.grad(out, (q, k, v), lay_out(torch.ones_like(out), "dense"))
    assert all(torch.allclose(x, y, atol=1e-2, rtol=1e-2) for x, y in zip(by_sum, by_ones, strict=True))


@on_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", HALF)
def test_hopper_dtypes_and_head_dims(dtype, dim):
    for seed, (anchor, passing, block) in enumerate(SHAPES):
        q, k, v = draw_inputs(seed, (2, 2, 2), anchor + block, anchor + passing + block, dim, dtype, device="cuda")
        check(q, k, v, anchor, passing, backend="hopper")


@on_hopper
@pytest.mark.parametrize("layout", ["tokens_first", "step_2", "nan_around"])
def test_hopper_layouts_and_left_out_anchor_rows(layout):
    for rows in (1, 517, 717):
        q, k, v = draw_inputs(rows, (2, 2, 3), rows, 1050, 128, torch.bfloat16, layout, device="cuda")
        check(q, k, v, 200, 333, layout, backend="hopper")


@on_hopper
@pytest.mark.parametrize("dtype", HALF)
def test_hopper_output_and_lse_have_gradients_of_their_own(dtype):
    q, k, v = draw_inputs(2, (1, 2, 2), 300, 420, 128, dtype, device="cuda")
    grads = draw_grads(2, q)
    for only in (0, 1):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        results = masked_attention(*inputs, anchor_tokens=90, passing_tokens=120, backend="hopper")
        found = torch.autograd.grad(results[only], inputs, grads[only])
        alone = [x if i == only else torch.zeros_like(x) for i, x in enumerate(grads)]
        assert_gradients(found, q, k, v, apb_mask(300, 420, 90, 120), *alone)


@on_hopper
def test_hopper_operator():
    pytest.importorskip("apb.kernels.hopper")  # registers it
    q, k, v = (x.requires_grad_() for x in draw_inputs(3, (1, 2, 2), 90, 120, 64, torch.float16, device="cuda"))
    torch.library.opcheck(torch.ops.apb.hopper_flash.default, (q, k, v, 40, 30, 0.125))
    torch.library.opcheck(torch.ops.apb.hopper_flash.default, (q, k, v, 0, 0, 0.125, False))


@on_hopper
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_hopper_many_rows_of_a_cache(causal, dim):
    for seed, columns in enumerate((300, 333, 1000)):
        q, k, v = draw_inputs(seed, (2, 2, 2), 300, columns, dim, torch.bfloat16, device="cuda")
        mask = apb_mask(300, columns, 0, 0) if causal else torch.ones(300, columns, dtype=torch.bool)
        grads = draw_grads(seed, q)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = decode_attention(*inputs, causal=causal, backend="hopper")
        assert_attention(out.detach(), lse.detach(), q, k, v, mask, lse_atol=1e-4)
        assert_gradients(torch.autograd.grad((out, lse), inputs, grads), q, k, v, mask, *grads)


@pytest.mark.parametrize("backend", ["triton", pytest.param("hopper", marks=on_hopper)])
def test_forward_and_backward_in_a_cuda_graph(backend):
    """Replayed on other inputs: what a capture froze, or a buffer that it lost, would show."""
    draws = [draw_inputs(seed, (1, 2, 2), 300, 400, 128, torch.bfloat16, device="cuda") for seed in (0, 1)]
    grads = draw_grads(0, draws[0][0])
    inputs = [x.clone().requires_grad_() for x in draws[0]]

    def step():
        out, lse = masked_attention(*inputs, anchor_tokens=100, passing_tokens=100, backend=backend)
        return torch.autograd.grad((out, lse), inputs, grads)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compile before the capture
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for draw in (draws[1], draws[0]):
        with torch.no_grad():
            for x, y in zip(inputs, draw, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert_gradients(found, *draw, apb_mask(300, 400, 100, 100), *grads)


def test_a_merge_takes_a_backend_with_a_gradient():
    generator = torch.Generator("cuda").manual_seed(0)
    outs = torch.randn(3, 2, 2, 300, 64, generator=generator, device="cuda")
    lses = torch.randn(outs.shape[:-1], generator=generator, device="cuda")
    plain = merge(outs, lses)
    inputs = [x.clone().requires_grad_() for x in (outs, lses)]
    merged = merge(*inputs)
    torch.testing.assert_close(merged, plain)
    truth = [x.double().requires_grad_() for x in (outs, lses)]
    found, wanted = (
        torch.autograd.grad(out.square().sum() + lse.sum(), x)
        for (out, lse), x in ((merged, inputs), (reference.merge(*truth), truth))
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-4)


PLAN = plan_context(tokens=1024, hosts=2, anchor=0, passing=100)


def over_hosts(host, multithreading=None):
    """Attend to what PassingBlocks yields, each block passing its first tokens, and go back.

    `multithreading`: autograd's, on the way back; None leaves it as it is.
    """
    block = PLAN.host(host.rank).blocks[0]
    rows = slice(block.start, block.stop)
    draw = draw_inputs(0, (1, 2, 2), 1024, 1024, 64, torch.bfloat16)
    inputs = [x[:, :, rows].contiguous().to(host.device).requires_grad_() for x in draw]
    q, k, v = inputs
    passing = PassingBlocks(PLAN, host)
    passing.start(0, torch.cat((k, v), dim=-1)[:, :, : block.kept_tokens])
    received = passing.wait(block)
    keys, values = (torch.cat(pair, dim=2) for pair in zip(received, (k, v), strict=True))
    out, _ = masked_attention(q, keys, values, anchor_tokens=0, passing_tokens=received[0].shape[2], backend="triton")
    grad = draw_grads(0, draw[0])[0][:, :, rows].to(host.device)
    mode = nullcontext() if multithreading is None else torch.autograd.set_multithreading_enabled(multithreading)
    with mode:
        return [x.cpu() for x in torch.autograd.grad(out, inputs, grad)]


def check_hosts(found):
    q, k, v = draw_inputs(0, (1, 2, 2), 1024, 1024, 64, torch.bfloat16)
    row, column = torch.arange(1024)[:, None], torch.arange(1024)[None]
    mask = (column <= row) & ((row // 512 == column // 512) | (column % 512 < 100))
    whole = [torch.cat(parts, dim=2) for parts in zip(*found, strict=True)]
    assert_gradients(whole, q, k, v, mask, draw_grads(0, q)[0], torch.zeros(q.shape[:-1]))


def test_threads_that_share_a_gpu():
    for run in (run_threads, run_simulated):
        check_hosts(run(2, over_hosts, device="cuda"))
    check_hosts(run_threads(2, over_hosts, False, device="cuda"))
    with pytest.raises(RuntimeError, match="set_multithreading_enabled"):
        run_threads(2, over_hosts, True, device="cuda")


@pytest.mark.multigpu
def test_processes_over_nccl():
    for multithreading in (None, True):
        check_hosts(run_processes(2, over_hosts, multithreading, backend="nccl"))
