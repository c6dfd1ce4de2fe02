# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 7. From Triton to Hopper
#
# **Goal.** Turn the kernel of [tutorial 6](6_masked_flash_attention.md) into a fast one, and know without a GPU what
# will limit it: work that nobody needs, copies, registers, shared memory, the order of the tiles, and at last the
# tensor cores themselves.

# %%
import heapq
import inspect
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

import apb
from apb.bench.kernel import DIM, KV_HEADS, Q_HEADS, SHAPES, Shape, mask_pairs
from apb.bench.plots import newest_run, read_ledger
from apb.reference import apb_mask, attention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# %% [markdown]
# ## Groups and strides: copy nothing
#
# With **grouped-query attention** (GQA) several query heads share one head of keys and values: query head h reads KV
# head h // group. And tensors rarely lie in memory as a kernel would like. Keys and values that were passed on came in
# one message, side by side. The result is wanted row by row, all heads of a row together, for the next matrix product.
#
# PyTorch can repeat and rearrange, but each time it copies: repeated for the 32 query heads of Llama-3.1-8B, its 8
# heads of keys and values take four times the memory.
#
# A kernel that is told the **strides**, how far apart neighbours lie along each dimension, copies nothing. And to share
# heads it takes one division.
#
# ## Skip and sweep
#
# Row i sees the columns up to i, or up to i + |P| in the block. So for a tile of rows the columns fall into three runs:
# [0, full), which every row sees; [full, end), the diagonal; and [end, …), which no row sees. The first needs no
# mask, the last is never touched. You found the two bounds in tutorial 6. Here they are at work: two loops that share
# one step. (For short, rows of A and of B never share a tile here: |A| divides by BLOCK_M. And K and V, which came in
# one message, have the same strides.)


# %%
@triton.jit
def sweep(acc, peak, total, q_tile, k, v, lo, hi, limit, stride_kn, scale,
          D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    dims = tl.arange(0, D)
    for start in tl.range(lo, hi, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        exists = (column < hi)[:, None]
        k_tile = tl.load(k + column[:, None] * stride_kn + dims[None, :], mask=exists, other=0.0)
        v_tile = tl.load(v + column[:, None] * stride_kn + dims[None, :], mask=exists, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(column[None, :] <= limit[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        decay, weights = tl.exp(peak - new_peak), tl.exp(scores - new_peak[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        peak = new_peak
    return acc, peak, total


@triton.jit
def grouped_flash(q, k, v, out, rows, anchor, passing, group, scale,
                  stride_qh, stride_qn, stride_kh, stride_kn, stride_oh, stride_on,
                  D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    row, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = (row < rows)[:, None]
    q_tile = tl.load(q + head * stride_qh + row[:, None] * stride_qn + dims[None, :], mask=inside, other=0.0)
    k, v = k + head // group * stride_kh, v + head // group * stride_kh

    shift = tl.where(first < anchor, 0, passing)
    full = (first + shift + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M, rows) + shift
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc, peak, total = sweep(acc, peak, total, q_tile, k, v, 0, full, row, stride_kn, scale, D, BLOCK_N, False)
    acc, peak, total = sweep(acc, peak, total, q_tile, k, v, full, end, row + shift, stride_kn, scale, D, BLOCK_N, True)
    out += head * stride_oh + row[:, None] * stride_on + dims[None, :]
    tl.store(out, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


a, p, b, dim = 16, 24, 40, 16
q = 3 * torch.randn(4, a + b, dim, device=device)  # heads tokens dim
k, v = torch.randn(a + p + b, 2, 2 * dim, device=device).transpose(0, 1).chunk(2, dim=-1)  # K and V side by side
out = torch.empty(a + b, 4, dim, device=device).transpose(0, 1)  # a row's heads together
strides = [stride for x in (q, k, out) for stride in x.stride()[:2]]
grid = (triton.cdiv(a + b, 16), len(q))
grouped_flash[grid](q, k, v, out, a + b, a, p, 2, dim**-0.5, *strides, D=dim, BLOCK_M=16, BLOCK_N=16)
truth, _ = attention(q[None], k[None], v[None], apb_mask(a + b, a + p + b, a, p))
torch.testing.assert_close(out, truth[0].float(), atol=1e-5, rtol=1e-5)
print("agrees with the reference: 4 query heads, 2 KV heads, no copy")

# %% [markdown]
# ## How much is skipped
#
# Count the tiles of a real shape: the last of 8 hosts with a document of 32K tokens. Of all tiles, only the diagonal
# ones pay for comparing columns with limits.

# %%
shape, group = SHAPES[0], Q_HEADS // KV_HEADS  # tokens of anchor, passing block and block
blocks_a, blocks_p, blocks_b = (tokens // 128 for tokens in shape[:3])
row, column = np.arange(blocks_a + blocks_b)[:, None], np.arange(blocks_a + blocks_p + blocks_b)
limit = row + np.where(row < blocks_a, 0, blocks_p)
tiles = (column < limit) + 2 * (column == limit)  # 0 nobody sees it, 1 everybody does, 2 the diagonal
shares = [f"{(tiles == kind).mean():.1%} {name}" for kind, name in enumerate(("skipped", "without a mask", "diagonal"))]
print(f"{shape}: {' × '.join(map(str, tiles.shape))} tiles of 128 × 128: {', '.join(shares)}")

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
axis.imshow(tiles, cmap=plt.matplotlib.colors.ListedColormap(["white", "#4878a8", "#e8a33d"]))
axis.set(xlabel="tiles of keys: anchor, passing block, block", ylabel="tiles of rows", title=str(shape))
figure.set_label("Tiles: a small triangle for the anchor's rows, for the block's a wide rectangle and a triangle.")

# %% [markdown]
# ## What limits a tile
#
# A larger tile reads less: per byte of keys and values a tile of M rows does M operations. But the M × D sums live in
# **registers**, at most 255 for each thread; what does not fit **spills** to slow memory. Tiles on their way in wait in
# **shared memory**, and on an A100 (sm_80) a program can have 163 KB of it, on an H100 (sm_90) 227 KB. The compiler
# knows all this, and the compiler needs no GPU. `apb.kernels.aot` asks it. (In a process of its own: in this one Triton
# interprets.)

# %%
COMPILE = """
import torch
from apb.kernels import aot

types, reports = {x: "*bf16" for x in ("q", "k", "v", "out")} | {"scale": "fp32"}, {}
for capability, m, n, warps in (80, 128, 64, 8), (90, 128, 64, 8), (90, 128, 128, 4):
    reports[f"yours, sm_{capability}, {m} × {n}, {warps} warps"] = aot.compile_kernel(
        grouped_flash, types, {"D": 128, "BLOCK_M": m, "BLOCK_N": n}, capability=capability, warps=warps, stages=2)
reports["library's, sm_90"] = aot.report_masked_flash(torch.bfloat16, 128, 90, tma=True)
reports["library's Hopper kernel"] = aot.report_hopper(torch.bfloat16, 128)
for name, x in reports.items():
    numbers = f"{x.registers:>10}{x.spill_bytes:>7} B{x.shared_bytes / 1024:>11.0f}"
    print(f"{name:<35}{numbers}{'  SERIALISED' * x.wgmma_serialised}")
"""
with tempfile.TemporaryDirectory() as folder:
    sources = [inspect.getsource(kernel.fn) for kernel in (sweep, grouped_flash)]
    file = Path(folder, "compile_both.py")  # a file: Triton reads a kernel's source from there
    file.write_text("\n\n".join(["import triton\nimport triton.language as tl", *sources, COMPILE]))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, file], env=environment, stdout=subprocess.PIPE, text=True, check=True)
print(f"{'':<35} registers  spilled  shared KB\n{done.stdout}")

# %% [markdown]
# On sm_90 the same source becomes other instructions: **wgmma**, products that a group of four warps starts and does
# not wait for. With a 128 × 128 tile on 4 warps the sums do not fit: registers spill, and the assembler makes every
# product wait for the one before ("serialised"). Nothing would be wrong with the result, and a
# test would pass. So the library compiles all its kernels in its tests and looks for just that.
#
# The last two lines use what only Hopper has. We come to that; first the rest of the machine. What the last kernel
# spills are numbers put aside between its loops; inside them it spills nothing, which the tests count, too.
#
# ## The order of tiles
#
# An H100 has 132 multiprocessors. Each takes the next tile when it is done with one, and tiles differ: the later a row,
# the more it sees. Who comes last decides how long all wait. Play it through, with as much time for a tile as it has
# tiles of keys to read:


# %%
def finish(lengths, workers=132):
    """Give each tile to the worker that is free first; return when the last one is done."""
    free = [0] * workers
    for length in lengths:
        heapq.heapreplace(free, free[0] + int(length))
    return max(free)


lengths = (tiles > 0).sum(axis=1)  # key tiles that each tile of rows reads, the first rows first
even = Q_HEADS * lengths.sum() / 132
naive, ours = finish(np.tile(lengths, Q_HEADS)), finish(np.tile(np.repeat(lengths[::-1], group), KV_HEADS))
print(f"head by head, first rows first: {naive / even - 1:.1%} longer than if all ended together")
print(f"KV head by KV head, last rows first, query heads side by side: {ours / even - 1:.1%} longer")
assert ours < naive

# %% [markdown]
# The second order is our kernels'. Short tiles come last and fill the gaps. It does a second thing: at any time the
# multiprocessors read the same few keys, which then stay in the chip's L2 cache. You will write it below.
#
# ## The roofline
#
# A kernel computes and it moves data, and the slower of the two limits it. Attention takes 4 · d operations a pair and
# query head (two products, a multiplication and an addition each). At the least it reads q, k, v once and writes the
# output once. The ratio, operations a byte, is its **intensity**. Where does the ledger put our kernels?


# %%
def intensity(shape):
    rows, columns = shape.anchor * shape.anchor_rows + shape.block, sum(shape[:3])
    moved = 2 * DIM * (2 * Q_HEADS * rows + 2 * KV_HEADS * columns)
    return 4 * DIM * Q_HEADS * mask_pairs(shape) / moved


ledger = read_ledger(Path(apb.__file__).parent.parent / "benchmarks" / "ledger.csv")
run = newest_run(ledger, "masked_attention")
roof = next(row.tflops for row in run if row.backend == "cublas")  # a large matrix product
copy = max([row.gbytes for row in ledger if (row.backend, row.device) == ("cuda", run[0].device)], default=np.nan)
decode = Shape(0, sum(shape[:3]), 1, anchor_rows=False)  # one new token and a cache
print(f"{run[0].device}: a large product runs at {roof:.0f} TFLOP/s, a large copy at {copy:.0f} GB/s")
print(f"FLOP/byte: {intensity(shape):.0f} of the prefill, {intensity(decode):.0f} of decoding with as many keys")

shapes, span = {str(x): intensity(x) for x in SHAPES}, np.geomspace(1, 1e5)
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
axis.plot(span, np.minimum(roof, span * copy / 1e3), "k--", label="ceiling")
for backend in ("hopper", "triton", "fa3", "cudnn"):
    points = [(shapes[row.case], row.tflops) for row in run if row.backend == backend and row.case in shapes]
    flops, speeds = zip(*points, strict=True)
    axis.plot(flops, speeds, "o", label=f"{backend}: {min(speeds):.0f} to {max(speeds):.0f} TFLOP/s")
axis.axvline(intensity(decode), color="gray", linestyle=":", label="decode")
axis.set(xscale="log", xlabel="FLOP/byte", ylabel="TFLOP/s", title=f"{run[0].device}, {run[0].date}, {run[0].commit}")
axis.legend(fontsize=8, loc="lower right")
figure.set_label("TFLOP/s by FLOP/byte: the prefill far right, under a flat ceiling; decoding under a slope.")

# %% [markdown]
# Decoding reads each key for the few query heads of a group, so its intensity is about the group's size: memory is the
# limit, by far. That takes another kernel, which splits the keys over many programs. For the prefill all that counts
# is how busy the tensor cores are. (The ceiling is a measured product, not a law; a good kernel may pass it.) What
# keeps them waiting?
#
# ## What Hopper adds
#
# - **TMA**, a copy engine: one thread names a tile, and it arrives (`cp.async.bulk`). No registers, no address
#   arithmetic.
# - **wgmma**, products that go on by themselves.
# - **Warp specialisation**: some warps only fetch and others only compute, and `setmaxnreg` gives the ones' registers
#   to the others.
#
# So softmax, which needs no tensor core, can run *under* a product. `apb/kernels/hopper_kernel.py` does it twice over.
# Let P be what softmax makes of the scores Q Kᵀ, and j count the tiles of keys. A consumer (four warps, 64 rows) issues
# Q Kⱼᵀ before Pⱼ₋₁ Vⱼ₋₁, and takes the scores into the softmax while the second product runs. And two consumers take
# turns at the tensor cores.
#
# Say that a tile's two products take one unit of time together, and its softmax s. One after the other they take 1 + s,
# and the tensor cores are busy 1 / (1 + s) of the time. With the next scores issued first, the softmax has the second
# product, half a unit, to hide under: the tile takes max(1, ½ + s). And if another consumer's products fill what gap is
# left, then up to s = 1½ there is none. FlashAttention-3 estimates s at half a unit for the exponentials alone (arXiv
# 2407.08608). In the picture above *hopper* is this kernel, *triton* the one without consumers, and *fa3* is
# FlashAttention-3 itself.
#
# The compiler's report gave the registers of a thread at launch. Then the fetching warp keeps 24 of them, and the
# consumers take 240 each: 64 × 128 sums and as many scores are 128 registers a thread, before anything else.
#
# ## A softmax that looks for no maximum
#
# At full load, power sets a GPU's clock: instructions that are left out are a higher clock for those that are left. Of
# the five or six that the online softmax spends on a score, two can go. It takes each block's maximum and rescales what
# it has, so that no exponential overflows; but it need not be *the* maximum. Any number will do that keeps the
# exponentials in range, and whether it does can be seen from their sum, which is needed in any case. So this kernel
# keeps the first block's maximum. When a sum is above 2¹², it goes back to the block's scores, takes their maximum, and
# rescales. How often is that?

# %%
blocks = (6 * torch.randn(256, 16384)).view(256, 128, 128)  # rows, blocks, scores
sums = torch.exp2(blocks[:, 1:] - blocks[:, :1].amax(-1, keepdim=True)).sum(-1)
print(f"weighed by their row's first maximum, {(sums > 2**12).float().mean():.1%} of later blocks add up to too much")

# %% [markdown]
# The kernel decides for 16 rows at once, those of a warp. Where the first token is a sink of attention, as in many
# models, the first block's maximum is likely to be the row's for good; where scores keep growing, every block costs a
# second softmax. The result is exact attention in any case; only the time depends on the scores.
#
# ## Your turn
#
# A GPU only knows program numbers 0, 1, 2, …; `tiles · group · kv_heads` of them. Write the order of our kernels: KV
# head by KV head; in each the last tile of rows first; and the query heads that share the keys side by side.


# %%
def locate(program, tiles, group):
    raise NotImplementedError  # your code: return kv_head, tile, member (which of the group's query heads)


# %%
def check(solution):
    for kv_heads, tiles, group in ((2, 3, 4), (1, 5, 1), (3, 1, 2)):
        for program, expected in enumerate(product(range(kv_heads), reversed(range(tiles)), range(group))):
            found = solution(program, tiles, group)
            assert found == expected, f"{tiles} tiles, groups of {group}: program {program} is {expected}, not {found}"
    return "Right."


try:
    print(check(locate))
except NotImplementedError:
    print("Nothing written yet: fill in locate, then run this cell again.")


# %% tags=["answer"]
def answer(program, tiles, group):
    kv_head, rest = divmod(program, tiles * group)
    return kv_head, tiles - 1 - rest // group, rest % group


# %% [markdown]
# ## What the library does for you
#
# - `masked_attention(…, backend="triton")` is this kernel for any lengths, batch and dtype, with TMA where there is
#   some; `backend="hopper"` is the one with consumers. Both agree with `apb.reference`.
# - `python -m apb.kernels.aot 90` compiles every kernel for a GPU you do not have and prints what you saw above.
# - `apb bench kernel` measures them on one you have, next to FlashAttention-3, cuDNN and FlexAttention.
#
# **Read next:** [8. Is it right](8_is_it_right.md), or the [module page of attention](../modules/attention.md).
