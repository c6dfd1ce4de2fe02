"""What a run leaves behind beside its state: heads, curve, picture, model card, all from the same facts."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch

from apb.bench import environment
from apb.compress.retaining_head import save_retaining_head
from apb.files import write_whole
from apb.train.overlap import Curve
from apb.train.retaining_heads import TrainedHeads

__all__ = ["HEADS_FILE", "curve_picture", "model_card", "write_report"]

HEADS_FILE = "heads.safetensors"

_CARD = """\
---
license: apache-2.0
base_model: {base}
---

# Retaining heads for {on}

One small network per layer, `fc2(silu(fc1(concat(q, k, v))))` on the projections before RoPE, scores every document
token per KV head. APB (arXiv 2502.12085) passes on the keys and values with the highest scores. The heads were trained
as in Locret (arXiv 2410.01805) with the model frozen; the label of a token is the largest scaled attention logit that
any answer token, in any query head of the group, gives it under full attention.

{done}, {seconds} s on {device}. The tokens had seen {seen}.

## Use

```console
$ apb generate --model {base}{option} --compressor retaining-head \\
      --heads {file} --document FILE --query TEXT --hosts 4
```

The file has the keys of the released APB-Locret checkpoints: `model.layers.{{i}}.self_attn.fc1.weight` and
`…fc2.weight`.

## What it costs

{parameters:,} parameters, {size:,} bytes; {operations:,} operations for every document token.

## How well it chooses

Overlap of the {share} of the document's tokens with the highest score and the {share} with the highest label, without
pooling; mean over layers, KV heads and {examples} held-out examples. Query-aware scores, which need no
training, reach {query_aware:.3f} on the same examples, random ones {random:.3f}.

| Step | Overlap | Loss |
| ---: | ---: | ---: |
{points}

| Held-out example | Retaining heads | Query-aware |
| --- | ---: | ---: |
{by_example}

## Data and settings

| | |
| --- | --- |
{settings}

## Limitations

The overlap says how well the heads imitate the label, not how well the model answers: measure that too. The heads fit
this model{with_this} only. Trained on examples of up to
{longest} tokens ({data}), they may choose worse on other questions,
languages or lengths. Examples ran on one host, so a token had seen the whole document before it; in APB it sees its
host's anchor, passing blocks and own block.
"""


def write_report(trained: TrainedHeads, out: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> list[Path]:
    """Write heads.safetensors, curve.json, README.md and, if matplotlib is there, curve.png; return their paths."""
    out = Path(out)
    facts = dict(trained.facts) | _outcome(trained)
    written = [out / HEADS_FILE, out / "curve.json", out / "README.md"]
    metadata = facts | {"curve": json.dumps(trained.curve.as_json())}
    heads = trained.heads.export(dtype)
    write_whole(written[0], lambda part: save_retaining_head(heads, part, metadata))
    write_whole(written[1], lambda part: part.write_text(json.dumps(trained.curve.as_json(), indent=2) + "\n"))
    card = model_card(trained, facts, size=written[0].stat().st_size)
    write_whole(written[2], lambda part: part.write_text(card, encoding="utf-8"))
    if find_spec("matplotlib") is not None:
        written.append(out / "curve.png")
        write_whole(written[-1], lambda part: curve_picture(trained.curve, part))
    return written


def _outcome(trained: TrainedHeads) -> dict[str, str]:
    """Return what came of the run and where it ran, as strings."""
    here = environment()
    return {
        "steps_done": str(trained.step),
        "training_seconds": f"{trained.seconds:.0f}",
        "overlap": f"{trained.curve.points[-1].overlap:.4f}",
        "overlap_untrained": f"{trained.curve.points[0].overlap:.4f}",
        "overlap_query_aware": f"{trained.curve.query_aware:.4f}",
        "overlap_random": f"{trained.curve.fraction:.4f}",
        **{name: here[name] for name in ("date", "torch", "commit")},
        "device": here["device"] if trained.heads.fc1.is_cuda else "CPU",
    }


def curve_picture(curve: Curve, path: Path) -> None:
    """Draw the overlap over the steps, with what query-aware and random scores reach."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p.step for p in curve.points], [p.overlap for p in curve.points], "o-", label="retaining heads")
    axes.axhline(curve.query_aware, color="tab:orange", linestyle="--", label="query-aware (training free)")
    axes.axhline(curve.fraction, color="grey", linestyle=":", label="random")
    axes.set_xlabel("steps")
    axes.set_ylabel(f"overlap of the top {curve.fraction:.0%} with the label")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def model_card(trained: TrainedHeads, facts: dict[str, str], *, size: int) -> str:
    """Return the README of the trained heads."""
    curve, parameters = trained.curve, sum(weight.numel() for weight in trained.heads.parameters())
    base, adapter = facts.get("base_model", "the model"), facts.get("adapter", "none")
    plain = adapter == "none"
    return _CARD.format(
        base=base,
        on=base if plain else f"{base} with the adapter {adapter}",
        option="" if plain else f" --adapter {adapter}",
        with_this="" if plain else " with this adapter",
        done=f"{trained.step} of {facts['steps']} steps",
        seconds=facts["training_seconds"],
        device=facts["device"],
        seen="the question, embedded behind the prefix" if facts["query_in"] == "anchor" else "the document alone",
        file=HEADS_FILE,
        parameters=parameters,
        operations=2 * parameters,
        size=size,
        share=f"{curve.fraction:.0%}",
        random=curve.fraction,
        query_aware=curve.query_aware,
        examples=len(curve.examples),
        points="\n".join(f"| {p.step} | {p.overlap:.3f} | {p.loss:.4f} |" for p in curve.points),
        by_example="\n".join(f"| {name} | {ours:.3f} | {theirs:.3f} |" for name, ours, theirs in curve.examples),
        settings="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        longest=max(map(int, facts["lengths"].split(","))),
        data=facts["data"],
    )
