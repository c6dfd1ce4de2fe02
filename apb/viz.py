"""Draw a plan: a strip of text for the terminal, and a picture of hosts, blocks and masks."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from apb.plan import Block, ContextPlan
from apb.reference import apb_mask

__all__ = ["check_picture", "picture", "text_strip"]

_COLOURS = {"anchor": "#e8a33d", "passing": "#4f9d69", "block": "#4878a8", "query": "#b0578d"}
_MASK_CELLS = 160


def text_strip(plan: ContextPlan, *, width: int = 72) -> str:
    """Draw each host's keys to scale, one line a block: A anchor, P passing, B block, Q query that runs along."""
    longest = max(sum(tokens for _, tokens in _keys(plan, block)) for block in plan.blocks)
    lines = []
    for host in plan.host_plans:
        for block in host.blocks:
            bar = "".join(
                name[0].upper() * max(1, round(width * tokens / longest))
                for name, tokens in _keys(plan, block)
                if tokens
            )
            lines.append(f"host {host.rank}  {bar}")
    legend = "A anchor   P passing   B block" + ("   Q query" if plan.host(0).query_rows else "")
    return "\n".join([*lines, legend])


def check_picture(path: str | Path) -> Path:
    """Return the path of a picture, if it can be written.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: an ending other than .svg, .png or .pdf, or no such folder.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf") or not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"picture: expected a file in an existing folder ending in .svg, .png or .pdf, got {path}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"picture: {path} cannot be written; expected a file or folder that this user may write to")
    if find_spec("matplotlib") is None:
        raise ImportError("matplotlib is needed for pictures; pip install 'apb[viz]'")
    return path


def _keys(plan: ContextPlan, block: Block) -> list[tuple[str, int]]:
    host = plan.host(block.rank)
    anchor = plan.anchor_rows if block.sees_anchor and block.tokens else 0
    passing = block.passing_tokens if block.tokens else 0
    return [("anchor", anchor), ("passing", passing), ("block", block.tokens), ("query", host.query_rows)]


def picture(plan: ContextPlan, path: str | Path, *, progress: Callable[[str], None] | None = None) -> Path:
    """Write a picture of who holds what and of each block's mask.

    Args:
        plan: to draw.
        path: where to; the ending (.svg, .png, .pdf) chooses the format.
        progress: called with what is being drawn.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another ending, or no such folder.
    """
    path = check_picture(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    blocks = [block for host in plan.host_plans for block in host.blocks]
    columns = min(4, len(blocks))
    mask_rows = -(-len(blocks) // columns)
    figure = Figure(figsize=(10, 1.6 + 0.28 * len(blocks) + 2.7 * mask_rows), layout="constrained")
    grid = figure.add_gridspec(1 + mask_rows, columns, height_ratios=[0.6 + 0.28 * len(blocks)] + [2.7] * mask_rows)

    axes = figure.add_subplot(grid[0, :])
    for line, block in enumerate(blocks):
        left = 0
        for name, tokens in _keys(plan, block):
            axes.barh(line, tokens, left=left, color=_COLOURS[name], height=0.75)
            left += tokens
    axes.set_yticks(range(len(blocks)), [f"host {block.rank}: [{block.start}, {block.stop})" for block in blocks])
    axes.invert_yaxis()
    axes.set_xlabel("keys that the block's rows can see")
    axes.spines[["top", "right"]].set_visible(False)
    names = {name: f"{name} {count}" for name, count in _largest(plan).items() if count}
    figure.legend(
        handles=[Patch(color=_COLOURS[name], label=label) for name, label in names.items()],
        loc="outside upper right",
        ncols=len(names),
        frameon=False,
    )
    figure.suptitle(f"{plan.tokens} tokens over {plan.hosts} hosts, {plan.layout}", x=0.01, ha="left")

    for place, block in enumerate(blocks):
        if progress:
            progress(f"mask of block {block.index}")
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        axes.imshow(_mask_image(plan, block).numpy(), interpolation="nearest", aspect="auto")
        axes.set_title(f"host {block.rank}, block {block.index}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("keys", fontsize=8)
        axes.set_ylabel("rows", fontsize=8)
    figure.savefig(path)
    return path


def _largest(plan: ContextPlan) -> dict[str, int]:
    found: dict[str, int] = {}
    for block in plan.blocks:
        for name, tokens in _keys(plan, block):
            found[name] = max(found.get(name, 0), tokens)
    return found


def _mask_image(plan: ContextPlan, block: Block) -> torch.Tensor:
    """Return the block's mask, shrunk to at most 160 cells a side, as RGB: what is seen, in its part's colour."""
    parts = [(name, tokens) for name, tokens in _keys(plan, block) if name != "query"]
    total = sum(tokens for _, tokens in parts)
    shrink = max(1.0, total / _MASK_CELLS)
    cells = [round(tokens / shrink) for _, tokens in parts]
    anchor, passing, own = cells
    mask = apb_mask(anchor + own, anchor + passing + own, anchor, passing)
    image = torch.ones(*mask.shape, 3)
    first = 0
    for (name, _), count in zip(parts, cells, strict=True):
        colour = torch.tensor([int(_COLOURS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        region = image[:, first : first + count]
        region[mask[:, first : first + count]] = colour
        first += count
    return image if image.numel() else torch.ones(1, 1, 3)
