# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 1. Split a context
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
import torch

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

# passing = 3: each block will hand at most 3 of its tokens to the hosts behind it (tutorial 2 chooses which).
plan = plan_context(tokens=n, hosts=H, anchor=l_a, passing=3, query=l_q, query_offset=s)
for rank in range(H):
    assert torch.equal(rows[rank], plan.host_rows(rank, document, question))
    assert torch.equal(positions[rank], plan.positions(rank))
print(f"rank 2 runs: {words(rows[2])}\nat positions {positions[2].tolist()}\n")
print(plan)

# %% [markdown]
# Read the last two columns together: a block *passes on* up to 3 tokens, and rank r *receives* what all earlier blocks
# passed on. Two blocks are special. The last one passes on nothing, because nobody comes after it. The first one never
# passes on its first l_a tokens (`skipped` in the plan), because every later host sees those as anchor.
#
# ## Who sees what
#
# On one host the keys stand in the order [A, P, B]: anchor, passing block, block. The rows that ask are [A, B]: passed
# tokens come as keys and values and ask nothing. An anchor row i sees A[0..i]; a block row j sees all of A, all of P
# and B[0..j]. Here is the mask of rank 2, drawn from `apb.reference.apb_mask`, the definition that all fast code is
# tested against.

# %%
me = plan.host(2).blocks[0]
a, p, b = plan.host(2).anchor_rows, me.passing_tokens, me.tokens
mask = apb_mask(rows=a + b, columns=a + p + b, anchor_tokens=a, passing_tokens=p)
print("A" * a + "P" * p + "B" * b)
for row in mask:
    print("".join("█" if seen else "·" for seen in row.tolist()))

# %% [markdown]
# ## What it costs
#
# A filled cell is one query–key pair, the unit of attention's work. `apb.costs` counts them from the plan without
# making a mask; the two counts must agree. That is this tutorial's assertion against the reference.

# %%
for rank in range(H):
    host, block = plan.host(rank), plan.host(rank).blocks[0]
    a, p, b = host.anchor_rows, block.passing_tokens, block.tokens
    assert attention_pairs(plan, rank) == int(apb_mask(a + b, a + p + b, a, p).sum())

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
# ## Your turn
#
# With contiguous blocks the last host of *exact* attention works most: its rows see everything. The **zigzag** layout
# cuts 2H blocks and gives rank r the blocks r and 2H − 1 − r, an early one and a late one. Write the inverse: which
# rank holds block number `index`?


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
#   what to change.
# - `print(plan)` shows the table, and `apb plan --tokens 131072 --hosts 8 --anchor 4096 --passing 2048 --query-tokens
#   40 --picture plan.svg` draws it.
# - `apb.costs.host_cost` turns a plan into FLOPs and bytes for a model's shape.
#
# **Read next:** [2. Choose which keys to keep](2_choose_which_keys_to_keep.md), or the
# [module page of the plan](../modules/plan.md).
