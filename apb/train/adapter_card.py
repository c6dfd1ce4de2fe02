"""The model card of an adapter, from the facts of its training."""

from collections.abc import Mapping
from typing import Any

__all__ = ["adapter_card"]

_CARD = """\
---
base_model: {base_model}
library_name: peft
license: apache-2.0
---

# Long-context tasks for {base_model}

A LoRA adapter (rank {rank}, alpha {alpha}, all linear layers; {megabytes:.1f} MB in bfloat16) that teaches the model to
find, follow and count facts in long documents. It was trained under full attention alone: it knows nothing of the
methods that approximate attention, and serves to tell them apart on tasks that full attention does well.

- **Data:** generated documents of {lengths} tokens of the tasks {tasks}, drawn equally often, up to {turns} questions
  each. Words and texts are those of the training split, which the evaluation never uses.
- **Training:** {done} steps of {batch} document tokens on {ranks} × {device}, {minutes:.1f} minutes; AdamW, learning
  rate {lr:g} after {warmup} steps, falling along a cosine; loss on the answers' tokens only. Seed {seed}.
- **Use:** `apb eval --adapter DIRECTORY …`, `apb generate --adapter DIRECTORY …`, or PEFT's
  `PeftModel.from_pretrained`.
- **Limits:** it answers in the wording of these tasks, and is no better at anything else.

| step | loss | learned tokens predicted |
| ---: | ---: | ---: |
{curve}
"""


def adapter_card(facts: Mapping[str, Any], size: int) -> str:
    """Write the card.

    Args:
        facts: what `training.json` holds.
        size: of the weights' file, in bytes.
    """
    points = facts["curve"]
    shown = points[:: max(1, len(points) // 10)]
    if points and shown[-1] != points[-1]:
        shown = [*shown, points[-1]]
    last = points[-1] if points else {"step": 0, "seconds": 0.0}
    return _CARD.format(
        **{name: facts[name] for name in ("base_model", "rank", "alpha", "turns", "ranks", "lr", "warmup", "seed")},
        megabytes=size / 1e6,
        lengths=", ".join(map(str, facts["lengths"])),
        tasks=", ".join(facts["tasks"]),
        done=f"{last['step']:.0f}",
        batch=f"{facts['batch_tokens'] * facts['ranks']:,}",
        device=facts["environment"]["device"],
        minutes=last["seconds"] / 60,
        curve="\n".join(f"| {p['step']:.0f} | {p['loss']:.4f} | {p['right']:.1%} |" for p in shown),
    )
