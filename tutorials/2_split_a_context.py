# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 2. Split a context
#
# **Goal.** Know, for every host, which tokens it holds, at which positions, and what that costs — before any tensor is
# computed.
#
# A language model reads a document of *n* tokens. Every token attends to all earlier ones, so the work grows with *n²*,
# and one GPU is not enough. *Sequence parallelism* gives each of *H* GPUs a part of the document. The paper (APB, arXiv
# 2502.12085) calls one member of this group a **host** and its number, counted from 0, the **rank**.
#
# We cut a short text into blocks by hand, add what APB adds, and then let `apb.plan_context` do it.

# %%
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

from apb import plan_context
from apb.costs import attention_pairs
from apb.reference import apb_mask

TEXT = (
    "in the beginning there was a list of one hundred words and one of them was the word amber "
    "which nobody found for a long time because it stood where no one looked until the very end"
)
QUESTION = "which word was hidden"

vocabulary = sorted({*TEXT.split(), *QUESTION.split()})
document = torch.tensor([vocabulary.index(word) for word in TEXT.split()])
question = torch.tensor([vocabulary.index(word) for word in QUESTION.split()])


def words(ids):
    return " ".join(vocabulary[i] for i in ids.tolist())


n, l_q = len(document), len(question)
print(f"n = {n} document tokens, l_q = {l_q} question tokens")

# %% [markdown]
# ## Blocks
#
# With *H* hosts a **block** has l_b = ⌈n / H⌉ tokens: rank r holds the tokens [r·l_b, (r+1)·l_b), a half-open range.
# When *n* does not divide, the last block is shorter; nothing is padded.

# %%
H = 4
l_b = -(-n // H)  # division, rounded up
blocks = [document[r * l_b : (r + 1) * l_b] for r in range(H)]
for rank, block in enumerate(blocks):
    print(f"rank {rank}: {len(block):>2} tokens  {words(block)}")

plan = plan_context(tokens=n, hosts=H)
assert all(torch.equal(mine, theirs) for mine, theirs in zip(blocks, plan.split(document), strict=True))
assert torch.equal(plan.join(blocks), document)  # join is the inverse of split

# %% [markdown]
# ## The anchor
#
# If rank 2 saw its own block only, it would not know how the document begins, nor what is being asked. So every later
# host also runs a copy of the first l_a document tokens, the **anchor**, with the question embedded in it. The question
# stands behind the first s tokens (`query_offset`), so that it never precedes a beginning-of-sequence token or a system
# prompt:
#
# ```text
# rank 0      [ block 0 ]
# rank r > 0  [ doc[:s]  question  doc[s:l_a] | block r ]
#               └────────── anchor ─────────┘
# ```
#
# The anchor's rows stand at positions 0 … l_a + l_q − 1; a block keeps the positions that it has in the document.
# Position matters because the model rotates queries and keys by it (RoPE).

# %%
l_a, s = 5, 1
rows, positions = [], []
for rank, block in enumerate(blocks):
    anchor = torch.cat([document[:s], question, document[s:l_a]]) if rank > 0 else document[:0]
    rows.append(torch.cat([anchor, block]))
    start = rank * l_b
    positions.append(torch.cat([torch.arange(len(anchor)), torch.arange(start, start + len(block))]))

# passing = 3: each block will hand at most 3 of its tokens to the hosts behind it (tutorial 4 chooses which).
plan = plan_context(tokens=n, hosts=H, anchor=l_a, passing=3, query=l_q, query_offset=s)
for rank in range(H):
    assert torch.equal(rows[rank], plan.host_rows(rank, document, question))
    assert torch.equal(positions[rank], plan.positions(rank))
print(f"rank 2 runs: {words(rows[2])}\nat positions {positions[2].tolist()}\n")
print(plan)

# %% [markdown]
# Read the last two columns together: a block *passes on* up to 3 tokens, and rank r *receives* what all earlier blocks
# passed on. (`APB(…).plan(…)` gives rank 0 the anchor's rows as well: they hold the question, whose query vectors tell
# rank 0 what to pass on. `plan_context` does so with `anchor_on_first=True`.) Two blocks are special. The last one
# passes on nothing, because nobody comes after it. The first one never passes on its first l_a tokens (`skipped` in the
# plan), because every later host sees those as anchor.
#
# ## Who sees what
#
# On one host the keys stand in the order [A, P, B]: anchor, passing block, block. The rows that ask are [A, B]: passed
# tokens come as keys and values and ask nothing. An anchor row i sees A[0..i]; a block row j sees all of A, all of P
# and B[0..j]. `apb.reference.apb_mask` is the definition that all fast code is tested against. Here it is for each
# host: orange the anchor, green the passing block, blue the host's own block.

# %%
COLOURS = {"anchor": "#e8a33d", "passing block": "#4f9d69", "block": "#4878a8"}


def parts(plan, block):
    """How many keys of A, P and B the rows of a block see."""
    # `passing_tokens` are those that the block receives, not those that it passes on.
    return plan.anchor_rows * block.sees_anchor, block.passing_tokens, block.tokens


figure, panels = plt.subplots(1, H, figsize=(9, 2.4), layout="constrained")
for block, panel in zip(plan.blocks, panels, strict=True):
    a, p, b = parts(plan, block)
    mask = apb_mask(rows=a + b, columns=a + p + b, anchor_tokens=a, passing_tokens=p)
    part = torch.tensor([1] * a + [2] * p + [3] * b)
    panel.imshow(part * mask, cmap=ListedColormap(["#eeeeee", *COLOURS.values()]), vmin=0, vmax=3)
    panel.set_title(f"rank {block.rank}: {int(mask.sum())} pairs", fontsize=10)
    panel.set(xlim=(-0.5, 25), ylim=(19, -0.5), xlabel="keys")
panels[0].set(ylabel="rows")
figure.set_label(
    "Four masks. Rank 0 has one triangle, its block. The others have a small triangle, the anchor's own rows; below it "
    "a rectangle, anchor and passing block; behind that the block's triangle. The green part grows from rank to rank."
)

# %% [markdown]
# ## What it costs
#
# A coloured cell is one query–key pair, the unit of attention's work. `apb.costs` counts them from the plan without
# making a mask; the two counts must agree. That is this tutorial's assertion against the reference.

# %%
for block in plan.blocks:
    a, p, b = parts(plan, block)
    assert attention_pairs(plan, block.rank) == int(apb_mask(a + b, a + p + b, a, p).sum())

# A real size: 128K tokens on 8 hosts, with the anchor and passing lengths of the paper. No tensor is needed for that.
large = plan_context(tokens=131072, hosts=8, anchor=4096, passing=2048, query=40)
whole = plan_context(tokens=131072, hosts=1)
exact = attention_pairs(whole, 0)
for rank in range(8):
    share = attention_pairs(large, rank) / exact
    print(f"rank {rank}: {large.host(rank).rows:>6} rows, {share:6.2%} of the pairs of exact attention")

# %% [markdown]
# An even share of exact attention would be 12.5 % per host. The approximation makes it a few per cent, and that is what
# APB buys by letting a host see a selection of the distant tokens instead of all of them.
#
# ## Two blocks a host
#
# The last host still has most to do, because it receives most, and everybody waits for it. (In exact attention its rows
# see the whole document, and that is far worse.) The **zigzag** layout cuts 2H blocks and gives rank r the blocks r and
# 2H − 1 − r, an early one and a late one. Each passes on half as much, so that a host sends as many tokens as before.
# (Other blocks are another approximation: not only is work moved, a token also sees other keys.) The titles say what
# the least and the most busy rank scores, as a share of exact attention's pairs.

# %%
zigzag = plan_context(tokens=131072, hosts=8, anchor=4096, passing=1024, query=40, layout="zigzag")
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
for panel, layout in zip(panels, (large, zigzag), strict=True):
    for block in layout.blocks:
        late, left = block.index >= layout.hosts, 0
        for width, (name, colour) in zip(parts(layout, block), COLOURS.items(), strict=True):
            label = name if block.index == 1 else None
            height = 0.8 / layout.blocks_per_host
            place = block.rank - 0.4 + height / 2 + late * height
            panel.barh(place, width, 0.9 * height, left, color=colour, label=label)
            left += width
    pairs = [attention_pairs(layout, rank) / exact for rank in range(8)]
    panel.set_title(f"{layout.layout}: {min(pairs):.1%} to {max(pairs):.1%} of the pairs", fontsize=10)
panels[0].set(ylabel="rank", yticks=range(8))
panels[0].invert_yaxis()
figure.supxlabel("keys that the rows of a block see", fontsize=10)
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
figure.set_label(
    "Bars of keys for 8 ranks. Contiguous: one bar each, as long a block everywhere, the green passing block growing "
    "from nothing on rank 0 to nearly as much as the block on rank 7. Zigzag: two bars each with shorter blocks; where "
    "the upper one has little green the lower one has much, so that all ranks have nearly as much together."
)

# %% [markdown]
# ## An anchor in shares
#
# All hosts but the first run the same anchor rows. They may deal them out instead: `split_anchor=True` cuts those rows
# into 2H pieces, and every rank r runs numbers r and 2H − 1 − r. Anchor row i sees i + 1 keys, so again a near and a
# far piece make all shares as much work, where 2H divides the rows. (Here 9 rows make 8 pieces; rank 0 has one more.)
# The shares' keys and values travel together with the passed tokens, and the result is the same.

# %%
shared = plan_context(tokens=n, hosts=H, anchor=l_a, passing=3, query=l_q, query_offset=s, split_anchor=True)
shares = [[row for span in shared.host(rank).anchor_spans for row in range(*span)] for rank in range(H)]
for rank, mine in enumerate(shares):
    ids = shared.host_rows(rank, document, question)[: len(mine)]
    print(f"rank {rank} runs rows {mine}, {words(ids)!r}: {sum(mine) + len(mine)} pairs")
assert sorted(row for mine in shares for row in mine) == list(range(l_a + l_q))  # each row runs on one host

large_shared = plan_context(tokens=131072, hosts=8, anchor=4096, passing=2048, query=40, split_anchor=True)
print(f"128K tokens on 8 hosts: rank 7 runs {large_shared.host(7).rows} rows in place of {large.host(7).rows}")

# %% [markdown]
# ## Your turn
#
# Zigzag gives rank r the blocks r and 2H − 1 − r. Write the inverse: which rank holds block number `index`?


# %%
def zigzag_rank(index, hosts):
    raise NotImplementedError  # your code: return the rank that holds block `index` of 2 · hosts blocks


# %%
def check(solution):
    for hosts in (1, 2, 3, 8):
        plan = plan_context(tokens=16 * hosts, hosts=hosts, layout="zigzag")
        for block in plan.blocks:
            found = solution(block.index, hosts)
            assert found == block.rank, f"{hosts} hosts: block {block.index} is on rank {block.rank}, not {found}"
    return "Right."


try:
    print(check(zigzag_rank))
except NotImplementedError:
    print("Nothing written yet: fill in zigzag_rank, then run this cell again.")


# %% tags=["answer"]
def answer(index, hosts):
    return min(index, 2 * hosts - 1 - index)


# %% [markdown]
# ## What the library does for you
#
# - `plan_context` refuses plans that make no sense (an anchor that reaches into the second block, for example) and says
#   what to change. Hosts may be left without tokens, where there are fewer blocks of whole tokens than hosts.
# - `print(plan)` shows the table, and `apb plan --tokens 131072 --hosts 8 --anchor 4096 --passing 2048 --query-tokens
#   40 --picture plan.svg` draws it.
# - `apb.costs.host_cost` turns a plan into FLOPs and bytes for a model's shape.
#
# **Read next:** [3. What a mask means](3_what_a_mask_means.md), or the
# [module page of the plan](../modules/plan.md).
