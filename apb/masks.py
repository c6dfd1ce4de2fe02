"""Draw which document tokens each document token attends to, several methods side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from apb.methods import Method
from apb.plan import ContextPlan
from apb.viz import check_picture

__all__ = ["mask_grid", "masks_picture", "masks_text", "shrink"]

_SHADES = " ░▒▓█"
_SAMPLES = 8  # rows looked at for each row of cells


def mask_grid(
    method: Method, plan: ContextPlan, kept: Mapping[int, Tensor], index: Any = None, *, cells: int
) -> Float[Tensor, "cells cells"]:
    """Return how much of each cell of the document × document square the method attends to, 0 … 1.

    Args:
        method, plan: the method and the plan it made.
        kept: per block, the document positions `[kept]` that it passed on.
        index: the sparse index of one layer, if the method builds one.
        cells: a side of the grid, ≥ 1; at most the document's tokens are drawn.
    """
    n = plan.tokens
    cells = min(cells, n)
    edges = torch.arange(cells + 1) * n // cells
    between = torch.linspace(0, 1, _SAMPLES + 1)[:-1]
    rows = (edges[:-1, None] + between * (edges[1:] - edges[:-1])[:, None]).long().flatten()
    seen = method.mask(plan, rows, kept, index).float()
    summed = torch.nn.functional.pad(seen.cumsum(dim=1), (1, 0))
    share = (summed[:, edges[1:]] - summed[:, edges[:-1]]) / (edges[1:] - edges[:-1])
    return share.view(cells, _SAMPLES, cells).mean(dim=1)


def shrink(grid: Float[Tensor, "cells cells"], cells: int = 18) -> Float[Tensor, "fewer fewer"]:
    """Average a grid down to at most `cells` a side."""
    side = min(cells, len(grid))
    return adaptive_avg_pool2d(grid[None], (side, side))[0]


def masks_text(grids: Mapping[str, Tensor], *, per_line: int = 4) -> str:
    """Lay out grids of at most some 20 cells as shaded text, with their names below."""
    names, lines = list(grids), []
    for first in range(0, len(names), per_line):
        chosen = names[first : first + per_line]
        widths = [max(grids[name].shape[1], len(name)) for name in chosen]
        for row in range(max(len(grids[name]) for name in chosen)):
            cells = ["".join(_shade(x) for x in grids[name][row]) if row < len(grids[name]) else "" for name in chosen]
            lines.append("   ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())
        lines += ["   ".join(name.ljust(width) for name, width in zip(chosen, widths, strict=True)).rstrip(), ""]
    return "\n".join(lines).rstrip()


def _shade(share: Tensor) -> str:
    return _SHADES[0 if share == 0 else min(4, 1 + int(4 * float(share)))]


def masks_picture(grids: Mapping[str, Tensor], path: str | Path) -> Path:
    """Write a picture of grids side by side.

    Args:
        grids: by the name to put above each.
        path: where to; the ending (.svg, .png, .pdf) chooses the format.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another ending, or no such folder.
    """
    path = check_picture(path)
    from matplotlib.figure import Figure

    columns = min(4, len(grids))
    lines = -(-len(grids) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, grid) in zip(axes.flat, grids.items(), strict=False):
        axis.set_axis_on()
        axis.imshow(grid.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(name.replace(":", ":\n").replace(",", ",\n"), fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.supxlabel("document tokens seen", fontsize=9)
    figure.supylabel("document tokens that attend", fontsize=9)
    figure.savefig(path, dpi=150)
    return path
