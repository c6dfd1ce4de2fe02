"""The backward pass on a GPU: every dtype and head dim against float64, compiled, at the edge of memory, over hosts."""

import pytest
import torch
from attention_cases import draw_inputs, lay_out
from gradient_cases import assert_gradients, draw_grads

from apb.attend import masked_attention
from apb.parallel import run_processes, run_threads
from apb.parallel.passing import PassingBlocks
from apb.plan import plan_context
from apb.reference import apb_mask

pytestmark = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)
DIMS = (16, 32, 64, 80, 96, 112, 128, 192, 256)
SHAPES = [(0, 0, 1), (0, 0, 300), (129, 0, 0), (33, 70, 1), (128, 128, 256), (200, 333, 517), (1, 0, 1000)]


def check(q, k, v, anchor, passing, layout="dense"):
    grads = draw_grads(0, q, layout)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = masked_attention(*inputs, anchor_tokens=anchor, passing_tokens=passing, backend="triton")
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


PLAN = plan_context(tokens=1024, hosts=2, anchor=0, passing=100)


def over_hosts(host, multithreading=False):
    """Attend to what PassingBlocks yields, each block passing its first tokens, and go back."""
    block = PLAN.host(host.rank).blocks[0]
    rows = slice(block.start, block.stop)
    draw = draw_inputs(0, (1, 2, 2), 1024, 1024, 64, torch.bfloat16)
    inputs = [x[:, :, rows].contiguous().to(host.device).requires_grad_() for x in draw]
    q, k, v = inputs
    passing = PassingBlocks(PLAN, host)
    passing.start(0, *(x[:, :, : block.kept_tokens] for x in (k, v)))
    received = passing.wait(block)
    keys, values = (torch.cat(pair, dim=2) for pair in zip(received, (k, v), strict=True))
    out, _ = masked_attention(q, keys, values, anchor_tokens=0, passing_tokens=received[0].shape[2], backend="triton")
    grad = draw_grads(0, draw[0])[0][:, :, rows].to(host.device)
    with torch.autograd.set_multithreading_enabled(multithreading):
        return [x.cpu() for x in torch.autograd.grad(out, inputs, grad)]


def check_hosts(found):
    q, k, v = draw_inputs(0, (1, 2, 2), 1024, 1024, 64, torch.bfloat16)
    row, column = torch.arange(1024)[:, None], torch.arange(1024)[None]
    mask = (column <= row) & ((row // 512 == column // 512) | (column % 512 < 100))
    whole = [torch.cat(parts, dim=2) for parts in zip(*found, strict=True)]
    assert_gradients(whole, q, k, v, mask, draw_grads(0, q)[0], torch.zeros(q.shape[:-1]))


def test_threads_that_share_a_gpu():
    check_hosts(run_threads(2, over_hosts, device="cuda"))
    with pytest.raises(RuntimeError, match="set_multithreading_enabled"):
        run_threads(2, over_hosts, True, device="cuda")


@pytest.mark.multigpu
def test_processes_over_nccl():
    check_hosts(run_processes(2, over_hosts, True, backend="nccl"))
