# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 8. Is it right?
#
# **Goal.** Tell right attention from wrong, although neither gives the exact number; and let the computer look for the
# smallest case that shows what is wrong.
#
# The code under test is `fast`: attention to [anchor, passing block, block], a tile of keys at a time, as in
# [tutorial 6](6_masked_flash_attention.md). It computes in float32 and takes any dtype. We break it in three ways and
# see who notices.

# %%
import inspect

import hypothesis
import matplotlib.pyplot as plt
import torch
from hypothesis import strategies as st

import apb
from apb import reference
from apb.testing.tolerance import eager_attention

TILE = 16


def fast(q, k, v, anchor, passing):
    row = torch.arange(q.shape[2])
    limit = row + torch.where(row < anchor, 0, passing)  # the last key that each row sees
    peak = torch.full(q.shape[:3], -torch.inf)
    total, acc = torch.zeros(q.shape[:3]), torch.zeros(q.shape)
    for start in range(0, k.shape[2], TILE):
        keys, values = (x[:, :, start : start + TILE].float() for x in (k, v))
        seen = start + torch.arange(keys.shape[2]) <= limit[:, None]
        scores = (q.float() @ keys.mT / q.shape[3] ** 0.5).masked_fill(~seen, -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(dim=3))
        shrink = torch.exp(peak - new_peak)
        weights = torch.exp(scores - new_peak[..., None])
        total = total * shrink + weights.sum(dim=3)
        acc = acc * shrink[..., None] + weights @ values
        peak = new_peak
    return (acc / total[..., None]).to(q.dtype)


def draw(seed, anchor, passing, block, *, heads=32, peaked=6.0, dtype=torch.bfloat16):
    """Draw q, k and v; the larger `peaked`, the fewer keys get all the weight of a row."""
    generator = torch.Generator().manual_seed(seed)
    q = peaked * torch.randn(1, heads, anchor + block, 16, generator=generator)
    k, v = (torch.randn(1, heads, anchor + passing + block, 16, generator=generator) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


# %% [markdown]
# ## How wrong is right?
#
# The truth is `apb.reference.attention`: float64, on the *same* rounded inputs. Against it, even right code errs, and
# how much depends on the dtype and on the row. The yardstick is the textbook formula in the same dtype, PyTorch with no
# tricks (`eager_attention`). Everything is rounded there, too. So a row may err by
#
# **2 · the textbook's error in that row + 4 · u · max |v|**,
#
# where u is the **unit roundoff**, the largest relative error of rounding one number: 2⁻⁸ in bfloat16, 2⁻¹¹ in float16.
# The second term is for rows in which the textbook was lucky.

# %%
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def errors(attend, q, k, v, anchor, passing):
    """Each row's error, and the error that is allowed."""
    mask = reference.apb_mask(q.shape[2], k.shape[2], anchor, passing)
    truth, _ = reference.attention(q, k, v, mask)
    outs = attend(q, k, v, anchor, passing), eager_attention(q, k, v, mask)
    error, eager = ((out.double() - truth).abs().amax(dim=3).flatten() for out in outs)
    return error, 2 * eager + 4 * ROUNDOFF[q.dtype] * float(v.abs().max())


for dtype in ROUNDOFF:
    error, allowed = errors(fast, *draw(0, 20, 20, 60, dtype=dtype), 20, 20)
    assert (error <= allowed).all()
    print(f"{dtype}: no row errs by more than {error.max():.4f}; allowed: {allowed.min():.4f} to {allowed.max():.4f}")

# %% [markdown]
# What is fine in bfloat16 is a mistake in float16, and what is fine in one row is a mistake in another. So no single
# number will do.
#
# ## An average forgives
#
# Now replace one row of 4096 by zeros.

# %%
q, k, v = draw(1, 0, 0, 128)
truth, _ = reference.attention(q, k, v, reference.apb_mask(128, 128, 0, 0))
out = fast(q, k, v, 0, 0)
out[0, 13, 72] = 0
print(f"relative error of all rows together: {float((out.double() - truth).norm() / truth.norm()):.2%}")
error, allowed = errors(lambda *_: out, q, k, v, 0, 0)
print(f"rows that err by more than they may: {(error > allowed).nonzero().flatten().tolist()}")
assert int((error > allowed).sum()) == 1

# %% [markdown]
# Two per cent would pass for rounding. Row by row, nothing hides.
#
# ## Even attention forgives, too
#
# Now for real bugs, each a small slip in `fast`: the sums do not shrink when a higher peak comes; the first row behind
# the anchor counts as anchor; every row sees one key too many.


# %%
def plant(old, new):
    source, names = inspect.getsource(fast), dict(globals())
    assert source.count(old) == 1
    exec(source.replace(old, new), names)
    return names["fast"]


BUGS = {
    "sums never shrink": plant("torch.exp(peak - new_peak)", "torch.ones_like(peak)"),
    "the block's first row takes itself for anchor": plant("row < anchor", "row <= anchor"),
    "one key too many": plant("<= limit[:, None]", "<= limit[:, None] + 1"),
}

figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
for name, attend in {"right": fast, **BUGS}.items():
    factors = [0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8]
    pairs = [errors(attend, *draw(0, 0, 200, 60, peaked=factor), 0, 200) for factor in factors]
    axes.loglog(factors, [float((error / allowed).max()) for error, allowed in pairs], ".-", label=name)
axes.axhspan(1e-3, 1, color="#4f9d69", alpha=0.12, linewidth=0)
axes.set(xlabel="size of the scores (standard deviation)", ylabel="worst row:\nerror / allowed", ylim=(1e-3, None))
axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=8)
figure.set_label(
    "Right code errs little at any size of scores. Two bugs pass while scores are small, one never passes."
)


# %% [markdown]
# In the green band a test passes. At the left all scores are nearly equal, so each of 200 keys counts for 1/200, and
# two of the bugs drown in bfloat16's rounding. Small models with random weights are just like that. At the right,
# attention is **peaked**: a few keys get all the weight, and nothing drowns. Test on peaked attention.
#
# ## A law, and somebody who tries to break it
#
# One input proves little. State what must hold for *all* inputs, and let
# [Hypothesis](https://hypothesis.readthedocs.io) look for one that breaks it. We let it draw lengths and a seed, never
# the tensors themselves, whose thousands of numbers it could not make simpler.

# %%
PHASES = hypothesis.Phase.generate, hypothesis.Phase.shrink
SETTINGS = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, phases=PHASES, print_blob=False)


def equals_the_reference(attend):
    @SETTINGS
    @hypothesis.given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40), st.integers(0, 2**31))
    def law(anchor, passing, block, seed):
        error, allowed = errors(attend, *draw(seed, anchor, passing, block), anchor, passing)
        assert (error <= allowed).all(), f"row {int((error / allowed).argmax()) % (anchor + block)} is wrong"

    law()


equals_the_reference(fast)
smallest = {}
for name, bug in BUGS.items():
    try:
        equals_the_reference(bug)
    except AssertionError as error:
        smallest[name] = "".join(error.__notes__)
        print(f"\n{name}: {error}", *error.__notes__, sep="\n")
assert all(f"block={size}," in note for note, size in zip(smallest.values(), (TILE + 1, 1, 2), strict=True))

# %% [markdown]
# These are not the inputs that Hypothesis hit upon first. Having found one, it makes it smaller as long as the law
# stays broken: it **shrinks** it. The seed is 0 and nearly all lengths are. What remains says where to look:
#
# - *sums never shrink*: 17 keys in all, and a tile holds 16. So the fault lies in the step from the first tile to the
#   second.
# - *the block's first row …*: one passed token, one token in the block. So that token does not see what was passed.
# - *one key too many*: a block of two tokens, and the first is wrong. So it sees the second.
#
# ## Who notices what?
#
# Four tests against three bugs. The first is a benchmark's: hide a *needle* in the passing block, a key that the last
# row asks for, and see whether its value comes out, a hundred times of a hundred. The second looks at the average, on
# even attention. The third is our law. The fourth is a law that needs no reference, so it can be checked at any size:
# the last key changes no row but the last.


# %%
def finds_needles(attend):
    q, k, v = draw(0, 20, 100, 20, heads=100)
    needles = 20 + torch.arange(100)  # another one for each head
    k[0, range(100), needles] = q[0, :, -1]
    distance = (v - attend(q, k, v, 20, 100)[:, :, -1:]).norm(dim=3)
    assert torch.equal(distance[0].argmin(dim=1), needles)


def is_close_on_average(attend):
    error, _ = errors(attend, *draw(0, 0, 200, 200, heads=8, peaked=0.1), 0, 200)
    assert error.mean() < 0.02


def last_key_changes_the_last_row_only(attend):
    q, k, v = draw(0, 20, 30, 40)
    before = attend(q, k, v, 20, 30)
    k[:, :, -1], v[:, :, -1] = q[:, :, -2], 100
    assert torch.equal(attend(q, k, v, 20, 30)[:, :, :-1], before[:, :, :-1])


def passes(test, attend):
    try:
        test(attend)
    except AssertionError:
        return False
    return True


TESTS = (finds_needles, is_close_on_average, equals_the_reference, last_key_changes_the_last_row_only)
assert all(passes(test, fast) for test in TESTS)
for name, bug in BUGS.items():
    print(f"\n{name}")
    for test in TESTS:
        print(f"    {test.__name__.replace('_', ' '):<36}{'passes' if passes(test, bug) else 'NOTICES'}")

# %% [markdown]
# Wrong programs find a hundred needles of a hundred. A score tells whether a method is good. Whether the code *is* the
# method, only the numbers tell.
#
# ## Your turn
#
# Test somebody else's merge ([tutorial 1](1_exact_attention_three_ways.md)). `merge(outs, lses)` takes
# `[parts, batch, heads, rows, dim]` and the same without `dim`, and returns `out, lse`. Write one law: draw an input
# from `seed` and raise an AssertionError if the result is not `reference.merge`'s. The checker tries it on right merges
# and on wrong ones. An empty part has the LSE −∞; a row may have none but such.


# %%
def law(merge, seed):
    raise NotImplementedError  # your code


# %%
def mix(outs, weights):
    return (outs * weights[..., None]).sum(dim=0)


RIGHT = (apb.merge, lambda outs, lses: apb.merge(outs.flip(0), lses.flip(0)))
WRONG = {
    "a plain mean of the parts": lambda outs, lses: (outs.mean(dim=0), lses.logsumexp(dim=0)),
    "the largest LSE for their sum's": lambda outs, lses: (apb.merge(outs, lses)[0], lses.amax(dim=0)),
    "an overflow": lambda outs, lses: (mix(outs, lses.exp() / lses.exp().sum(dim=0)), lses.exp().sum(dim=0).log()),
    "NaN for nothing": lambda outs, lses: (mix(outs, lses.softmax(dim=0)), lses.logsumexp(dim=0)),
}


def check(solution):
    def complains(merge):
        return not all(passes(lambda one, seed=seed: solution(one, seed), merge) for seed in range(10))

    assert not any(map(complains, RIGHT)), "it complains about right code, which rounds and adds in another order"
    for name, merge in WRONG.items():
        assert complains(merge), f"it does not notice {name}"
    return "Right."


try:
    print(check(law))
except NotImplementedError:
    print("Nothing written yet: fill in law, then run this cell again.")


# %% tags=["answer"]
def answer(merge, seed):
    generator = torch.Generator().manual_seed(seed)
    outs, lses = torch.randn(3, 1, 1, 4, 16, generator=generator), torch.randn(3, 1, 1, 4, generator=generator)
    lses[..., 1] *= 100  # e^89 overflows; but only where LSEs are alike is their sum's not the largest
    lses[1, ..., 2] = -torch.inf  # one part is empty
    lses[..., 3] = -torch.inf  # and here all are
    for found, truth in zip(merge(outs, lses), reference.merge(outs, lses), strict=True):
        torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)


# %% [markdown]
# ## What the library does for you
#
# - `apb.testing.tolerance.assert_attention` is the rule of this page for an output and its LSE.
#   `apb.testing.strategies` draws legal plans, methods and peaked inputs, `apb.testing.tiny` makes peaked models.
# - Most tests of a kernel are such laws. `make test` tries the same few inputs each time, `make fuzz` many new ones.
# - The tests are tested, too: `tests/test_planted_bugs.py` plants each bug of `apb/testing/*bugs.py` in a copy of the
#   package and demands that a test notices.
#
# **Read next:** [9. Put it into a model](9_put_it_into_a_model.md), or
# [the laws of the library](../explanation/design.md#laws).
