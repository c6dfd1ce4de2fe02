# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 3. What a mask means
#
# **Goal.** Read a method off its mask, find the same mask again in the little that one host computes, and see what a
# mask does that no single layer shows.
#
# A **mask** is a table of yes and no: may row i look at column j? It is most of what tells one method from another. Who
# computes it, on how many machines and in which order, is another question.
#
# ## Four masks
#
# n tokens stand in H blocks of l_b. Write i for the token that looks and j for the one that is looked at:
#
# ```text
# exact         j ≤ i
# blocks only   j ≤ i  and  same block
# Star          j ≤ i  and (same block  or  j among the first l_a tokens, the anchor)
# APB           j ≤ i  and (same block  or  j in the anchor  or  j passed on by an earlier block)
# ```
#
# Each block passes on l_p tokens. Here they are drawn by lot; tutorial 4 chooses better.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

import apb
from apb import reference
from apb.compress import KeyNorm
from apb.methods import APB, Star

n, H, l_b, l_a, l_p = 48, 4, 12, 4, 3
torch.manual_seed(0)
token = torch.arange(n)
i, j = token[:, None], token[None, :]
block = token // l_b


def draw_lots():
    """Which tokens each block but the last passes on; the first block's anchor tokens, which all see, are left out."""
    passed = torch.zeros(n, dtype=torch.bool)
    for start in range(0, n - l_b, l_b):
        first = max(start, l_a)
        passed[first + reference.kept_indices(torch.rand(start + l_b - first), l_p)] = True
    return passed


passed = draw_lots()
causal, same, anchor = j <= i, block[i] == block[j], j < l_a
masks = {
    "exact": causal,
    "blocks only": causal & same,
    "Star": causal & (same | anchor),
    "APB": causal & (same | anchor | passed[j]),
}

# %% [markdown]
# That is all there is to it. The library's methods say the same. (No question stands in front of this document, so
# `query_in="after"`, and a compressor that reads none. What it would choose is not used here: tutorial 4 does that.)

# %%
apb_method = APB(anchor=l_a, passing=l_p, compressor=KeyNorm(), query_in="after")
apb_plan = apb_method.plan(tokens=n, hosts=H)
kept = {b.index: token[passed & (block == b.index)] for b in apb_plan.blocks}
assert torch.equal(masks["APB"], apb_method.mask(apb_plan, token, kept))
star_plan = Star(anchor=l_a).plan(tokens=n, hosts=H)
assert torch.equal(masks["Star"], Star(anchor=l_a).mask(star_plan, token, {}))
assert torch.equal(masks["Star"], reference.star_mask(n, H, l_a))
assert torch.equal(masks["exact"], reference.causal_mask(n))

COLOURS = ["white", "#4878a8", "#e8a33d", "#4f9d69", "#c9d6e4"]  # nothing, own block, anchor, passed, only exact
figure, panels = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained")
for panel, (name, mask) in zip(panels, masks.items(), strict=True):
    why = torch.where(same, 1, torch.where(anchor, 2, torch.where(passed[j], 3, 4))) * mask
    panel.imshow(why if name != "exact" else torch.where(same, 1, 4) * mask, cmap=ListedColormap(COLOURS), vmax=4)
    panel.set_title(f"{name}: {int(mask.sum())} cells", fontsize=10)
    panel.set(xticks=range(0, n, l_b), yticks=range(0, n, l_b))
panels[0].set(xlabel="token that is looked at", ylabel="token that looks")
figure.set_label(
    "Four square masks. Exact: the whole lower triangle. Blocks only: four small triangles along the diagonal. Star: "
    "the same and a stripe of 4 anchor columns at the left. APB: also 3 thin columns below each block but the last."
)

# %% [markdown]
# Blue is a token's own block, orange the anchor, green what was passed on, grey what only exact attention sees.
#
# ## One host's part
#
# Nobody computes that square. A host has the rows of its block. Where all of them say no, it leaves the column out, and
# lays side by side what remains: the anchor A, the passing block P, its own block B. In a row this is all yes, up to
# the row's own token: a rectangle with a triangle at its end.
#
# (A host also runs the anchor's rows, as tutorial 2 has them. With no question among them they see what the same tokens
# see in block 0, so the square needs no rows for them, and they are left out here. Rows are always the *last* ones
# among the columns: below, the block's.)

# %%
kv_heads, dim = 1, 16
q = 3 * torch.randn(1, 2, n, dim)  # batch heads tokens dim
k, v = (torch.randn(1, kv_heads, n, dim) for _ in range(2))
whole_out, whole_lse = reference.attention(q, k, v, masks["APB"])

for rank in range(H):
    rows = token[block == rank]
    a = token[:l_a] if rank > 0 else token[:0]  # the first block begins with those tokens itself
    p = token[passed & (block < rank)]
    columns = torch.cat((a, p, rows))
    small = reference.apb_mask(len(rows), len(columns), len(a), len(p))
    assert torch.equal(small, masks["APB"][rows][:, columns])  # nothing but empty columns was left out
    out, lse = apb.masked_attention(
        q[:, :, rows], k[:, :, columns], v[:, :, columns], anchor_tokens=len(a), passing_tokens=len(p)
    )
    torch.testing.assert_close(out.double(), whole_out[:, :, rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), whole_lse[:, :, rows], atol=1e-5, rtol=1e-5)
    print(
        f"host {rank}: {len(rows)} × {len(columns)} cells, where exact attention has {len(rows)} × {rank * l_b + l_b}"
    )
print("".join("".join("█" if x else "·" for x in row) + "\n" for row in small.tolist()))

# %% [markdown]
# ## News travels
#
# A model has many layers. In one of them, token i hears token j if the mask lets it. In the next, j repeats what it has
# heard itself. So after two layers i has heard of all whom j heard in the first. As a formula, that is a product of
# masks.
#
# APB chooses in each layer anew what to pass on. Of whom has the last token heard?

# %%
LAYERS = 3
by_layer = {name: [mask] * LAYERS for name, mask in masks.items() if name != "exact"}
by_layer["APB"] = [causal & (same | anchor | draw_lots()[j]) for _ in range(LAYERS)]


def heard(layers):
    """After each layer, who may have heard of whom."""
    known = torch.eye(n)
    for mask in layers:
        known = (mask.float() @ known > 0).float()
        yield known > 0


print("the last token has heard of … of 48" + "".join(f"{f'layer {layer + 1}':>9}" for layer in range(LAYERS)))
for name, layers in by_layer.items():
    print(f"{name:<35}" + "".join(f"{int(known[-1].sum()):>9}" for known in heard(layers)))

# %% [markdown]
# In one layer, passing adds nine tokens to Star's sixteen. But Star's last block never hears of the blocks between,
# however deep the model is. A key that APB passes carries, from the second layer on, all that its token has heard
# before. Three keys a block, and the last token knows of nearly everybody.
#
# Is it true? Build the layers and take derivatives. If the last token has not heard of token j, no change of token j
# can move it.

# %%
weights = torch.randn(LAYERS, 3, dim, dim, dtype=torch.float64) / dim**0.5
start = torch.randn(n, dim, dtype=torch.float64, requires_grad=True)
figure, panels = plt.subplots(3, figsize=(8, 3.6), sharex=True, layout="constrained")
for panel, (name, layers) in zip(panels, by_layer.items(), strict=True):
    needed = torch.full((n,), LAYERS + 1)
    for depth, known in reversed(list(enumerate(heard(layers), start=1))):
        needed[known[-1]] = depth
        x = start
        for w, mask in zip(weights, layers[:depth], strict=False):
            q1, k1, v1 = (x @ w)[:, None, None]
            x = x + reference.attention(q1, k1, v1, mask)[0][0, 0]
        (moves,) = torch.autograd.grad(x[-1].sum(), start)
        assert torch.equal(moves.any(dim=1), known[-1])
    shades = plt.get_cmap("Blues_r", LAYERS + 2)
    picture = panel.imshow(needed[None], cmap=shades, vmin=0.5, vmax=LAYERS + 1.5, aspect="auto")
    panel.set(yticks=[], ylabel=name, xticks=range(0, n, l_b))
    panel.vlines(torch.arange(l_b, n, l_b) - 0.5, -0.5, 0.5, color="black", linewidth=0.6)
panels[-1].set_xlabel("token")
bar = figure.colorbar(picture, ax=panels, ticks=range(1, LAYERS + 2))
bar.ax.set_yticklabels([*(f"after {depth} layer{'s' * (depth > 1)}" for depth in range(1, LAYERS + 1)), "never"])
figure.suptitle("when the last token may first have heard of each token", fontsize=10)
figure.set_label(
    "Three strips of 48 tokens. Blocks only: the last block after 1 layer, all others never. Star: also the 4 anchor "
    "tokens. APB: some tokens of every block after 1 layer, nearly all others after 2, single ones never."
)
print("the derivatives agree")

# %% [markdown]
# White tokens of APB's strip stand near the end of their block: no token behind them was passed on *after* it had
# heard of them.
#
# ## Which corner?
#
# A new token asks, and ten keys lie in the cache, its own among them. The mask has one row. "Causal" can start in its
# upper left corner or end in its lower right one. PyTorch's function takes the upper left:

# %%
row, cache = torch.randn(1, 1, 1, dim), torch.randn(1, 1, 10, dim)
theirs = torch.nn.functional.scaled_dot_product_attention(row, cache, cache, is_causal=True)
ours, _ = apb.decode_attention(row, cache, cache, causal=True)
truth, _ = reference.attention(row, cache, cache, torch.ones(1, 10, dtype=torch.bool))
torch.testing.assert_close(ours.double(), truth, atol=1e-6, rtol=1e-5)
print("the new token sees only the first key:", torch.equal(theirs, cache[:, :, :1]))

# %% [markdown]
# No error, no warning, and a model that has lost its memory. In this library, rows fewer than the keys are always the
# **last** ones.
#
# ## No, and never
#
# "No" is a score of −∞. Many programs write −10⁹ instead, since a softmax of nothing but −∞ is NaN. Let a row see
# nothing at all:

# %%
scores, values = torch.zeros(1, 3), torch.tensor([[1.0], [2.0], [6.0]])  # three keys, all forbidden
for no in (-torch.inf, -1e9):
    print(f"no = {no}: output {float(torch.softmax(scores + no, dim=1) @ values)}")
q0, kv = torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 3, 16)
out, lse = reference.attention(q0, kv, kv, torch.zeros(1, 3, dtype=torch.bool))
print(f"the reference: output {float(out[0, 0, 0, 0])}, LSE {float(lse)}")
assert not out.any() and lse == -torch.inf

# %% [markdown]
# With −10⁹ the row gets the mean of exactly what it must not see. An output of 0 with an LSE (log Σ e^score) of −∞
# counts for nothing when it is merged ([tutorial 1](1_exact_attention_three_ways.md)). Every backend of the library
# returns that.
#
# ## Your turn
#
# Every layer has the same mask. After how many layers can token `listener` have heard of token `speaker`? Return a
# number ≥ 1, or None if it never can.


# %%
def layers_needed(mask, listener, speaker):
    raise NotImplementedError  # your code; mask is bool [tokens, tokens], mask[i, j] means that i looks at j


# %%
def check(solution):
    window = causal & (i - j < 5)
    for name, mask in (masks | {"a window of 5": window}).items():
        for listener, speaker in ((47, 0), (47, 20), (30, 29), (20, 3), (20, 20), (5, 40)):
            powers = (torch.linalg.matrix_power(mask.double(), depth) for depth in range(1, n))
            truth = next((depth for depth, power in enumerate(powers, 1) if power[listener, speaker] > 0), None)
            found = solution(mask.clone(), listener, speaker)
            say = f"never hears of {speaker}" if truth is None else f"hears of {speaker} in layer {truth}"
            assert found == truth, f"{name}: {listener} {say}, yours says {found}; mask[i, j] is whether i looks at j"
    return "Right."


try:
    print(check(layers_needed))
except NotImplementedError:
    print("Nothing written yet: fill in layers_needed, then run this cell again.")


# %% tags=["answer"]
def answer(mask, listener, speaker):
    knows = torch.zeros(len(mask), dtype=torch.bool)
    knows[speaker] = True
    for depth in range(1, len(mask) + 1):
        knows = (mask & knows).any(dim=1)  # who looks at somebody who knows
        if knows[listener]:
            return depth
    return None


# %% [markdown]
# ## What the library does for you
#
# - Every method has `mask(plan, rows, kept)`, which says what you have just built, for pictures and for tests;
#   `apb compare --picture masks.svg` draws the masks of several methods for a document and a model of yours.
# - The GPU kernels store no mask: they compute each row's limit from |A| and |P|
#   ([tutorial 6](6_masked_flash_attention.md)).
# - All masks side by side stand on the [page of the methods](../modules/methods.md#the-masks). Not all of a method is
#   in its mask: APE's looks like Star's, but its chunks share their positions.
#
# **Read next:** [4. Choose which keys to keep](4_choose_which_keys_to_keep.md).
