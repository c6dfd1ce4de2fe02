# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 6. Masked flash attention
#
# **Goal.** Compute attention under APB's mask without ever holding the matrix of scores, first in plain PyTorch, then
# as a Triton kernel of your own.
#
# Triton compiles kernels for a GPU. Without one, its *interpreter* runs the same kernel in Python, slowly but with the
# same result. It has to be asked for before `triton` is imported.

# %%
import os

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

from apb import masked_attention, merge_pair
from apb.reference import apb_mask, attention

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
a, p, b, dim = 8, 12, 24, 16  # tokens in the anchor A, the passing block P and the block B
rows, columns = a + b, a + p + b
q = 3 * torch.randn(1, 1, rows, dim, device=device)
k, v = (torch.randn(1, 1, columns, dim, device=device) for _ in range(2))

# %% [markdown]
# ## The mask
#
# Keys stand as [A, P, B], rows as [A, B]. Anchor row i sees A[0..i]; block row j sees all of A, all of P and B[0..j].
# So row i sees the columns up to i if it is in A, and up to i + |P| if it is in B: **causal attention whose limit jumps
# by the passing length at the block**.

# %%
mask = apb_mask(rows, columns, a, p).to(device)
limit = torch.arange(rows, device=device) + p * (torch.arange(rows, device=device) >= a)
assert torch.equal(mask, torch.arange(columns, device=device) <= limit[:, None])
truth, truth_lse = attention(q, k, v, mask)  # float64, the definition
scale = dim**-0.5

# %% [markdown]
# ## Online softmax
#
# [Tutorial 1](1_exact_attention_three_ways.md) read a row's keys one by one. It kept the largest score so far, the
# **peak**, and two sums, Σ e^(score − peak) and Σ e^(score − peak) · value, which it shrank whenever the peak rose. We
# do the same by **tiles**, here 8 rows and 8 keys at a time, so that the scores and the weighted values become products
# of matrices. No more than one tile of scores ever exists. That is FlashAttention's idea (arXiv 2205.14135). At the end
# the **log-sum-exp** (LSE), log Σ e^score, is the peak plus the logarithm of the first sum.


# %%
def flash_row_tile(q_tile, limits, tile=8):
    """Attend from some rows, `[rows, dim]`, each to the columns up to its limit; return output, LSE and tiles read."""
    peak = torch.full((len(q_tile),), -torch.inf, device=device)
    total = torch.zeros(len(q_tile), device=device)
    acc = torch.zeros(len(q_tile), dim, device=device)
    tiles_read = 0
    for start in range(0, int(limits.max()) + 1, tile):  # tiles past the last limit are never touched
        keys, values = k[0, 0, start : start + tile], v[0, 0, start : start + tile]
        seen = start + torch.arange(len(keys), device=device) <= limits[:, None]
        scores = (scale * q_tile @ keys.T).masked_fill(~seen, -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(dim=1))
        decay, weights = torch.exp(peak - new_peak), torch.exp(scores - new_peak[:, None])
        total = total * decay + weights.sum(dim=1)
        acc = acc * decay[:, None] + weights @ values
        peak, tiles_read = new_peak, tiles_read + 1
    return acc / total[:, None], peak + total.log(), tiles_read


outs, lses, read = zip(*(flash_row_tile(q[0, 0, i : i + 8], limit[i : i + 8]) for i in range(0, rows, 8)), strict=True)
torch.testing.assert_close(torch.cat(outs), truth[0, 0].float(), atol=1e-5, rtol=1e-5)
torch.testing.assert_close(torch.cat(lses), truth_lse[0, 0].float(), atol=1e-5, rtol=1e-5)
print(f"tiles of keys read by each tile of rows: {read}, of {-(-columns // 8)}")

# %% [markdown]
# Each tile of rows reads its tiles of keys from left to right. In a **full** tile (blue) every row sees every key, and
# the mask changes nothing. On the **diagonal** (orange) some scores are computed and then masked away (pale). All other
# tiles are **skipped** (white), neither loaded nor computed.

# %%
picture = torch.zeros(rows, columns)
figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
for top in range(0, rows, 8):
    for number, left in enumerate(range(0, columns, 8), start=1):
        seen = mask[top : top + 8, left : left + 8].cpu()
        if seen.any():
            picture[top : top + 8, left : left + 8] = 1 if seen.all() else 3 - seen.int()
            axes.text(left + seen.shape[1] / 2 - 0.5, top + 3.5, str(number), ha="center", va="center", fontsize=14)
assert read == tuple(int(line.any(dim=0)[::8].sum()) for line in picture.split(8))
axes.imshow(picture, cmap=ListedColormap(["white", "#9fb8d0", "#e8a33d", "#f6dfb8"]), vmin=0, vmax=3)
axes.hlines(torch.arange(8, rows, 8) - 0.5, -0.5, columns - 0.5, "white", linewidth=1)
axes.vlines(torch.arange(8, columns, 8) - 0.5, -0.5, rows - 0.5, "white", linewidth=1)
axes.set_xticks([-0.5, a - 0.5, a + p - 0.5], ["anchor", "passing block", "block"], ha="left")
axes.set_yticks([-0.5, a - 0.5], ["anchor", "block"], rotation=90, va="top")
axes.set(xlabel="keys", ylabel="rows")
figure.set_label(
    "A mask cut into tiles of 8 by 8. The first line of tiles, the anchor's, reads 1 tile, on the diagonal. The next "
    "three, the block's, read 4, 5 and 6: from the left full tiles, then two on the diagonal. The rest is empty."
)

# %% [markdown]
# ## The kernel
#
# In Triton one *program* computes one tile of rows; many programs run side by side. The Python loop becomes a loop over
# `tl.load`, `tl.dot` and the same five lines of online softmax. `BLOCK` is known when the kernel is compiled
# (`tl.constexpr`); `tl.arange` gives the indices within a tile; masked loads keep us inside the tensors.


# %%
@triton.jit
def my_flash(q, k, v, out, lse, rows, columns, anchor, passing, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    inside = (row < rows)[:, None]
    q_tile = tl.load(q + row[:, None] * D + dims[None, :], mask=inside, other=0.0)
    limit = row + tl.where(row < anchor, 0, passing)

    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    last = tl.minimum(tl.max(limit, 0) + 1, columns)
    for start in range(0, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists = (column < columns)[:, None]
        k_tile = tl.load(k + column[:, None] * D + dims[None, :], mask=exists, other=0.0)
        v_tile = tl.load(v + column[:, None] * D + dims[None, :], mask=exists, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale
        scores = tl.where(column[None, :] <= limit[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        decay, weights = tl.exp(peak - new_peak), tl.exp(scores - new_peak[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights, v_tile, input_precision="ieee")
        peak = new_peak
    tl.store(out + row[:, None] * D + dims[None, :], acc / total[:, None], mask=inside)
    tl.store(lse + row, peak + tl.log(total), mask=row < rows)


out, lse = torch.empty_like(q), torch.empty(rows, device=device)
my_flash[(triton.cdiv(rows, 16),)](q, k, v, out, lse, rows, columns, a, p, scale, D=dim, BLOCK=16)
torch.testing.assert_close(out, truth.float(), atol=1e-5, rtol=1e-5)
torch.testing.assert_close(lse, truth_lse[0, 0].float(), atol=1e-5, rtol=1e-5)
print("your kernel agrees with the reference")

# %% [markdown]
# ## The library's backends
#
# `apb.masked_attention` fixes the mathematics; `backend` only says who computes it. The library's kernel differs from
# yours in what makes it fast: it takes the keys that *every* row of a tile sees in a first sweep without any mask and
# only the diagonal in a second one, it handles grouped heads and any stride, and on GPUs that have it loads tiles with
# TMA. The mask is the same. [Tutorial 7](7_from_triton_to_hopper.md) takes your kernel there.

# %%
for backend in ("reference", "sdpa", "triton"):
    out, lse = masked_attention(q, k, v, anchor_tokens=a, passing_tokens=p, backend=backend)
    torch.testing.assert_close(out, truth.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, truth_lse.float(), atol=2e-5, rtol=2e-5)

# %% [markdown]
# ## Why the LSE comes along
#
# With the LSE, attention over some keys can be completed later with attention over others. For the block's rows, attend
# to [A, P] and to B apart and merge:

# %%
block_q = q[:, :, a:]
everybody = torch.ones(b, a + p, dtype=torch.bool)
far = attention(block_q, k[:, :, : a + p], v[:, :, : a + p], everybody)
near = attention(block_q, k[:, :, a + p :], v[:, :, a + p :], apb_mask(b, b, 0, 0))
merged, merged_lse = merge_pair(*(x.float() for x in (*far, *near)))
torch.testing.assert_close(merged, truth[:, :, a:].float(), atol=1e-5, rtol=1e-5)
torch.testing.assert_close(merged_lse, truth_lse[:, :, a:].float(), atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## Your turn
#
# A tile holds the rows [first, end), all in A or all in B. Return two column numbers: `full`, such that **every** row
# of the tile sees all columns before it (as large as possible), and `stop`, such that **no** row sees a column at or
# after it (as small as possible). Between them lies the diagonal, the only place where a mask is needed.


# %%
def tile_bounds(first, end, anchor_tokens, passing_tokens):
    raise NotImplementedError  # your code: return full, stop


# %%
def check(solution):
    for a, p, b in ((8, 12, 24), (0, 4, 8), (8, 0, 8), (0, 0, 8)):
        mask = apb_mask(a + b, a + p + b, a, p)
        for first in range(0, a + b, 4):
            tile = mask[first : first + 4]
            expected = int(tile.all(dim=0).sum()), int(tile.any(dim=0).sum())
            found = solution(first, first + 4, a, p)
            assert found == expected, f"rows [{first}, {first + 4}), |A| {a}, |P| {p}: expected {expected}, got {found}"
    return "Right."


try:
    print(check(tile_bounds))
except NotImplementedError:
    print("Nothing written yet: fill in tile_bounds, then run this cell again.")


# %% tags=["answer"]
def answer(first, end, anchor_tokens, passing_tokens):
    shift = 0 if first < anchor_tokens else passing_tokens
    return first + shift + 1, end + shift


# %% [markdown]
# ## What the library does for you
#
# - `masked_attention(…, backend="auto")` takes the Triton kernel on CUDA, PyTorch's own fused kernels on a CPU, and the
#   reference for float64. It checks the arguments once and never falls back to another backend in silence.
# - `decode_attention` is the same for a few rows over a long cache, with the keys split over programs.
# - `apb bench kernel` measures the kernels on your GPU.
#
# **Read next:** [7. From Triton to Hopper](7_from_triton_to_hopper.md), or the
# [module page of attention](../modules/attention.md).
