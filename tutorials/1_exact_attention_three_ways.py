# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 1. Exact attention three ways
#
# **Goal.** Compute attention from pieces, read in any order or lying on different machines, and get the same result.
#
# A token asks. Each token up to itself holds up a *key*, which says what it is about, and a *value*, which is what it
# has to say. The token compares its *query* with every key and takes the mean of the values, weighted by how well the
# keys fit. That is attention. Query, key and value are vectors of d numbers.
#
# Ours can do something: it guesses the next word. A token's query is its own word. Its key is the word **before** it,
# and its value is its own word again. So a token asks: *where did my word stand before, and what came next?*

# %%
from functools import reduce

import matplotlib.pyplot as plt
import torch

import apb
from apb import reference

TEXT = (
    "the red fox met the grey owl near the river and the grey owl said that the red fox had lost "
    "the amber key which lay under the old bridge where nobody ever looked and so they searched for the amber"
)
WORDS = TEXT.split()
n, d = len(WORDS), 64

torch.manual_seed(0)
vocabulary = sorted(set(WORDS))
vectors = torch.randn(len(vocabulary), d).sign()  # a word is d random signs: unlike words hardly overlap
q = torch.stack([vectors[vocabulary.index(word)] for word in WORDS])
k = torch.cat((torch.zeros(1, d), q[:-1]))  # nothing stands before the first word
v = q


def nearest(out):
    """The word that an output is most like."""
    return vocabulary[int((vectors @ out).argmax())]


# %% [markdown]
# ## The first way: a table
#
# The **score** of row i for column j is q_i · k_j / √d. Softmax makes a row's scores into weights: e^score, divided by
# the row's sum. A token must not look ahead, so the scores right of the diagonal become −∞ and weigh nothing.


# %%
def naive(q, k, v, mask):
    scores = (q @ k.T / d**0.5).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=1)
    return weights @ v, weights


mask = reference.causal_mask(n)
table_out, weights = naive(q, k, v, mask)
truth, truth_lse = (x[0, 0].float() for x in reference.attention(*(x[None, None] for x in (q, k, v)), mask))
torch.testing.assert_close(table_out, truth)
print(f"… {' '.join(WORDS[-6:])} → {nearest(table_out[-1])}")

figure, axes = plt.subplots(figsize=(6.4, 6), layout="constrained")
axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
axes.set_xticks(range(n), WORDS, rotation=90, fontsize=6)
axes.set_yticks(range(n), WORDS, fontsize=6)
axes.set(xlabel="column: the token that is looked at", ylabel="row: the token that looks")
figure.set_label("A square of weights, empty above its diagonal. The last row, amber, has one dark cell: the word key.")

# %% [markdown]
# A dark cell is a word that was found again: the last row, *amber*, looks at *key*. *The* has stood before *red*,
# *grey*, *river* and others, and divides its weight among them. A row without a match looks everywhere a little.
#
# The table is the trouble. It has n² cells, and a language model makes dozens of them, one a *head*, in every layer.

# %%
for tokens in (n, 8192, 131072):
    print(f"{tokens:>6} tokens, 32 heads: {32 * tokens**2 * 4 / 2**20:>11,.1f} MiB of float32 scores in every layer")

# %% [markdown]
# ## The second way: one key at a time
#
# A row needs two sums: Σ e^score · value, and Σ e^score to divide it by. Both can be collected one key at a time. One
# thing is in the way:

# %%
for score in (88.0, 89.0):
    print(f"e^{score:.0f} = {float(torch.tensor(score).exp()):.3g} in float32")

# %% [markdown]
# Subtracting the same number from all scores changes no weight. The largest score is a good number to subtract, for
# then no exponential is above 1. But we read the keys one by one and do not know it yet. So subtract the largest score
# *so far*, the **peak**. When a higher one comes, shrink both sums by e^(old peak − new peak), as if it had been the
# peak all along. This is *online softmax*.


# %%
def online(row, keys, values):
    """Yield, after each key, the output and the log of Σ e^score."""
    peak, total, acc = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(d)
    for key, value in zip(keys, values, strict=True):
        score = row @ key / d**0.5
        new_peak = torch.maximum(peak, score)
        shrink, weight = torch.exp(peak - new_peak), torch.exp(score - new_peak)
        total = total * shrink + weight
        acc = acc * shrink + weight * value
        peak = new_peak
        yield acc / total, peak + total.log()


steps = list(online(q[-1], k, v))
out, lse = steps[-1]
torch.testing.assert_close(out, truth[-1])
torch.testing.assert_close(lse, truth_lse[-1])
for j in (10, 22, 23, n - 1):
    print(f"after key {j:>2}, of {WORDS[j]!r:>7}: it would say {nearest(steps[j][0])!r}")

# %% [markdown]
# The state is a peak, a total and one vector, however many keys there were. Watch the last row read:

# %%
scores = k @ q[-1] / d**0.5
figure, (top, bottom) = plt.subplots(2, figsize=(8, 4.5), sharex=True, layout="constrained")
top.bar(range(n), scores, color="#9fb8d0", label="score of this key")
top.step(range(n), scores.cummax(dim=0).values, where="mid", color="#e8a33d", label="peak: the highest so far")
top.plot([lse for _, lse in steps], color="#b0578d", label="log Σ e^score")
top.legend(fontsize=8, loc="upper left", frameon=False)
bottom.plot([(out - step).norm() for step, _ in steps], color="#4878a8")
bottom.set(ylabel="distance from\nthe final output", ylim=(0, None))
bottom.set_xticks(range(n), WORDS, rotation=90, fontsize=7)
for axis in (top, bottom):
    axis.spines[["top", "right"]].set_visible(False)
figure.set_label(
    "Above, bars of 41 scores; one, at the word key, towers over the rest, and the peak jumps to it. "
    "Below, the distance from the final output, which falls almost to zero at that word."
)

# %% [markdown]
# ## The third way: merge
#
# log Σ e^score is called the **log-sum-exp** (LSE). A single key with score s and value x has the output x and the LSE
# log e^s = s. So an (output, LSE) pair *is* a key that stands for all those that went into it: the output is its value,
# the LSE its score. And what do we do with keys? Attend to them.


# %%
def merge(one, other):
    """Join two (output, LSE) pairs over different keys."""
    outs, lses = (torch.stack(pair) for pair in zip(one, other, strict=True))
    return torch.softmax(lses, dim=0) @ outs, torch.logsumexp(lses, dim=0)


pieces = [range(i, min(i + 11, n)) for i in range(0, n, 11)]
parts = [list(online(q[-1], k[piece], v[piece]))[-1] for piece in pieces]
shares = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
for piece, part, share in zip(pieces, parts, shares, strict=True):
    print(f"keys {piece.start:>2}–{piece.stop - 1}: LSE {part[1]:5.2f}, share {share:6.2%}, says {nearest(part[0])!r}")

for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]):
    merged, merged_lse = reduce(merge, [parts[i] for i in order])
    torch.testing.assert_close(merged, truth[-1])
    torch.testing.assert_close(merged_lse, truth_lse[-1])
print(f"merged in any order: {nearest(merged)!r}")

# %% [markdown]
# Four pieces, four opinions, and the LSE knows whose counts. The pieces could have lain on four machines. No key would
# have had to travel: each machine sends d + 1 numbers a row, however many keys it holds.
#
# The second way was the third in disguise. Merge single keys from left to right:

# %%
summary = reduce(merge, zip(v, scores, strict=True))
torch.testing.assert_close(summary, (truth[-1], truth_lse[-1]))

# %% [markdown]
# One corner is left. A machine may hold no key that a row may see. Its sum is empty, so its LSE is log 0 = −∞, and
# merging it changes nothing. But merge nothing with nothing:

# %%
nothing = (torch.zeros(d), torch.tensor(-torch.inf))
torch.testing.assert_close(merge(nothing, (out, lse)), (out, lse))
print("ours:        ", merge(nothing, nothing)[0][:3], merge(nothing, nothing)[1])
outs, lses = torch.zeros(2, 1, 1, 1, d), torch.full((2, 1, 1, 1), -torch.inf)  # parts batch heads rows (dim)
empty_out, empty_lse = apb.merge(outs, lses)
print("the library's:", empty_out.flatten()[:3], empty_lse.flatten()[0])
assert not empty_out.any() and empty_lse == -torch.inf

# %% [markdown]
# ## Your turn
#
# Merging can be undone. `whole` is the (output, LSE) pair over some keys, `part` the pair over a few of them. Return
# the pair over **the others**. Mind e^89: here scores go into the thousands.


# %%
def forget(whole, part):
    raise NotImplementedError  # your code: return out, lse


# %%
def hint(found, whole, part, shift):
    """What has gone wrong, if it is one of the likely things."""
    (out, lse), (part_out, part_lse), found = whole, part, torch.as_tensor(found).double()
    left = out - torch.exp(part_lse - lse) * part_out
    slips = {
        "; outputs are means, so give each its weight before you subtract": out - part_out,
        "; what is left weighs less than the whole did, so divide by its share": left,
        "; LSEs are logs: subtract the sums, not the logs of them": lse - part_lse,
        "; that is the whole's, nothing is forgotten": out if found.ndim else lse,
    }
    if shift and not found.isfinite().all():
        return "; e^LSE is infinite or 0 here, so take e^ of differences of LSEs only"
    return next((slip for slip, wrong in slips.items() if torch.allclose(found, wrong, rtol=0, atol=1e-6)), "")


def check(solution):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, m, 16, generator=generator, dtype=torch.float64) for m in (1, 9, 9))

    def attend(keys, shift):  # a last dimension of key and query adds `shift` to every score
        row, long = torch.nn.functional.pad(q, (0, 1), value=4 * shift), torch.nn.functional.pad(k, (0, 1), value=1)
        mask = torch.ones(1, len(keys), dtype=torch.bool)
        out, lse = reference.attention(row, long[:, :, keys], v[:, :, keys], mask, scale=0.25)
        return out[0, 0, 0], lse[0, 0, 0]

    for shift in (0.0, 3000.0, -3000.0):
        for gone in ([0], [1, 4, 8], list(range(8))):
            rest = [j for j in range(9) if j not in gone]
            whole, part, truth = (attend(keys, shift) for keys in (list(range(9)), gone, rest))
            found = solution(whole, part)
            assert found is not None and len(found) == 2, "expected two tensors, the output and the LSE"
            for name, x, y in zip(("output", "LSE"), found, truth, strict=True):
                error = float((x - y).abs().max())
                where = f"keys {gone} forgotten, scores around {shift:.0f}"
                assert error < 1e-6, f"{name} off by {error:.2g}, {where}{hint(x, whole, part, shift)}"
    return "Right."


try:
    print(check(forget))
except NotImplementedError:
    print("Nothing written yet: fill in forget, then run this cell again.")


# %% tags=["answer"]
def answer(whole, part):
    (out, lse), (part_out, part_lse) = whole, part
    share = torch.exp(part_lse - lse)  # of the whole's weight, at most 1
    return (out - share * part_out) / (1 - share), lse + torch.log1p(-share)  # near a share of 1, digits get lost


# %% [markdown]
# ## What the library does for you
#
# - `apb.masked_attention` and `apb.decode_attention` return the output and the LSE. Their GPU kernels are `online` with
#   tiles of rows and keys in place of single ones.
# - `apb.merge` joins any number of parts, empty ones too, on a CPU or in one kernel that reads each part once.
# - `apb.reference.attention` and `apb.reference.merge` say in float64 what both must return.
#
# **Read next:** [2. Split a context](2_split_a_context.md), where the pieces go to different hosts.
