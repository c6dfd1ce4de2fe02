"""The README's tables are the ledgers': after a new run, `python benchmarks/readme.py` writes them."""

import runpy
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def test_the_tables_are_the_ledgers():
    tables = runpy.run_path(str(REPOSITORY / "benchmarks" / "readme.py"))
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert tables["filled"](text) == text
    changed = text.replace("| Full attention |", "| Full attention | 1")
    assert changed != text and tables["filled"](changed) == text
