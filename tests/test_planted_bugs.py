"""The tests are tested: each planted bug, put into a copy of the package, makes the tests named for it fail."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apb.testing.backward_bugs import BACKWARD_BUGS
from apb.testing.bugs import BUGS as APB_BUGS
from apb.testing.compress_bugs import COMPRESS_BUGS
from apb.testing.decode_bugs import DECODE_BUGS
from apb.testing.eval_bugs import EVAL_BUGS
from apb.testing.hopper_bugs import HOPPER_BUGS
from apb.testing.method_bugs import METHOD_BUGS

BUGS = (*APB_BUGS, *METHOD_BUGS, *EVAL_BUGS, *BACKWARD_BUGS, *COMPRESS_BUGS, *DECODE_BUGS, *HOPPER_BUGS)
ROOT = Path(__file__).parents[1]
# A failure is all we want to see, not its smallest example.
PROFILE = """
from hypothesis import Phase

settings.register_profile(
    "planted",
    settings.get_profile("ci"),
    phases=[Phase.explicit, Phase.generate],
    database=None,
    report_multiple_bugs=False,
)
settings.load_profile("planted")
torch.set_num_threads(1)
"""


def test_every_bug_has_a_name_of_its_own():
    assert len({bug.name for bug in BUGS}) == len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_planted_bug_is_noticed(bug, tmp_path):
    shutil.copytree(ROOT / "apb", tmp_path / "apb", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    files, *selection = shlex.split(bug.tests)
    tests = sorted(path.relative_to(ROOT) for path in ROOT.glob(files))
    helpers = (f"tests/{path.name}" for path in ROOT.glob("tests/*.py") if not path.name.startswith("test_"))
    for name in (*tests, *helpers, "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + PROFILE)

    source = tmp_path / "apb" / bug.file
    text = source.read_text()
    assert text.count(bug.old) == 1, (
        f"{bug.file} holds the old text {text.count(bug.old)} times: update apb/testing/*bugs.py"
    )
    source.write_text(text.replace(bug.old, bug.new))

    options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-m", "pytest", *tests, *selection, *options]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, f"not noticed (exit code {ended.returncode}):\n{ended.stdout[-2000:]}{ended.stderr}"
    assert re.search(r"^E .*(AssertionError|assert )", ended.stdout, re.MULTILINE), ended.stdout[-3000:]
    assert str(tmp_path / "apb") in subprocess.run(
        [sys.executable, "-c", "import importlib.util as u; print(u.find_spec('apb').origin)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
