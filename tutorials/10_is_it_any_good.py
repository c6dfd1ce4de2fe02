# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # 10. Is it any good?
#
# **Goal.** Judge an approximation: build a test that it can fail, see why it fails, set quality against work, and tell
# a difference from luck.
#
# Seven methods run here on a model small enough to read: two layers of attention, set by hand, as on
# [the first page](0_all_of_apb_on_one_page.md). Then come records: of a trained model, and of real GPUs.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from apb import Context, Trace, reference
from apb.compress import QueryAware, Random, no_pool
from apb.evals.statistics import mean_interval
from apb.methods import APB, make_method
from apb.parallel import run_threads

torch.set_num_threads(1)
torch.manual_seed(0)
n, H, dim, KINDS, PLACES, FILLERS = 512, 4, 64, 8, 32, 100


def directions(m):
    return torch.nn.functional.normalize(torch.randn(m, dim), dim=-1)


# %% [markdown]
# ## Two tests
#
# A document has 512 words. Thirty or so are places, of 8 kinds (harbours, caves, …). One place is the only one of its
# kind, and we hide it somewhere. Then we ask:
#
# - **Needle.** *Which cave?* The question itself looks for the place.
# - **Chain.** Later in the document somebody buried gold "in *that* cave". *Where is the gold?* The question finds
#   *that*, and *that* must have found the cave.
#
# Each word has a vector (its key) and, for each layer, a direction that it looks in (its query). A word's value is the
# word itself in layer 1, and in layer 2 what it found in layer 1.

# %%
kinds, (place, that) = torch.linalg.qr(torch.randn(dim, KINDS + 2)).Q.T.split((KINDS, 2))  # at right angles
PLACE, THAT, WHICH, WHERE, FILLER = 0, PLACES, PLACES + KINDS, PLACES + 2 * KINDS, PLACES + 2 * KINDS + 1
places = directions(PLACES) + place + kinds[torch.arange(PLACES) % KINDS]
embed = torch.cat([places, directions(KINDS) + that, directions(KINDS + 1), directions(FILLERS)])
look = 20 * torch.stack([directions(len(embed)) for _ in range(2)])
look[0, PLACE:THAT] = 80 * places  # a place finds itself
look[0, THAT:WHICH] = look[1, WHICH:WHERE] = 160 * (place + kinds)  # the place of this kind
look[0, WHICH:WHERE] = look[0, WHERE] = 80 * place  # some place
look[1, WHERE] = 160 * that


def write(fact, reader):
    """Return a document with its only place of a kind at `fact` and "that" at `reader`, the kind, and the place."""
    kind = int(torch.randint(KINDS, ()))
    answer = kind + KINDS * int(torch.randint(PLACES // KINDS, ()))
    others = torch.tensor([w for w in range(PLACES) if w % KINDS != kind])
    document = torch.randint(FILLER, len(embed), (n,))
    document[torch.randperm(n)[: len(others)]] = others
    document[fact], document[reader] = answer, THAT + kind
    return document, kind, answer


# As many documents for each pair of blocks, the fact's and the reader's.
cells = [(i, j) for i in range(H) for j in range(i, H) for _ in range(8)]
spots = [(torch.randperm(n // H)[:2].sort().values + torch.tensor(cell) * (n // H)).tolist() for cell in cells]
texts = [write(*spot) for spot in spots]
documents, kind, truth = (torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*texts, strict=True))
questions = {"needle": (WHICH + kind)[:, None], "chain": torch.full((len(truth), 1), WHERE)}


def run(method, question):
    """Read and ask all documents; return the answers, and every host's trace of layer 1."""
    hosts = 1 if method.one_host else H
    plan = method.plan(tokens=n, hosts=hosts, query=1)
    traces = [Trace(keep_indices=True, keep_layer=0, counted=True) for _ in range(hosts)]

    def one_host(host):
        share, rows = plan.host(host.rank), plan.host_rows(host.rank, documents, question)
        word, asked = embed[rows][:, None], embed[question][:, None]  # batch heads tokens dim
        value, answer = word, asked
        for layer in range(2):
            context = Context(plan, host, layer=layer, trace=traces[host.rank])
            new = (asked, answer) if host.rank == plan.owner else (asked[:, :, :0], answer[:, :, :0])
            held = zip((word, value), new, strict=True)
            k, v = (torch.cat([*(x[:, :, span] for span in share.held_spans), y], dim=2) for x, y in held)
            answer = method.decode(look[layer][question][:, None], k, v, context)
            value = method.attend(look[layer][rows][:, None], word, value, context)
        return answer[:, 0, 0]

    return torch.cdist(run_threads(hosts, one_host)[0], places).argmin(dim=-1), plan, traces


# %% [markdown]
# ## A test that nobody fails says nothing
#
# Ring Attention and Ulysses are exact, so they must answer as full attention does. The others approximate, with small
# budgets: an anchor of a quarter of a block, and 4 words of 128 passed on.

# %%
methods = {
    "full": make_method("flash"),
    "ring, zigzag": make_method("ring-zigzag"),
    "Ulysses": make_method("ulysses"),
    "Star, long anchor": make_method("star"),
    "Star": make_method("star:anchor=32"),
    "APE": make_method("ape"),
    "MInference": make_method("minference:vertical=16,slash=64,dense_below=0"),
    "APB, random": APB(anchor=32, passing=4, compressor=Random()),
    "APB": APB(anchor=32, passing=4, compressor=QueryAware(pool=no_pool)),
}
right, found = {}, {}
print(f"{'right answers':<18} needle  chain")
for name, method in methods.items():
    for test, question in questions.items():
        answers, *found[name, test] = run(method, question)
        right[name, test] = (answers == truth).float()
    print(f"{name:<18} {right[name, 'needle'].mean():>6.0%} {right[name, 'chain'].mean():>6.0%}")
for name in ("full", "ring, zigzag", "Ulysses"):
    assert right[name, "needle"].all() and right[name, "chain"].all()

# %% [markdown]
# Every method finds every needle, even those whose hosts never talk to each other. No wonder: the question attends to
# all caches, exactly, and one step is all it takes. A single needle tests decoding, not the prefill.
#
# The chain tells them apart. Where do they break? Rows below are the block of *that*, columns the block of the place;
# yellow is all right, violet all wrong.

# %%
shown = ("Star", "APE", "MInference", "APB, random", "APB")
figure, axes = plt.subplots(1, 5, figsize=(11, 2.7), layout="constrained")
fact_block, reader_block = torch.tensor(cells)[::8].T
for axis, name in zip(axes, shown, strict=True):
    grid = torch.full((H, H), torch.nan)
    grid[reader_block, fact_block] = right[name, "chain"].view(-1, 8).mean(dim=1)
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=1)
    axis.set(title=name, xticks=range(H), yticks=range(H))
figure.supxlabel("block of the place", fontsize=9)
axes[0].set_ylabel("block of 'that'")
figure.set_label(
    "Triangles of cells, a method each; yellow is all right, violet all wrong. The diagonal is yellow everywhere. Off "
    "it APE, MInference and Star are mostly violet, APB with random choice little better, APB mostly yellow and green."
)

# %% [markdown]
# On the diagonal the place is at hand. Off it, somebody must have passed it on. (MInference splits nothing: one host
# skips the columns that the *last* 64 rows do not want. This toy is unkind to it, as those rows want no places. Trained
# models are kinder, as you will see.)
#
# ## Quality against work
#
# Does APB just spend more? We count the query–key pairs that the busiest host computes, as a share of exact
# attention's on one host. The whiskers are 95 % intervals, from drawing the documents anew.

# %%
budgets, swept = (0, 1, 2, 4, 8, 16, 32), {}
for name in ("APB", "APB, random"):
    for passing in budgets:
        method = replace(methods[name], passing=passing)
        answers, *traced = run(method, questions["chain"])
        swept[name, passing] = (method, (answers == truth).float(), traced)


def draw(axis, label, runs, style):
    """Draw each run's score and interval against the pairs of its busiest host."""
    scores = [mean_interval({"chain": hits.tolist()}, ends=(0, 1), resamples=2000) for hits, _ in runs]
    work = [2 * max(trace.pairs[0] for trace in traces) / (n * (n + 1)) for _, (_, traces) in runs]
    reach = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
    axis.errorbar(work, [s.value for s in scores], yerr=reach, fmt=style, capsize=2, label=label)


figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for name in ("APB", "APB, random"):
    draw(axis, f"{name}, passing 0 … 32", [swept[name, passing][1:] for passing in budgets], "o-")
for name in ("full", "ring, zigzag", "Star, long anchor", "Star", "APE", "MInference"):
    draw(axis, name, [(right[name, "chain"], found[name, "chain"])], "s")
axis.set(xscale="log", xlabel="pairs of the busiest host, as a share of exact attention", ylabel="right, chain")
figure.legend(fontsize=8, loc="outside right upper")
figure.set_label(
    "Right answers against work. APB climbs steeply, to all right at a seventh of exact attention's pairs; with random "
    "choice it climbs slowly. Star and APE lie low, at little work; exact methods at the top, at a quarter or more."
)

# %% [markdown]
# ## Why: the mass that was dropped
#
# Let δ be the attention that a row would have given to what it did not see. Its output moves by at most 2 · δ · max‖v‖
# ([tutorial 4](4_choose_which_keys_to_keep.md)). We take the row that matters, that of *that*, and ask the definition:
# `apb.reference.attention` over all it could see, and over what the method's mask lets it see.


# %%
def dropped(method, plan, traces):
    """Return δ of each document's reader in layer 1; check the bound on the way."""
    deltas = []
    for number, (document, (_, reader)) in enumerate(zip(documents, spots, strict=True)):
        kept = {block: kept[number, 0] for trace in traces for (_, block), kept in trace.kept.items()}
        index = traces[0].indices[0].entry(number) if traces[0].indices else None
        seen = method.mask(plan, torch.tensor([reader]), kept, index)
        q, k = look[0][document[reader]][None, None, None], embed[document][None, None]
        (exact, lse), (out, seen_lse) = (
            reference.attention(q, k, k, mask) for mask in (torch.arange(n)[None] <= reader, seen)
        )
        delta = float(1 - torch.exp(seen_lse - lse))
        assert (out - exact).norm() <= 2 * delta * k.norm(dim=-1).max() + 1e-6
        deltas.append(delta)
    return sum(deltas) / len(deltas)


figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name in ("APB", "APB, random"):
    masses = [dropped(method, *traced) for method, _, traced in (swept[name, passing] for passing in budgets)]
    axis.plot(range(len(budgets)), masses, "o-", label=name)
for style, name in zip((":", "--", "-.", "-"), ("Star", "APE", "MInference", "full"), strict=True):
    axis.axhline(dropped(methods[name], *found[name, "chain"]), linestyle=style, color="gray", label=name)
axis.set_xticks(range(len(budgets)), budgets)
axis.set(xlabel="passing: words that a block may pass on", ylabel="mean dropped mass δ of 'that'")
axis.legend(fontsize=8)
figure.set_label(
    "Dropped mass against budget. APB's falls to nearly nothing at 8 words a block, random choice's slowly. Star, APE "
    "and MInference are flat lines at about half, full attention's at zero."
)

# %% [markdown]
# It is the last picture upside down: what a method drops is what it gets wrong.
#
# ## A trained model
#
# A toy shows how to measure, and not which method is best. For that, the package keeps every answer of a real run in
# `benchmarks/quality.csv`: RULER's tasks, one model, the same questions for all.

# %%
from pathlib import Path

import apb
from apb.evals.ledger import read_ledger
from apb.evals.report import make_report

BENCHMARKS = Path(apb.__file__).parent.parent / "benchmarks"
records, labels, runs = read_ledger(BENCHMARKS / "quality.csv")
for row in runs:
    print(f"measured on one {row['device']}, {row['date']}, commit {row['commit']}")
sections = make_report(records, labels=labels, resamples=2000).sections
figure, axes = plt.subplots(1, len(sections), figsize=(5.5 * len(sections), 4), layout="constrained", squeeze=False)
for axis, section in zip(axes[0], sections, strict=True):
    lines = [line for line in section.lines if line.mean]
    for line in section.lines:
        if not line.mean:
            print(f"{line.label}: not all tasks at {section.length:,} tokens yet, so no mean")
    for height, line in enumerate(lines):
        x = 100 * line.mean.value
        reach = [[x - 100 * line.mean.low], [100 * line.mean.high - x]]
        axis.errorbar(x, height, xerr=reach, fmt="o", capsize=3, color="#e8a33d" if height == 0 else "#4878a8")
    axis.axvline(100 * lines[0].mean.value, linestyle="--", color="#e8a33d", linewidth=1)
    axis.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=8)
    axis.invert_yaxis()
    questions_asked = sum(lines[0].samples.values())
    axis.set_title(f"{section.length:,} tokens, {section.hosts} hosts, {questions_asked} questions", fontsize=10)
    axis.set_xlabel("mean score, % (95 % interval)")
figure.set_label(
    "Mean scores of methods as dots with intervals, a panel a length; a dashed line is full attention. The page on "
    "quality has the same figures as a table."
)

# %% [markdown]
# Look at the whiskers before the dots: few questions make wide ones. Which tasks went wrong, why, and what has not been
# measured yet is on the page [Is it any good?](../explanation/quality.md)
#
# ## What it buys
#
# A layer is done when the slowest host is. `Method.cost` counts its operations, here for Llama-3.1-8B's shape and 128K
# tokens on 8 hosts (full attention: on one).

# %%
from apb.costs import LLAMA_3_1_8B

texts = ("flash", "ring", "ring-zigzag", "ulysses", "star", "ape", "apb", "apb:layout=zigzag,split_anchor=true")
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
for height, text in enumerate(texts):
    method = make_method(text)
    hosts = 1 if method.one_host else 8
    plan = method.plan(tokens=131072, hosts=hosts, query=40)
    slowest = max((method.cost(plan, rank, LLAMA_3_1_8B) for rank in range(hosts)), key=lambda cost: cost.flops)
    attention, linear = slowest.attention_flops / 1e12, slowest.linear_flops / 1e12
    axis.barh(height, attention, color="#4878a8")
    axis.barh(height, linear, left=attention, color="#e8a33d")
    axis.text(attention + linear, height, f" sends {slowest.sent_bytes / 1e6:.0f} MB", va="center", fontsize=8)
axis.set_yticks(range(len(texts)), texts)
axis.invert_yaxis()
axis.set(xlabel="10¹² operations a layer, slowest host: attention blue, the rest orange", xlim=(0, 240))
figure.set_label(
    "Bars of operations on the slowest host. One host alone has most by far; contiguous ring has nearly twice the "
    "attention of zigzag; of what Star, APE and APB do, most is not attention."
)

# %% [markdown]
# Operations are not time. Times are in the ledgers, with their devices; this looks at what is there.

# %%
from apb.bench.plots import newest_run
from apb.bench.plots import read_ledger as read_speeds
from apb.bench.prefill.store import newest, read

speeds = read_speeds(BENCHMARKS / "ledger.csv")
for benchmark in dict.fromkeys(row.benchmark for row in speeds):
    rows = newest_run(speeds, benchmark)
    print(f"{benchmark}: {len(rows)} rows, {rows[0].device}, {rows[0].date}, commit {rows[0].commit}")
prefills = [row for row in newest(read(BENCHMARKS / "prefill.csv")) if row.ttft_ms > 0]
for row in prefills:
    print(f"  {row.method:<30} {row.tokens} tokens, {row.hosts} hosts, {row.device}, {row.mode}: {row.ttft_ms:.0f} ms")
if not prefills:
    print("the whole prefill, all methods in one run: not recorded yet")

# %% [markdown]
# ## Your turn
#
# APB that passes 4 words is better than APB that passes 2. Or was it lucky? Two methods that answer the *same*
# questions should be compared question by question: how hard a question is then cancels out. Given both methods'
# scores, return the mean difference b − a and its standard error: the standard deviation of the differences (with
# n − 1), divided by √n.


# %%
def paired(a, b):
    raise NotImplementedError  # your code: a and b are tensors of n scores


# %%
def check(solution):
    generator = torch.Generator().manual_seed(3)
    hard = torch.rand(50, generator=generator).round()
    luck = torch.rand(50, generator=generator)
    for a, b, case in (
        (hard, hard, "the same answers"),
        (hard, hard.clamp(min=(luck > 0.9).float()), "b has some more right"),
        (luck, hard, "nothing in common"),
    ):
        difference = (b - a).double()
        expected = float(difference.mean()), float((difference.var() / len(a)).sqrt())
        mean, error = (float(x) for x in solution(a, b))
        assert abs(mean - expected[0]) < 1e-5, f"{case}: expected the mean difference {expected[0]:.4f}, got {mean:.4f}"
        assert abs(error - expected[1]) < 1e-5, f"{case}: expected the error {expected[1]:.4f}, got {error:.4f}"
    return "Right."


try:
    print(check(paired))
except NotImplementedError:
    print("Nothing written yet: fill in paired, then run this cell again.")


# %% tags=["answer"]
def answer(a, b):
    difference = b - a
    return difference.mean(), difference.std() / len(difference) ** 0.5


# %% [markdown]
# Each score alone, with two standard errors, and then the difference. The two scores' ranges all but meet. The
# difference is far from 0, because the questions that one gets wrong and the other right all fall on one side.

# %%
two, four, none = swept["APB", 2][1], swept["APB", 4][1], torch.zeros(len(truth))
for name, (mean, error) in {"2": answer(none, two), "4": answer(none, four), "4 − 2": answer(two, four)}.items():
    print(f"passing {name:<6} {mean:.2f} ± {2 * error:.2f}")

# %% [markdown]
# ## What the library does for you
#
# - `apb eval` writes RULER's tasks, asks all methods the same questions, and stops and goes on where you like.
# - `apb.evals.statistics` has the intervals, also for scores that are all 100 %, where ± 0 would be a lie.
# - `apb compare` runs one question by several methods and draws their masks; `apb bench prefill` measures time to first
#   token.
#
# **Read next:** [Is it any good?](../explanation/quality.md), or how to [compare methods](../how-to/compare-methods.md)
# and [evaluate](../how-to/evaluate.md) your own model.
