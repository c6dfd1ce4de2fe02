# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 4. Choose which keys to keep
#
# **Goal.** Pick, out of one host's block, the few keys and values that are worth sending to the hosts behind it, and
# know how much attention is lost with the others.
#
# A host may pass on l_p of its tokens (`passing`). Choosing them is a **compressor**'s work, always in four steps:
#
# ```text
# score   a number for every token and KV head: how much will later tokens want it?
# pool    smooth over neighbours, so that a kept token brings its context along
# select  the l_p highest, ties to the lowest position, sorted by position
# gather  their keys and values, unchanged, at their original positions
# ```
#
# Tensors are laid out `batch heads tokens dim`. With *grouped-query attention* there are fewer KV heads than query
# heads: query head h reads KV head h // g, where g is the group size.

# %%
import matplotlib.pyplot as plt
import torch
from einops import rearrange, reduce

from apb import reference
from apb.compress import Candidates, KeyNorm, MaxPool, QueryAware, Random, Recency, SnapKV, no_pool, select

torch.manual_seed(0)
batch, q_heads, kv_heads, tokens, dim, l_q = 1, 4, 2, 96, 16, 3
group = q_heads // kv_heads
q, query = (torch.randn(batch, q_heads, m, dim) for m in (tokens, l_q))
k, v = (torch.randn(batch, kv_heads, tokens, dim) for _ in range(2))

# A needle: the key of token 40 points where the question looks, in both KV heads.
NEEDLE = 40
look = reduce(query, "b (h g) l d -> b h d", "mean", h=kv_heads)
k[:, :, NEEDLE] = 12 * look / look.norm(dim=-1, keepdim=True)

# %% [markdown]
# ## Score
#
# The training-free score that we use by default (`QueryAware`, from Spava, arXiv 2601.21444) is the logit that the
# question would give the token: the key times the mean of the question's query vectors, over its tokens and over the
# group's heads,
#
# score(t) = k_t · mean_{i, h in group} q_{i,h}.

# %%
scores = (k * look[:, :, None]).sum(dim=-1)
print(f"shape {tuple(scores.shape)}; highest in each KV head: token {scores.argmax(dim=-1).flatten().tolist()}")

# %% [markdown]
# ## Pool
#
# A max pool of width 5 gives every token the best score within two tokens around it. The peak becomes a plateau, so the
# needle's neighbours will be kept with it: a name without the sentence it stands in is of little use.

# %%
padded = torch.nn.functional.pad(scores, (2, 2), value=-torch.inf)
pooled = torch.stack([padded[..., i : i + tokens] for i in range(5)]).amax(dim=0)
assert torch.equal(pooled, MaxPool(kernel=5)(scores))

# %% [markdown]
# ## Select
#
# Plateaus are full of ties, so *which* of several equal scores is taken has to be fixed: the lowest position. Otherwise
# two hosts, or two runs, could disagree. The kept positions come back sorted, and a smaller budget keeps a part of what
# a larger one keeps. `apb.reference.kept_indices` is the slow definition.

# %%
l_p = 12
kept = torch.sort(pooled, dim=-1, descending=True, stable=True).indices[..., :l_p].sort(dim=-1).values
assert torch.equal(kept, reference.kept_indices(pooled, l_p))
assert torch.equal(kept, select(pooled, l_p))
print("kept by KV head 0:", kept[0, 0].tolist())
print("kept by KV head 1:", kept[0, 1].tolist())

figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
axes.bar(range(tokens), scores[0, 0], color="#9fb8d0", label="score")
axes.step(range(tokens), pooled[0, 0], where="mid", color="#444444", linewidth=1, label="pooled")
axes.plot(kept[0, 0], pooled[0, 0][kept[0, 0]], "o", color="#e8a33d", markersize=4, label="kept")
axes.set(xlabel="token of the block", ylabel="score in KV head 0")
axes.legend(fontsize=8, frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.set_label(
    "A bar a token, one of them, the needle at 40, by far the highest; a line of the pooled scores, with plateaus five "
    "tokens wide; dots on the 12 kept tokens: the needle's plateau, and the next highest ones."
)

# %% [markdown]
# ## Gather
#
# Each KV head keeps its own tokens. The library's compressor does all four steps in one call.

# %%
rows = kept[..., None].expand(-1, -1, -1, dim)
kept_k, kept_v = k.gather(2, rows), v.gather(2, rows)

candidates = Candidates(q=q, k=k, v=v, query=query)
result = QueryAware().compress(candidates, keep=l_p)
assert torch.equal(result.indices, kept) and torch.equal(result.k, kept_k) and torch.equal(result.v, kept_v)

# %% [markdown]
# ## How much is lost
#
# Let δ be the attention mass that a row would have put on the tokens we dropped. Leaving them out renormalises the
# rest, and the output moves by at most
#
# ‖o − õ‖ ≤ 2 · δ · max‖v‖,
#
# since the full output is o = (1 − δ) · õ + δ · o′, with o′ the mean over what was dropped: so o − õ = δ · (o′ − õ),
# and neither of these two is longer than max‖v‖.
#
# So a good compressor is one with a small δ. We compute both sides in float64 with `apb.reference.attention`, which
# takes a mask and returns the output and the *log-sum-exp* (LSE) of each row's scores; exp(LSE_kept − LSE_all) is the
# mass that stays.


# %%
def question_attends(keys, values):
    everything = torch.ones(l_q, keys.shape[2], dtype=torch.bool)
    return reference.attention(query, keys, values, everything)


full_out, full_lse = question_attends(k, v)


def kept_mass(compressor, keep):
    """Attention mass of the question on what is kept, averaged over heads and rows; checks the bound on the way."""
    found = compressor.compress(candidates, keep)
    out, lse = question_attends(found.k, found.v)
    mass = torch.exp(lse - full_lse)
    bound = 2 * (1 - mass) * v.double().norm(dim=-1).max()
    assert ((out - full_out).norm(dim=-1) <= bound + 1e-12).all()
    return mass.mean().item()


scorers = {
    "question votes": SnapKV(voters="query", pool=no_pool),  # the softmax of the question, summed; explained below
    "query-aware": QueryAware(pool=no_pool),
    "query-aware, pooled": QueryAware(),
    "small keys": KeyNorm(pool=no_pool),
    "random": Random(),
    "newest": Recency(),
}
budgets = range(4, tokens + 1, 4)
masses = {name: [kept_mass(compressor, keep) for keep in budgets] for name, compressor in scorers.items()}

figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
colours = ("black", "#4878a8", "#e8a33d", "#b0578d", "#4f9d69", "#8a8a8a")
for (name, mass), colour, marker in zip(masses.items(), colours, "*o^sDv", strict=True):
    axes.plot(budgets, mass, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
    print(f"{name:<21} keeps {mass[2]:.2f} of the attention with {budgets[2]} of {tokens} tokens")
axes.set(xlabel="tokens kept", ylabel="attention mass kept", xlim=(0, tokens + 1), ylim=(0, 1.02))
axes.legend(fontsize=8, frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.set_label(
    "Attention mass kept against tokens kept, a line a scorer. The three that look at the question have over 0.4 with "
    "4 tokens and rise evenly to 1. Random and newest stay near the bottom and jump by 0.4 when they catch the needle, "
    "small keys only at the last token."
)
best = torch.tensor(masses["question votes"])
assert all((best >= torch.tensor(mass) - 1e-6).all() for mass in masses.values())
assert kept_mass(QueryAware(), 4) > kept_mass(Recency(), 4)

# %% [markdown]
# Keeping everything keeps mass 1, whoever chooses. In between, scorers differ: on this toy the question is known, so
# scorers that look at it find the needle at once. The others gain little by little and jump when the needle is among
# what they keep (random twice, for each KV head draws for itself). The key-norm score takes it last of all, because our
# needle has a *long* key; in trained models short keys tend to draw attention. On a toy one learns how to measure, not
# which scorer is best.
#
# Nobody does better than the votes, the question's own softmax (SnapKV, arXiv 2404.14469): they are the very mass that
# we measure. But later tokens than the question attend, too, and nobody knows yet for what.
#
# ## Your turn
#
# A mean over the question's tokens can hide a token that only *one* word of the question looks for. Write another
# score: the **largest** logit over the question's tokens and the group's heads,
#
# score(t) = max_{i, h in group} k_t · q_{i,h}.
#
# `query` is `[batch, q_heads, l_q, dim]`, `k` is `[batch, kv_heads, tokens, dim]`, the result `[batch, kv_heads,
# tokens]`.


# %%
def best_logit(k, query):
    raise NotImplementedError  # your code


# %%
def check(solution):
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(2, 3, 10, 8, generator=generator)
    query = torch.randn(2, 6, 4, 8, generator=generator)
    found = solution(k, query)
    assert found is not None and found.shape == (2, 3, 10), "expected the shape [batch, kv_heads, tokens]"
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(10)).tolist():
        truth = max(float(k[b, h, t] @ query[b, 2 * h + member, i]) for member in range(2) for i in range(4))
        got = float(found[b, h, t])
        where = f"batch {b}, KV head {h} (read by query heads {2 * h} and {2 * h + 1}), token {t}"
        assert abs(got - truth) < 1e-4, f"{where}: expected {truth:.3f}, got {got:.3f}"
    return "Right."


try:
    print(check(best_logit))
except NotImplementedError:
    print("Nothing written yet: fill in best_logit, then run this cell again.")


# %% tags=["answer"]
def answer(k, query):
    grouped = rearrange(query, "b (h g) l d -> b h (g l) d", h=k.shape[1])
    return (grouped @ k.transpose(-1, -2)).amax(dim=2)


# %% [markdown]
# ## What the library does for you
#
# - A new compressor is a class with one method, `score`; pooling, selection, gathering and the checks (shape, NaN,
#   budget) are inherited. How to write and test one of your own: [Add a compressor](../how-to/add-a-compressor.md).
# - `apb.compress` has Locret's trained retaining heads, which the paper uses, beside the scorers you have just
#   compared, and `Oracle`, which looks at the true attention and so tells what the best possible choice would have
#   kept.
#
# **Read next:** [5. Pass blocks between hosts](5_pass_blocks_between_hosts.md).
