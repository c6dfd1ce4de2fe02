# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 5. Pass blocks between hosts
#
# **Goal.** Send what every block kept to the hosts behind it, in one message that travels while other work goes on; run
# the same code on threads and on processes; and see what a failure says.
#
# A **collective** is an operation that all members of a group carry out together. APB needs one: the *all-gather*,
# after which everybody has everybody's tensor. In this library a member is a `Host` with a `rank` and a `world_size`.
# What stands behind it (threads of this process, threads taking turns on one device, processes on many GPUs) does not
# show.

# %%
import time

import matplotlib.pyplot as plt
import torch

from apb import merge, plan_context, reference
from apb.parallel import HostFailed, run_processes, run_simulated, run_threads
from apb.parallel.passing import PassingBlocks

torch.set_num_threads(1)  # the hosts of this tutorial share a small machine


def hello(host):
    handle = host.all_gather(torch.tensor([host.rank * 10]), what="greeting")  # starts, and returns at once
    return torch.cat(handle.wait()).tolist()  # everybody's tensor, in rank order


print(run_threads(3, hello))  # one result a host

# %% [markdown]
# ## The passing block
#
# The **passing block** of rank r is what ranks 0 … r − 1 kept, in rank order. Rank 0 receives nothing, and rank r must
# never look at what later ranks sent: a token may not attend to the future.
#
# We take random keys and values for a document of 4 blocks, and keep, to have something definite, each block's first
# tokens ([tutorial 4](4_choose_which_keys_to_keep.md) chose better). K and V go in one message, side by side along the
# last dimension.

# %%
H, l_p, kv_heads, dim = 4, 3, 2, 16
plan = plan_context(tokens=30, hosts=H, passing=l_p)
generator = torch.Generator().manual_seed(0)
K, V = (torch.randn(1, kv_heads, plan.tokens, dim, generator=generator) for _ in range(2))
host_keys, host_values = plan.split(K, dim=2), plan.split(V, dim=2)


def pass_by_hand(host):
    k, v = host_keys[host.rank][:, :, :l_p], host_values[host.rank][:, :, :l_p]
    handle = host.all_gather(torch.cat((k, v), dim=-1), what="passing")
    # … here a real host attends to its anchor, or scores its next block: the message is under way …
    earlier = handle.wait()[: host.rank]
    return torch.cat(earlier, dim=2).chunk(2, dim=-1) if earlier else (k[:, :, :0], v[:, :, :0])


by_hand = run_threads(H, pass_by_hand)
for rank, (k, _) in enumerate(by_hand):
    print(f"rank {rank} receives {k.shape[2]} tokens")

# %% [markdown]
# `PassingBlocks` does the same from the plan: it knows how many tokens each block passes, pads shorter shares and cuts
# the padding off again, and puts zigzag blocks into the document's order. `start(0, message)` starts the message of a
# host's block number 0 (in zigzag there is a number 1), `wait(block)` returns the passing block of that block. The host
# counts what it has sent; the formula is (H − 1) · l_p · H_kv · 2d values per host and layer. (That is so for the last
# host, too: nobody reads its block, it keeps nothing, and an all-gather wants equal shares, so it sends padding.)


# %%
def pass_with_library(host):
    block = plan.host(host.rank).blocks[0]
    k, v = (parts[host.rank][:, :, : block.kept_tokens] for parts in (host_keys, host_values))
    passing = PassingBlocks(plan, host)
    passing.start(0, torch.cat((k, v), dim=-1))
    received = passing.wait(block)
    passing.finish()  # waits for what no block here reads: on rank 0, for everything
    assert host.counters.sent_bytes["passing"] == (H - 1) * l_p * kv_heads * 2 * dim * k.element_size()
    return received


def assert_same(left, right):
    for (k1, v1), (k2, v2) in zip(left, right, strict=True):
        assert torch.equal(k1, k2) and torch.equal(v1, v2)


assert_same(run_threads(H, pass_with_library), by_hand)

# %% [markdown]
# ## The same code on other hosts
#
# `run_threads` needs nothing and is what most tests use. `run_simulated` lets only one thread compute at a time, so
# that each host's share can be timed alone on a single device. `run_processes` starts real processes that talk through
# `torch.distributed`. All give the same bits. What differs is who does what when, so we let every host look at a clock.
# Two naps stand for work: scoring before the message is sent, which takes rank 2 longer than the others, and something
# that needs no passing block while the message is under way.

# %%
SCORING, OTHER_WORK = (0.02, 0.03, 0.08, 0.02), 0.03  # seconds


def with_a_clock(host):
    host.all_gather(torch.zeros(1), what="ready").wait()  # begin together
    block = plan.host(host.rank).blocks[0]
    k, v = (parts[host.rank][:, :, : block.kept_tokens] for parts in (host_keys, host_values))
    clock = [time.time()]
    time.sleep(SCORING[host.rank])
    clock.append(time.time())
    passing = PassingBlocks(plan, host)
    passing.start(0, torch.cat((k, v), dim=-1))
    time.sleep(OTHER_WORK)
    clock.append(time.time())
    received = passing.wait(block)
    clock.append(time.time())
    passing.finish()
    return received, clock


KINDS = {"scoring": "#4878a8", "other work": "#9fb8d0", "waiting": "#e8a33d"}
figure, panels = plt.subplots(3, 1, figsize=(8, 5.4), sharex=True, layout="constrained")
for panel, run in zip(panels, (run_threads, run_simulated, run_processes), strict=True):
    received, clocks = zip(*run(H, with_a_clock), strict=True)
    assert_same(received, by_hand)
    ms = 1000 * (torch.tensor(clocks, dtype=torch.float64) - min(min(clock) for clock in clocks))
    for (kind, colour), start, stop in zip(KINDS.items(), ms.T, ms.T[1:], strict=False):
        panel.barh(range(H), stop - start, 0.6, start, color=colour, label=kind)
    for sender in range(H):
        for reader in range(sender + 1, H):
            ends = {"xy": (ms[reader, 3], reader), "xytext": (ms[sender, 1], sender)}
            panel.annotate("", **ends, arrowprops={"arrowstyle": "->", "linewidth": 0.8})
    panel.set(ylabel="rank", yticks=range(H), title=run.__name__)
    panel.invert_yaxis()
panels[-1].set_xlabel("milliseconds; an arrow leads from where a message is sent to where it is read")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
figure.set_label(
    "Time lines of 4 ranks, on threads, simulated hosts and processes. On threads and processes all work at the same "
    "time; ranks 1 and 3 wait until rank 2, the slowest, has sent. Ranks 0 and 2 hardly wait. Simulated hosts work one "
    "after the other. Arrows lead from every rank to all later ones."
)
print("threads, simulated hosts and processes agree")

# %% [markdown]
# The gather is one message to all, complete when the slowest host has sent. So rank 1 waits for rank 2, although it
# reads rank 0 only. Rank 2 had other work while the messages were under way, and does not wait at all; nor does rank 0,
# which reads nothing. Simulated hosts take turns, and the clock of their own work, `host.compute_ms`, stands still
# while they wait.
#
# On GPUs the body stays as it is. `torchrun --nproc-per-node 4 my_script.py` starts a process for each GPU, in which
# `host_from_env()` returns its host. NCCL carries the messages on a stream of its own, so `start` returns before
# anything was sent. `wait` does not hold up Python either: it lets the GPU's current stream wait, and with it every
# kernel that is launched later.

# %% [markdown]
# ## A complete exchange computes exact attention
#
# If every block passes on *all* its tokens, then rank r sees [P, B] with P = everything before it: that is exact causal
# attention. We let all hosts attend and compare with `apb.reference.attention` over the whole document. This is the
# tutorial's assertion against the reference, and the law that the whole library is tested by.

# %%
everything = plan_context(tokens=plan.tokens, hosts=H, passing=plan.block_tokens)
Q = 3 * torch.randn(1, 4, plan.tokens, dim, generator=generator)  # large logits: mistakes cannot hide
host_queries = everything.split(Q, dim=2)


def attend(host):
    block = everything.host(host.rank).blocks[0]
    q, k, v = (parts[host.rank] for parts in (host_queries, host_keys, host_values))
    passing = PassingBlocks(everything, host)
    passing.start(0, torch.cat((k, v), dim=-1)[:, :, : block.kept_tokens])
    p_k, p_v = passing.wait(block)
    passing.finish()
    mask = reference.apb_mask(block.tokens, block.passing_tokens + block.tokens, 0, block.passing_tokens)
    out, _ = reference.attention(q, torch.cat((p_k, k), dim=2), torch.cat((p_v, v), dim=2), mask)
    return out


n = plan.tokens
exact, exact_lse = reference.attention(Q, K, V, reference.apb_mask(n, n, 0, 0))
together = everything.join(run_threads(H, attend), dim=2)
torch.testing.assert_close(together, exact)

# %% [markdown]
# ## Joining partial attention
#
# Hosts need not even send keys, if all of them have the query: each attends to its own keys and sends the result and
# its log-sum-exp (LSE). The parts merge to the whole, in any order, l = log Σ exp(l_i), o = Σ o_i · exp(l_i − l), as in
# [tutorial 1](1_exact_attention_three_ways.md). This is how the question and every generated token attend to caches
# that stay where they are.

# %%
last = Q[:, :, -1:]  # one row that sees the whole document


def partial(host):
    k, v = host_keys[host.rank], host_values[host.rank]
    return reference.attention(last, k, v, torch.ones(1, k.shape[2], dtype=torch.bool))


outs, lses = (torch.stack(parts) for parts in zip(*run_threads(H, partial), strict=True))
out, lse = merge(outs.float(), lses.float())
torch.testing.assert_close(out.double(), exact[:, :, -1:], atol=1e-5, rtol=1e-5)
torch.testing.assert_close(lse.double(), exact_lse[:, :, -1:], atol=1e-5, rtol=1e-5)

# %% [markdown]
# ## When a host fails
#
# In a collective everybody waits for everybody, so a host that dies could leave the others waiting for ever. Here the
# others are told: they raise `HostFailed`, which names the rank and the collective; `run_threads` raises the first
# error itself, with a note that says where it came from.


# %%
def fails(host):
    if host.rank == 1:
        raise ValueError("the disk is full")
    try:
        host.all_gather(torch.zeros(1), what="passing").wait()
    except HostFailed as error:
        if host.rank == 0:
            print(f"rank 0 hears: {error}")
        raise


try:
    run_threads(3, fails)
except ValueError as error:
    print(f"the caller gets: {error!r}, {error.__notes__}")

# %% [markdown]
# ## Your turn
#
# In the zigzag layout rank r holds two blocks, r and 2H − 1 − r, and sends what they kept in two messages. After them,
# `gathered[slot][rank]` is what the block number `slot` (0 or 1) of `rank` kept, along dimension 2. Write the passing
# block of document block `index`: what blocks 0 … index − 1 kept, **in the document's order** (index ≥ 1).


# %%
def zigzag_passing(gathered, index, hosts):
    raise NotImplementedError  # your code: concatenate parts of `gathered` along dim 2


# %%
def hint(found, index, hosts):
    """What has gone wrong, if it is one of the likely things."""
    backwards = [*range(hosts), *reversed(range(hosts, 2 * hosts))]  # how the second slots lie
    by_rank = sorted(range(index), key=lambda block: min(block, 2 * hosts - 1 - block))
    slips = {
        "; gathered[1] is in the order of ranks, so its blocks stand backwards": backwards[:index],
        f"; block {index} has its own tokens, and receives those before it only": [*range(index + 1)],
        "; that is the order of ranks, not the document's": by_rank,
    }
    order = [] if found is None else found.flatten().unique_consecutive().tolist()
    return next((slip for slip, wrong in slips.items() if order == wrong != [*range(index)]), "")


def check(solution):
    for hosts in (1, 2, 3):
        blocks = [torch.full((1, 1, 1 + b % 2, 1), float(b)) for b in range(2 * hosts)]  # block b holds the number b
        gathered = [blocks[:hosts], blocks[hosts:][::-1]]
        for index in range(1, 2 * hosts):
            expected, found = torch.cat(blocks[:index], dim=2), solution(gathered, index, hosts)
            assert found is not None and found.shape == expected.shape and torch.equal(found, expected), (
                f"{hosts} hosts, block {index}: expected the blocks {expected.flatten().tolist()}, "
                f"got {None if found is None else found.flatten().tolist()}{hint(found, index, hosts)}"
            )
    return "Right."


try:
    print(check(zigzag_passing))
except NotImplementedError:
    print("Nothing written yet: fill in zigzag_passing, then run this cell again.")


# %% tags=["answer"]
def answer(gathered, index, hosts):
    first, second = gathered
    return torch.cat([first[b] if b < hosts else second[2 * hosts - 1 - b] for b in range(index)], dim=2)


# %% [markdown]
# ## What the library does for you
#
# - `Host.agree` checks, before any data moves, that all hosts hold the same plan, and `Host.together` makes a step that
#   fails on one host fail on all.
# - Process hosts publish a heartbeat, so that survivors can say *which* host died and in which collective.
# - `apb.parallel.decode.start_attend_over_hosts` is the merge above as one asynchronous message.
#
# **Read next:** [6. Masked flash attention](6_masked_flash_attention.md), the
# [module page of passing](../modules/passing.md), or how to
# [run on several GPUs](../how-to/run-on-several-gpus.md).
