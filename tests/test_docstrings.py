"""The examples in docstrings run, and show what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import apb

ROOT = Path(apb.__file__).parent


def modules():
    """Return the names of the modules that have examples."""
    for path in sorted(ROOT.rglob("*.py")):
        if ">>>" in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules()))
def test_the_examples_run(name):
    module, given = importlib.import_module(name), {}
    if "tokenizer" in Path(module.__file__).read_text(encoding="utf-8"):
        pytest.importorskip("wonderwords")
        from small_tokenizer import small_tokenizer

        given = {"tokenizer": small_tokenizer()}
    found = doctest.testmod(module, extraglobs=given)
    assert found.attempted and not found.failed
