"""Where a compiled kernel spills: at the borders of its work, which costs little, or in the loop that computes."""

import re
import subprocess
from pathlib import Path

import triton

__all__ = ["count_loop_spills"]


def count_loop_spills(cubin: Path) -> int:
    """Count accesses to local memory inside the innermost loops that hold tensor-core products."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif "/*" in line:
            code.append(line)
    return sum(_count(code[start:stop], r"\b(LDL|STL)\b") for start, stop in _innermost(code, labels))


def _innermost(code: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return the loops with products, as ranges of lines, in which no other such loop lies."""
    end = max(i for i, line in enumerate(code) if re.search(r"\bEXIT\b", line))  # beyond: what waits, out of line
    found = ((re.search(r"\bBRA\b.*(\.L_x_\d+)", line), i) for i, line in enumerate(code[:end]))
    jumps = ((labels[to[1]], i) for to, i in found if to)
    loops = {
        (start, stop) for start, stop in jumps if start <= stop and _count(code[start:stop], r"\b(?:UTC)?[HIQO]G?MMA\b")
    }
    return [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def _count(code: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in code)
