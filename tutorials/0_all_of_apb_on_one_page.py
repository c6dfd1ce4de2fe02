# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # All of APB on one page
#
# **Goal.** See a document split over four hosts, read there, and asked a question, with nothing but PyTorch. Then get
# the same from the library.
#
# Here is a story of 32 words. Early on a storm threw a ship into the *harbour*. Much later somebody buried gold
# *there*. Where is the gold? The answer takes two steps: *where* leads to *there*, and *there* to *harbour*.

# %%
import torch

torch.manual_seed(3)
TEXT = (
    "one night the storm threw a ship into the old harbour and nobody saw it then "
    "many years went by until two sailors came again with a map and buried gold there"
)
STORY, QUESTION = TEXT.split(), ["where", "is", "the", "gold"]
n, l_q, H = len(STORY), len(QUESTION), 4
print(f"{n} words, {l_q} words of a question, {H} hosts")

# %% [markdown]
# ## A model that can be read
#
# Two layers of attention, set by hand. A word is a random vector; that of a place leans towards a direction that all
# places share. Its **key** is the word itself. Its **query** is what it looks for: in layer 1 *there* and *where* look
# for a place, in layer 2 *where* looks for *there*. Its **value** is the word in layer 1, and in layer 2 what it found
# in layer 1. (A trained model has positions and many heads, and nobody set its weights. The steps below stay the same.)

# %%
dim, vocabulary = 64, sorted({*STORY, *QUESTION})
index = {word: i for i, word in enumerate(vocabulary)}
embed, places = (torch.nn.functional.normalize(torch.randn(m, dim), dim=-1) for m in (len(vocabulary), 1))
embed[index["harbour"]] += places[0]


def vectors(text):
    return embed[[index[word] for word in text]]


there, where = vectors(["there", "where"])
look = [80 * torch.outer(there + where, places[0]), 80 * torch.outer(where, there)]  # query = word @ look[layer]


def name(vector):
    """Return the word that a vector is most like."""
    return vocabulary[int((embed @ vector).argmax())]


# %% [markdown]
# ## Exact attention
#
# One formula: a score q·k for every pair, a softmax over the keys that a row may see, a weighted sum of values. The
# logarithm of the softmax's denominator, the **LSE**, comes along. Step 5 needs it.


# %%
def attend(q, k, v, mask):
    scores = (q @ k.T / dim**0.5).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[:, None]).exp() @ v, lse


def causal(rows, columns):
    """Let each of the last `rows` of `columns` tokens see itself and what comes before."""
    return torch.ones(rows, columns).tril(columns - rows).bool()


word = value = vectors(STORY + QUESTION)
for layer in range(2):
    value, _ = attend(word @ look[layer], word, value, causal(n + l_q, n + l_q))
exact = value[n:]  # what the question's words have found
print(f"exact attention: the gold is in the {name(exact[0])}")

# %% [markdown]
# ## 1. Split
#
# Each host gets a **block** of l_b words. In front of it, every host but the first puts the **anchor**: the first l_a
# words, with the question among them, behind the first s. So every host knows how the story begins and what will be
# asked.

# %%
l_b, l_a, s = n // H, 2, 1
blocks = [STORY[r * l_b : (r + 1) * l_b] for r in range(H)]
anchors = [[], *[STORY[:s] + QUESTION + STORY[s:l_a]] * (H - 1)]
for anchor, block in zip(anchors, blocks, strict=True):
    print(f"{' '.join(anchor):>28} | {' '.join(block)}")

# %% [markdown]
# *There* is on the last host, *harbour* on the second.
#
# ## 2. Compress
#
# A host asks which words of its block the others may want: those whose keys fit the question's queries. It keeps the
# best l_p. (The anchor's words do not compete; everybody has them.)


# %%
def compress(layer, r, l_p):
    skipped = l_a if r == 0 else 0
    scores = vectors(blocks[r])[skipped:] @ (vectors(QUESTION) @ look[layer]).mean(dim=0)
    return skipped + scores.topk(l_p).indices.sort().values


for r in range(H - 1):
    print(f"host {r} passes on: {' '.join(blocks[r][i] for i in compress(0, r, l_p=2).tolist())}")

# %% [markdown]
# ## 3. Pass
#
# Every host sends what it kept to all others, in one message. It uses what comes from hosts *before* it: its **passing
# block**. So *harbour* reaches the last host.
#
# ## 4. Attend
#
# A host's keys stand as [anchor, passing block, block], and its rows as [anchor, block]: passed words are seen, and ask
# nothing. An anchor row sees the anchor, up to itself. A block row sees all of the anchor, all that was passed, and the
# block up to itself.


# %%
def apb_mask(a, p, b):
    anchor_rows = torch.cat([causal(a, a), torch.zeros(a, p + b).bool()], dim=1)
    block_rows = torch.cat([torch.ones(b, a + p).bool(), causal(b, b)], dim=1)
    return torch.cat([anchor_rows, block_rows])


def read_story(l_p):
    """Run every host's rows through both layers; return the keys and values that each keeps of its block."""
    words = [vectors(anchor + block) for anchor, block in zip(anchors, blocks, strict=True)]
    values, caches = list(words), []
    for layer in range(2):
        caches.append([(words[r][-l_b:], values[r][-l_b:]) for r in range(H)])
        sent = [[x[compress(layer, r, l_p)] for x in caches[layer][r]] for r in range(H)]
        sent_keys, sent_values = zip(*sent, strict=True)
        for r in range(H):
            a = len(anchors[r])
            k = torch.cat([words[r][:a], *sent_keys[:r], words[r][a:]])
            v = torch.cat([values[r][:a], *sent_values[:r], values[r][a:]])
            values[r], _ = attend(words[r] @ look[layer], k, v, apb_mask(a, len(k) - a - l_b, l_b))
    return caches


# %% [markdown]
# ## 5. Ask
#
# Keys and values stay where they are, and the question goes to all hosts. Each lets it attend to its own, and returns
# output and LSE. Weighing the outputs by exp(LSE) **merges** them into attention over everything: that is exact. Only
# the last host, where the question's own keys stand, needs a causal mask.


# %%
def ask(caches):
    word = value = vectors(QUESTION)
    for layer in range(2):
        parts = []
        for r, (k, v) in enumerate(caches[layer]):
            last = r == H - 1
            k, v = (torch.cat([k, word]), torch.cat([v, value])) if last else (k, v)
            mask = causal(l_q, len(k)) if last else torch.ones(l_q, len(k)).bool()
            parts.append(attend(word @ look[layer], k, v, mask))
        outs, lses = (torch.stack(part) for part in zip(*parts, strict=True))
        value = (outs * lses.softmax(dim=0)[..., None]).sum(dim=0)
    return value


by_hand = ask(read_story(l_p=2))
for l_p in (0, 1, 2):
    found = ask(read_story(l_p))[0]
    error = float((found - exact[0]).norm())
    print(f"{l_p} of each block passed on: the gold is in the {name(found)!r}, off by {error:.2f}")
assert name(by_hand[0]) == name(exact[0]) != name(ask(read_story(0))[0])

# %% [markdown]
# With nothing passed, the question still saw every word of the story, and the answer was wrong: when *there* was read,
# *harbour* was out of sight. One word from each block puts that right.
#
# ## The same with the library
#
# `APB` plans, compresses, passes and attends; its `decode` asks and merges. A host is a function, here run on threads.

# %%
from apb import Context, reference
from apb.compress import QueryAware, no_pool
from apb.methods import APB, Flash, Star
from apb.parallel import run_threads

method = APB(anchor=l_a, passing=2, compressor=QueryAware(pool=no_pool))
plan = method.plan(tokens=n, hosts=H, query=l_q, query_offset=s)
story, question = (torch.tensor([index[word] for word in text]) for text in (STORY, QUESTION))


def one_host(host):
    word = value = embed[plan.host_rows(host.rank, story, question)][None, None]  # batch heads tokens dim
    asked = answer = embed[question][None, None]
    for layer in range(2):
        context, block = Context(plan, host, layer=layer), plan.host(host.rank).block_spans[0]
        new = (asked, answer) if host.rank == plan.owner else (asked[:, :, :0], answer[:, :, :0])
        k, v = (torch.cat([x[:, :, block], y], dim=2) for x, y in zip((word, value), new, strict=True))
        answer = method.decode(asked @ look[layer], k, v, context)
        value = method.attend(word @ look[layer], word, value, context)
    return answer[0, 0]


for answer in run_threads(H, one_host):
    torch.testing.assert_close(answer, by_hand, atol=1e-5, rtol=1e-5)
print(f"each of the {H} hosts: the gold is in the {name(answer[0])!r}")

# %% [markdown]
# And both are what the definitions in `apb.reference` say: the mask to the bit, attention to rounding.

# %%
for a, p, b in ((0, 0, l_b), (len(anchors[3]), 3 * 2, l_b)):
    assert torch.equal(apb_mask(a, p, b), reference.apb_mask(a + b, a + p + b, a, p))
word = value = vectors(STORY + QUESTION)[None, None]
for layer in range(2):
    value, _ = reference.attention(word @ look[layer], word, value, reference.causal_mask(n + l_q))
torch.testing.assert_close(value[0, 0, n:].float(), exact, atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## What was saved
#
# Each square shows which words (across) each word (down) sees. Exact attention fills the triangle, and its work grows
# with n². Star Attention keeps blocks and the beginning. APB adds a few words of each block for all that come later.

# %%
import matplotlib.pyplot as plt

from apb.masks import mask_grid

kept = {r: r * l_b + compress(0, r, l_p=2) for r in range(H - 1)}
seen = {
    "exact": mask_grid(Flash(), Flash().plan(tokens=n, hosts=1), {}, cells=n),
    "Star": mask_grid(Star(anchor=l_a), Star(anchor=l_a).plan(tokens=n, hosts=H), {}, cells=n),
    "APB": mask_grid(method, plan, kept, cells=n),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
for axis, (title, grid) in zip(axes, seen.items(), strict=True):
    axis.imshow(grid, cmap="Blues", vmin=0, vmax=1.3)
    axis.set_title(f"{title}: {int(grid.sum())} pairs", fontsize=10)
    axis.set_xticks([STORY.index("harbour")], ["harbour"])
    axis.set_yticks([STORY.index("there")], ["there"])
figure.set_label(
    "Three masks of 32 by 32 words. Exact: a full lower triangle. Star: four small triangles on the diagonal and the "
    "first two columns. APB: the same and six more columns, one of them harbour, which the row of there can now see."
)
assert seen["APB"][STORY.index("there"), STORY.index("harbour")] == 1

# %% [markdown]
# ## Your turn
#
# The picture leaves out the anchor's own rows. With them, how many pairs does a host score, whose anchor has `a` rows,
# whose passing block `p` keys, and whose block `b` words? No mask may be built.


# %%
def pairs(a, p, b):
    raise NotImplementedError  # your code: return a number


# %%
def check(solution):
    for a, p, b in ((0, 0, 4), (3, 0, 4), (0, 5, 4), (3, 5, 4), (6, 6, 8)):
        expected, found = int(reference.apb_mask(a + b, a + p + b, a, p).sum()), solution(a, p, b)
        assert found == expected, f"a = {a}, p = {p}, b = {b}: expected {expected} pairs, got {found}"
    return "Right."


try:
    print(check(pairs))
except NotImplementedError:
    print("Nothing written yet: fill in pairs, then run this cell again.")


# %% tags=["answer"]
def answer(a, p, b):
    return a * (a + 1) // 2 + b * (a + p) + b * (b + 1) // 2


# %% [markdown]
# ## What the library does for you
#
# - `plan_context` does step 1 for any length and number of hosts, at the true positions.
# - `apb.compress` has the scorers of step 2, from ones that need no training to the paper's trained heads.
# - `PassingBlocks` is step 3: one message that travels while the host computes, on threads, processes or GPUs.
# - `masked_attention` is step 4 in one kernel launch, and `decode_attention` with `merge` step 5.
# - `apb generate --method apb --model … --document FILE --query TEXT --hosts N` is this page on a real model.
#
# **Read next:** the ten tutorials take these steps one by one, from
# [exact attention three ways](1_exact_attention_three_ways.md).
