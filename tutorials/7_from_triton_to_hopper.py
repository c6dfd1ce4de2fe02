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
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

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
# PyTorch can repeat and rearrange, but each time it copies. At the size of one host at 128K tokens, in bfloat16:

# %%
from apb.bench.kernel import DIM, KV_HEADS, Q_HEADS, SHAPES, Shape, mask_pairs

shape = SHAPES[1]  # anchor, passing block, block, with Llama-3.1-8B's heads
columns, group = shape.anchor + shape.passing + shape.block, Q_HEADS // KV_HEADS
kv_bytes = 2 * KV_HEADS * columns * DIM * 2
print(f"{shape}: K and V {kv_bytes / 1e6:.0f} MB; repeated for {Q_HEADS} heads {group * kv_bytes / 1e6:.0f} MB")

# %% [markdown]
# A kernel that is told the **strides**, how far apart neighbours lie along each dimension, copies nothing. And to share
# heads it takes one division.
#
# ## Skip and sweep
#
# Row i sees the columns up to i, or up to i + |P| in the block. So for a tile of rows the columns fall into three runs:
# [0, full), which every row sees; [full, stop), the diagonal; and [stop, …), which no row sees. The first needs no
# mask, the last is never touched. You found the two bounds in tutorial 6. Here they are at work: two loops that share
# one step. (For short, rows of A and of B never share a tile here: |A| divides by BLOCK_M.)


# %%
@triton.jit
def sweep(acc, peak, total, q_tile, k, v, lo, hi, limit, stride_kn, stride_vn, scale,
          D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    dims = tl.arange(0, D)
    for start in tl.range(lo, hi, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        exists = (column < hi)[:, None]
        k_tile = tl.load(k + column[:, None] * stride_kn + dims[None, :], mask=exists, other=0.0)
        v_tile = tl.load(v + column[:, None] * stride_vn + dims[None, :], mask=exists, other=0.0)
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
                  stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_oh, stride_on,
                  D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    row, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, D)
    inside = (row < rows)[:, None]
    q_tile = tl.load(q + head * stride_qh + row[:, None] * stride_qn + dims[None, :], mask=inside, other=0.0)
    k, v = k + head // group * stride_kh, v + head // group * stride_vh

    shift = tl.where(first < anchor, 0, passing)
    full = (first + shift + 1) // BLOCK_N * BLOCK_N
    stop = tl.minimum(first + BLOCK_M, rows) + shift
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc, peak, total = sweep(acc, peak, total, q_tile, k, v, 0, full, row, stride_kn, stride_vn, scale,
                             D, BLOCK_N, False)  # fmt: skip
    acc, peak, total = sweep(acc, peak, total, q_tile, k, v, full, stop, row + shift, stride_kn, stride_vn, scale,
                             D, BLOCK_N, True)  # fmt: skip
    acc = acc / total[:, None]
    tl.store(out + head * stride_oh + row[:, None] * stride_on + dims[None, :], acc.to(out.dtype.element_ty),
             mask=inside)  # fmt: skip


a, p, b, dim = 16, 24, 40, 16
q = 3 * torch.randn(4, a + b, dim, device=device)  # heads tokens dim
k, v = torch.randn(a + p + b, 2, 2 * dim, device=device).transpose(0, 1).chunk(2, dim=-1)  # K and V side by side
out = torch.empty(a + b, 4, dim, device=device).transpose(0, 1)  # a row's heads together
strides = [stride for x in (q, k, v, out) for stride in x.stride()[:2]]
grid = (triton.cdiv(a + b, 16), len(q))
grouped_flash[grid](q, k, v, out, a + b, a, p, 2, dim**-0.5, *strides, D=dim, BLOCK_M=16, BLOCK_N=16)
truth, _ = attention(q[None], k[None], v[None], apb_mask(a + b, a + p + b, a, p))
torch.testing.assert_close(out, truth[0].float(), atol=1e-5, rtol=1e-5)
print("agrees with the reference: 4 query heads, 2 KV heads, no copy")

# %% [markdown]
# ## How much is skipped
#
# Count the tiles of the real shape. Of all tiles, only the diagonal ones pay for comparing columns with limits.

# %%
import matplotlib.pyplot as plt
import numpy as np


def tile_map(shape, block=128):
    """Say of each tile of rows × keys: 0 nobody sees it, 1 everybody does, 2 the diagonal."""
    a, p, b = (x // block for x in shape[:3])
    row, column = np.arange(a + b)[:, None], np.arange(a + p + b)[None, :]
    limit = row + np.where(row < a, 0, p)
    return (column < limit) + 2 * (column == limit)


tiles = tile_map(shape)
shares = [f"{(tiles == kind).mean():.1%} {name}" for kind, name in enumerate(("skipped", "without a mask", "diagonal"))]
print(f"{tiles.shape[0]} × {tiles.shape[1]} tiles of 128 × 128: {', '.join(shares)}")

figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
axis.imshow(tile_map(SHAPES[0]), cmap=plt.matplotlib.colors.ListedColormap(["white", "#4878a8", "#e8a33d"]))
axis.set(xlabel="tiles of keys: anchor, passing block, block", ylabel="tiles of rows", title=str(SHAPES[0]))
figure.set_label(
    "A map of tiles. The anchor's rows make a small triangle at the upper left, the block's a wide rectangle and a "
    "triangle behind it. One orange tile a row marks the diagonal; white tiles are skipped."
)

# %% [markdown]
# ## What limits a tile
#
# A larger tile reads less: per byte of keys and values a tile of M rows does M operations. But the M × D sums live in
# **registers**, at most 255 for each thread; what does not fit **spills** to slow memory. Tiles on their way in wait in
# **shared memory**, and on an A100 (sm_80) a program can have 163 KB of it, on an H100 (sm_90) 227 KB. The compiler
# knows all this, and the compiler needs no GPU. `apb.kernels.aot` asks it. (In a process of its own: in this one Triton
# interprets.)

# %%
import inspect
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILE = """
import os, tempfile, torch
from pathlib import Path
from apb.kernels import aot

def show(name, build):
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        report = build()
        code = next(Path(folder).rglob("*.ptx")).read_text()
    found = [word for word in ("mma.sync", "wgmma", "cp.async.bulk", "setmaxnreg") if word in code]
    found += ["SERIALISED"] * report.wgmma_serialised
    numbers = f"{report.registers:>10}{report.spill_bytes:>7} B{report.shared_bytes / 1024:>11.0f}"
    print(f"{name:<35}{numbers}  {', '.join(found)}")

types = {x: "*bf16" for x in ("q", "k", "v", "out")} | {"scale": "fp32"}
for capability, m, n, warps in (80, 128, 64, 8), (90, 128, 64, 8), (90, 128, 128, 4):
    constants = {"D": 128, "BLOCK_M": m, "BLOCK_N": n}
    show(f"yours, sm_{capability}, {m} × {n}, {warps} warps", lambda: aot.compile_kernel(
        grouped_flash, types, constants, capability=capability, warps=warps, stages=2))
show("library's, sm_90", lambda: aot.report_masked_flash(torch.bfloat16, 128, 90, tma=True))
show("library's Hopper kernel", lambda: aot.report_hopper(torch.bfloat16, 128))
"""
with tempfile.TemporaryDirectory() as folder:
    sources = [inspect.getsource(kernel.fn) for kernel in (sweep, grouped_flash)]
    file = Path(folder, "compile_both.py")  # a file: Triton reads a kernel's source from there
    file.write_text("\n\n".join(["import triton\nimport triton.language as tl", *sources, COMPILE]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, file], env=environment, stdout=subprocess.PIPE, text=True, check=True)
print(f"{'':<35} registers  spilled  shared KB  instructions\n{run.stdout}")

# %% [markdown]
# The same source became other instructions: `mma.sync` on sm_80, and on sm_90 **wgmma**, products that a group of four
# warps starts and does not wait for. With a 128 × 128 tile on 4 warps the sums do not fit: registers spill, and the
# assembler makes every product wait for the one before ("serialised"). Nothing would be wrong with the result, and a
# test would pass. So the library compiles all its kernels in its tests and looks for just that.
#
# The last two lines use what only Hopper has. We come to that; first the rest of the machine.
#
# ## The order of tiles
#
# An H100 has 132 multiprocessors. Each takes the next tile when it is done with one, and tiles differ: the later a row,
# the more it sees. Who comes last decides how long all wait. Each bar below is a tile; its length is the number of key
# tiles it reads.

# %%
import heapq
from itertools import product


def schedule(lengths, workers=132):
    """Give each tile to the worker that is free first; return (worker, start, length) of each."""
    free, placed = [(0, worker) for worker in range(workers)], []
    for length in lengths:
        start, worker = heapq.heappop(free)
        placed.append((worker, start, length))
        heapq.heappush(free, (start + length, worker))
    return placed


lengths = (tile_map(SHAPES[0]) > 0).sum(axis=1)  # key tiles that each tile of rows reads, the first rows first
orders = {
    "first rows first, head by head": [(head // group, int(x)) for head in range(Q_HEADS) for x in lengths],
    "as in our kernels": [(kv, int(x)) for kv in range(KV_HEADS) for x in lengths[::-1] for _ in range(group)],
}
best = Q_HEADS * lengths.sum() / 132
figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
ends = {}
for axis, (name, order) in zip(axes, orders.items(), strict=True):
    placed = schedule([length for _, length in order])
    ends[name] = max(start + length for _, start, length in placed)
    colours = [plt.cm.tab10(kv) for kv, _ in order]
    for (worker, start, length), colour in zip(placed, colours, strict=True):
        if worker % 6 == 0:  # every sixth multiprocessor
            axis.barh(worker, length, left=start, height=5, color=colour, edgecolor="white", linewidth=0.3)
    axis.axvline(best, color="black", linestyle="--")
    axis.set_title(f"{name}: {ends[name] / best - 1:.1%} longer than if all ended together", fontsize=10, loc="left")
    axis.set(ylabel="multiprocessor", xlim=(0, 1.02 * max(ends.values())))
axes[1].set_xlabel("time, in tiles of keys (a colour a KV head; dashed: all work shared out evenly)")
figure.set_label(
    "Timelines of 132 multiprocessors. With the first rows first, long bars start late and stick out beyond the dashed "
    "line. In our kernels' order long tiles come first, short ones fill the gaps, and all end together."
)
assert ends["as in our kernels"] < ends["first rows first, head by head"]

# %% [markdown]
# Our order does a second thing. It takes one KV head after the other, and the query heads that share it side by side.
# So at any time the multiprocessors read the same few keys, which then stay in the chip's L2 cache.
#
# ## The roofline
#
# A kernel computes and it moves data, and the slower of the two limits it. Attention takes 4 · d operations a pair and
# query head (two products, a multiplication and an addition each). At the least it reads q, k, v once and writes the
# output once. The ratio, operations a byte, is its **intensity**. Where does the ledger put our kernels?

# %%
import apb
from apb.bench.plots import newest_run, read_ledger

ledger = read_ledger(Path(apb.__file__).parent.parent / "benchmarks" / "ledger.csv")
run = newest_run(ledger, "masked_attention")
roof = next(row.tflops for row in run if row.backend == "cublas")  # a large matrix product
copies = [row.gbytes for row in run if row.backend == "cuda"]  # a large copy
print(f"{run[0].device}, {run[0].date}: a large product runs at {roof:.0f} TFLOP/s")


def intensity(shape):
    rows, columns = shape.anchor * shape.anchor_rows + shape.block, sum(shape[:3])
    moved = 2 * DIM * (2 * Q_HEADS * rows + 2 * KV_HEADS * columns)
    return 4 * DIM * Q_HEADS * mask_pairs(shape) / moved


decode = Shape(0, columns, 1, anchor_rows=False)  # one new token and a cache
for name, x in ((f"prefill {shape}", intensity(shape)), (f"decode, {columns} keys", intensity(decode))):
    print(f"{name:<28} {x:>7.0f} FLOP/byte: computing is the limit if memory gives {1e3 * roof / x:,.0f} GB/s or more")
print(f"a copy in the same run: {copies[0]:.0f} GB/s" if copies else "a copy's speed is not in this run yet")

measured = [row for row in run if "/" in row.case and row.tflops > 0]
shapes = {}
for case in dict.fromkeys(row.case for row in measured):
    tokens, _, part = case.partition(", ")
    shapes[case] = Shape(*map(int, tokens.split("/")), anchor_rows=not part)
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
span = np.geomspace(1, 1e5)
axis.plot(span, np.minimum(roof, span * (copies[0] / 1e3 if copies else np.inf)), "k--", label="ceiling")
for backend in dict.fromkeys(row.backend for row in measured):
    mine = [row for row in measured if row.backend == backend]
    axis.plot([intensity(shapes[row.case]) for row in mine], [row.tflops for row in mine], "o-", label=backend)
axis.axvline(intensity(decode), color="#b0578d", linestyle=":", label="decode")
axis.set(xscale="log", xlabel="FLOP/byte", ylabel="TFLOP/s", ylim=(0, None))
axis.set_title(f"{run[0].device}, {run[0].date}, commit {run[0].commit}", fontsize=10)
axis.legend(fontsize=8, loc="center")
figure.set_label(
    "FLOP/byte across, TFLOP/s up. The prefill lies thousands of operations a byte out, under the dashed ceiling of a "
    "large matrix product; decoding is a dotted line at the far left."
)

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
# Play it through. Say that a tile's two products take one unit of time together, and its softmax 0.8. (FlashAttention-3
# estimates half a unit for the exponentials alone, arXiv 2407.08608.)

# %%
SOFTMAX, KEY_TILES = 0.8, 6


def lanes(consumers, scores_first):
    """Play KEY_TILES steps of each consumer; return (lane, start, length, consumer), lane 0 the tensor cores."""
    cores_free, ready, done = 0.0, [0.0] * consumers, []
    for j in range(KEY_TILES + 1):
        for me in range(consumers):  # they take turns
            start = max(cores_free, ready[me])
            products = ["scores"] * (j < KEY_TILES) + ["values"] * (j > 0)  # Q K of this tile, P V of the one before
            for what in products if scores_first else products[::-1]:
                done.append((0, start, 0.5, me))
                start += 0.5
                if what == "scores":
                    done.append((1 + me, start, SOFTMAX, me))
                    ready[me] = start + SOFTMAX
            cores_free, ready[me] = start, max(start, ready[me])
    return done


plans = {"one after the other": (1, False), "scores first": (1, True), "scores first, two take turns": (2, True)}
figure, axes = plt.subplots(3, 1, figsize=(9, 4.2), sharex=True, layout="constrained", height_ratios=(2, 2, 3))
for axis, (name, (consumers, scores_first)) in zip(axes, plans.items(), strict=True):
    done = lanes(consumers, scores_first)
    for lane, start, length, me in done:
        axis.barh(
            lane, length, left=start, color=("#4878a8", "#4f9d69")[me], edgecolor="white", alpha=0.5 if lane else 1
        )
    share = KEY_TILES * consumers / max(start + length for lane, start, length, _ in done if lane == 0)
    axis.set_title(f"{name}: tensor cores busy {share:.0%} of the time", fontsize=10, loc="left")
    axis.set_yticks(range(1 + consumers), ["tensor cores", *["softmax"] * consumers], fontsize=8)
    axis.invert_yaxis()
figure.set_label(
    "Timelines of tensor cores and softmax. First they wait for each other; then the softmax starts under a product; "
    "at last two consumers alternate, and the tensor cores have almost no gap."
)

# %% [markdown]
# The compiler's report gave the registers of a thread at launch. Then the fetching warp keeps 24 of them, and the
# consumers take 240 each: 64 × 128 sums and as many scores are 128 registers a thread, before anything else.
#
# ## What was measured
#
# The roofline's points are the ledger's newest run. What is not in it has not been measured:

# %%
print(f"{run[0].device}, torch {run[0].torch}, triton {run[0].triton}, {run[0].date}, commit {run[0].commit}")
for backend in ("triton", "hopper", "fa3", "cudnn"):
    speeds = [f"{row.tflops:.0f} ({row.case})" for row in measured if row.backend == backend]
    print(f"{backend:<6} TFLOP/s (anchor/passing/block): {', '.join(speeds) or 'not in this run'}")

# %% [markdown]
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
        order = product(range(kv_heads), reversed(range(tiles)), range(group))
        for program, expected in enumerate(order):
            found = solution(program, tiles, group)
            assert found is not None and tuple(found) == expected, (
                f"{tiles} tiles, groups of {group}: program {program} has KV head, tile, member {expected}, not {found}"
            )
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
