"""Every tutorial runs, and its exercise's checker takes the answer and rejects what is wrong."""

import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted(ROOT.glob("tutorials/[0-9]*.py"))

# Answers with a plausible mistake, as expressions over the tutorial's own names; with the hint, where there is one.
WRONG = {
    "0_all_of_apb_on_one_page": [
        "lambda a, p, b: (a + b) * (a + p + b + 1) // 2",  # one large triangle
        "lambda a, p, b: b * (a + p) + b * (b + 1) // 2",  # the anchor's own rows left out
        "lambda a, p, b: a * (a + 1) // 2 + b * (a + p) + b * (b - 1) // 2",  # nobody sees itself
    ],
    "1_exact_attention_three_ways": {
        "lambda whole, part: (whole[0] - part[0], answer(whole, part)[1])": "output off .* give each its weight",
        "lambda whole, part: (whole[0] - (part[1] - whole[1]).exp() * part[0], answer(whole, part)[1])": "its share$",
        "lambda whole, part: (answer(whole, part)[0], whole[1] - part[1])": "LSE off .* subtract the sums",
        "lambda whole, part: (whole[0], answer(whole, part)[1])": "output off .* nothing is forgotten",
        "lambda whole, part: (answer(whole, part)[0], (whole[1].exp() - part[1].exp()).log())": "around 3000; e.LSE is",
        "lambda whole, part: (2 * answer(whole, part)[0], answer(whole, part)[1])": "scores around 0$",  # no hint
    },
    "3_what_a_mask_means": [
        "lambda mask, listener, speaker: 1 if mask[listener, speaker] else None",  # one layer only
        "lambda mask, listener, speaker: answer(mask.T, listener, speaker)",  # rows taken for columns
        "lambda mask, listener, speaker: (answer(mask, listener, speaker) or 1) - 1 or None",  # one layer too few
    ],
    "8_is_it_right": [
        # looks at the output alone
        "lambda merge, seed: (x := (torch.randn(3, 1, 1, 4, 16), torch.randn(3, 1, 1, 4)), torch.testing.assert_close("
        "merge(*x)[0].double(), reference.merge(*x)[0], atol=1e-5, rtol=1e-5))",
        # no part that is empty
        "lambda merge, seed: (x := (torch.randn(3, 1, 1, 4, 16), 100 * torch.randn(3, 1, 1, 4)), [torch.testing."
        "assert_close(y.double(), z, atol=1e-5, rtol=1e-5) for y, z in zip(merge(*x), reference.merge(*x))])",
        # bit by bit
        "lambda merge, seed: (x := (torch.randn(3, 1, 1, 4, 16), torch.randn(3, 1, 1, 4)), [torch.testing."
        "assert_close(y.double(), z, atol=0, rtol=0) for y, z in zip(merge(*x), reference.merge(*x))])",
    ],
    "7_from_triton_to_hopper": [
        "lambda program, tiles, group: (program // (tiles * group), program // group % tiles, "
        "program % group)",  # the first rows first
        "lambda program, tiles, group: (program // (tiles * group), tiles - 1 - program % tiles, "
        "program // tiles % group)",  # one query head after the other
    ],
    "10_is_it_any_good": [
        "lambda a, b: (answer(a, b)[0], (a.var() / len(a) + b.var() / len(b)) ** 0.5)",  # as if nothing were shared
        "lambda a, b: (answer(a, b)[0], (b - a).std())",  # the spread of one question
        "lambda a, b: (answer(b, a)[0], answer(b, a)[1])",  # the wrong way round
    ],
    "2_split_a_context": [
        "lambda index, hosts: index % hosts",  # dealt out in turn
        "lambda index, hosts: index // 2",  # contiguous pairs
    ],
    "4_choose_which_keys_to_keep": [
        "lambda k, query: answer(k, query.mean(dim=2, keepdim=True))",  # the mean before the maximum
        "lambda k, query: answer(k, query.roll(1, dims=1))",  # another grouping of heads
        "lambda k, query: (query @ k.repeat_interleave(2, dim=1).mT).amax(dim=2)",  # a score a query head
    ],
    "5_pass_blocks_between_hosts": {
        "lambda gathered, index, hosts: torch.cat((gathered[0] + gathered[1])[:index], dim=2)": "stand backwards$",
        "lambda gathered, index, hosts: torch.cat((gathered[0] + gathered[1][::-1])[:index + 1], dim=2)": "it only$",
        "lambda gathered, index, hosts: torch.cat([both[slot] for rank, both in enumerate(zip(*gathered)) "
        "for slot, block in enumerate((rank, 2 * hosts - 1 - rank)) if block < index], dim=2)": "not the document's$",
        "lambda gathered, index, hosts: torch.cat(gathered[0][:index], dim=2)": r"got \[0.0, 1.0, 1.0\]$",  # no hint
        "lambda gathered, index, hosts: None": "got None$",
    },
    "6_masked_flash_attention": [
        "lambda first, end, a, p: (first + p + 1, end + p)",  # the anchor's rows shifted too
        "lambda first, end, a, p: (answer(first, end, a, p)[0] - 1, answer(first, end, a, p)[1])",  # off by one
    ],
    "9_put_it_into_a_model": [
        "lambda q, keys, values: apb.merge(*(torch.stack(x) for x in zip(*("
        "apb.decode_attention(q, k, v, causal=True) for k, v in zip(keys, values)))))[0]",  # causal everywhere
        "lambda q, keys, values: apb.merge(*(torch.stack(x) for x in zip(*("
        "apb.decode_attention(q, k, v, causal=False) for k, v in zip(keys, values)))))[0]",  # causal nowhere
    ],
}

DRIVER = """
import re, runpy, sys
names = runpy.run_path(sys.argv[1], run_name="__main__")
assert names["check"](names["answer"]) == "Right."
for wrong, says in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        names["check"](eval(wrong, names))
    except AssertionError as error:
        assert str(error), "a checker should say what is wrong"
        assert re.search(says, str(error)), f"expected {says!r} of {wrong}, got {error}"
    else:
        sys.exit(f"the checker took a wrong answer: {wrong}")
"""


def test_tutorials_are_complete():
    assert [path.stem for path in TUTORIALS] == sorted(WRONG)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial(path):
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    wrong = WRONG[path.stem]
    says = wrong if isinstance(wrong, dict) else dict.fromkeys(wrong, "")
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(path), *chain.from_iterable(says.items())],
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


def code_lines(text):
    """Count what a percent-format file has to say to Python: no markdown, no comments, no empty lines."""
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#")
        for cell in re.split(r"^(?=# %%)", text, flags=re.MULTILINE)
        if not cell.startswith("# %% [markdown]")
        for line in cell.splitlines()
    )


def test_code_lines():
    text = "# ---\n# head\n\n# %% [markdown]\n# words\nwords\n\n# %%\n# why\nx = 1  # one\n\n    y\n# %% tags=[]\nz\n"
    assert code_lines(text) == 3


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_is_short(path):
    assert 30 <= code_lines(path.read_text()) <= 150
