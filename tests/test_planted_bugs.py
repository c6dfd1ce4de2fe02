"""The tests are tested: each planted bug, put into a copy of the package, makes the tests named for it fail."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apb.testing.backward_bugs import BACKWARD_BUGS
from apb.testing.bench_bugs import BENCH_BUGS
from apb.testing.bugs import BUGS as APB_BUGS
from apb.testing.compress_bugs import COMPRESS_BUGS
from apb.testing.decode_bugs import DECODE_BUGS
from apb.testing.eval_bugs import EVAL_BUGS
from apb.testing.hopper_bugs import HOPPER_BUGS
from apb.testing.method_bugs import METHOD_BUGS

BUGS = (*APB_BUGS, *METHOD_BUGS, *EVAL_BUGS, *BACKWARD_BUGS, *COMPRESS_BUGS, *DECODE_BUGS, *HOPPER_BUGS, *BENCH_BUGS)
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


# Imports what takes long once, then forks for each job; the package itself is imported after the fork.
RUNNER = """
import importlib.util, json, os, signal, sys
import einops, hypothesis, jaxtyping, pytest, safetensors.torch, torch, torch.distributed, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
def work(job):
    os.chdir(job["folder"])
    sys.path.insert(0, job["folder"])
    os.environ["PYTHONPATH"] = job["folder"]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open("output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    signal.alarm(120)
    code = pytest.main(job["arguments"])
    sys.stdout.flush()
    os._exit(code)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork() or work(job)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.path.insert(0, job["folder"])
    importlib.invalidate_caches()
    origin = importlib.util.find_spec("apb").origin
    sys.path.remove(job["folder"])
    print(json.dumps([code, origin]), flush=True)
"""


@pytest.fixture(scope="module")
def runner():
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNNER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


def test_every_bug_has_a_name_of_its_own():
    assert len({bug.name for bug in BUGS}) == len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_a_planted_bug_is_noticed(bug, tmp_path, runner):
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
    job = {"folder": str(tmp_path), "arguments": [*map(str, tests), *selection, *options]}
    runner.stdin.write(json.dumps(job) + "\n")
    runner.stdin.flush()
    code, origin = json.loads(runner.stdout.readline())
    output = (tmp_path / "output").read_text()
    assert origin == str(tmp_path / "apb" / "__init__.py")
    assert code == 1, f"not noticed (exit code {code}):\n{output[-2000:]}"
    assert re.search(r"^E .*(AssertionError|assert )", output, re.MULTILINE), output[-3000:]
