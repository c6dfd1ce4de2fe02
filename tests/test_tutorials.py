"""Every tutorial runs, and its exercise's checker takes the answer and rejects what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted(ROOT.glob("tutorials/[0-9]*.py"))

# Answers with a plausible mistake, as expressions over the tutorial's own names.
WRONG = {
    "1_split_a_context": [
        "lambda index, hosts: index % hosts",  # dealt out in turn
        "lambda index, hosts: index // 2",  # contiguous pairs
    ],
    "2_choose_which_keys_to_keep": [
        "lambda k, query: answer(k, query.mean(dim=2, keepdim=True))",  # the mean before the maximum
        "lambda k, query: answer(k, query.roll(1, dims=1))",  # another grouping of heads
        "lambda k, query: (query @ k.repeat_interleave(2, dim=1).mT).amax(dim=2)",  # a score a query head
    ],
    "3_pass_blocks_between_hosts": [
        "lambda gathered, index, hosts: torch.cat((gathered[0] + gathered[1])[:index], dim=2)",  # not mirrored
        "lambda gathered, index, hosts: torch.cat((gathered[0] + gathered[1][::-1])[:index + 1], dim=2)",  # itself too
    ],
    "4_masked_flash_attention": [
        "lambda first, end, a, p: (first + p + 1, end + p)",  # the anchor's rows shifted too
        "lambda first, end, a, p: (answer(first, end, a, p)[0] - 1, answer(first, end, a, p)[1])",  # off by one
    ],
    "5_apb_end_to_end": [
        "lambda q, keys, values: apb.merge(*(torch.stack(x) for x in zip(*("
        "apb.decode_attention(q, k, v, causal=True) for k, v in zip(keys, values)))))[0]",  # causal everywhere
        "lambda q, keys, values: apb.merge(*(torch.stack(x) for x in zip(*("
        "apb.decode_attention(q, k, v, causal=False) for k, v in zip(keys, values)))))[0]",  # causal nowhere
    ],
}

DRIVER = """
import runpy, sys
names = runpy.run_path(sys.argv[1], run_name="__main__")
assert names["check"](names["answer"]) == "Right."
for wrong in sys.argv[2:]:
    try:
        names["check"](eval(wrong, names))
    except AssertionError as error:
        assert str(error), "a checker should say what is wrong"
    else:
        sys.exit(f"the checker took a wrong answer: {wrong}")
"""


def test_tutorials_are_complete():
    assert [path.stem for path in TUTORIALS] == sorted(WRONG)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial(path):
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(path), *WRONG[path.stem]],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "Nothing written yet" in run.stdout  # the exercise is left to the reader


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_has_its_parts(path):
    text = path.read_text()
    for part in (
        "# **Goal.**",
        "## Your turn",
        'tags=["answer"]',
        "## What the library does for you",
        "**Read next:**",
    ):
        assert part in text, f"{path.name} lacks {part!r}"
    assert "reference" in text
