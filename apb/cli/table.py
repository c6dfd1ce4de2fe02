"""Columns of text."""

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, left: Sequence[str] = ()) -> str:
    """Lay out `rows` under `head`, right-aligned but for the columns `left`, each as wide as its widest cell."""
    cells = [tuple(head), *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    places = [str.ljust if name in left else str.rjust for name in head]
    return "\n".join(
        "  ".join(place(cell, width) for place, cell, width in zip(places, row, widths, strict=True)).rstrip()
        for row in cells
    )
