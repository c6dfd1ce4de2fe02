# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 4. Masked flash attention
#
# **Goal.** Compute attention under APB's mask without ever holding the matrix of scores, first in plain PyTorch, then
# as a Triton kernel of your own.
#
# Triton compiles kernels for a GPU. Without one, its *interpreter* runs the same kernel in Python, slowly but with the
# same result. It has to be asked for before `triton` is imported.

# %%
import os

import torch

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
# by the passing length at the block**. Every fourth row:

# %%
mask = apb_mask(rows, columns, a, p).to(device)
for i in range(3, rows, 4):
    print(f"row {i:>2}  " + "".join("█" if seen else "·" for seen in mask[i].tolist()))
limit = torch.arange(rows, device=device) + p * (torch.arange(rows, device=device) >= a)
assert torch.equal(mask, torch.arange(columns, device=device) <= limit[:, None])
truth, truth_lse = attention(q, k, v, mask)  # float64, the definition
scale = dim**-0.5

# %% [markdown]
# ## Online softmax
#
# softmax(s)·V = Σ_j e^{s_j} v_j / Σ_j e^{s_j}. Both sums can be collected a few keys at a time. To keep the
# exponentials from overflowing, subtract the largest score *seen so far*, the peak; when the peak rises from m to m′,
# what has been summed is multiplied by e^{m − m′}. At the end the **log-sum-exp** (LSE) is m + log Σ. Nothing larger
# than one tile of scores ever exists. That is FlashAttention's idea (arXiv 2205.14135).


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
# TMA. The mask is the same.

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
# **Read next:** [5. APB from end to end](5_apb_end_to_end.md), or the
# [module page of attention](../modules/attention.md).
