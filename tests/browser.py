"""The check of the documentation's site, and with it the browser that tests of pages use."""

import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location(
    "check_site", Path(__file__).resolve().parent.parent / "docs" / "check_site.py"
)
assert spec and spec.loader
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)
