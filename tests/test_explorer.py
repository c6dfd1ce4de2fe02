"""The explorer counts as Python does, refuses what Python refuses, and works in a browser, from disk."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apb.bench.prefill.shapes import SHAPES
from apb.methods import METHODS, make_method

EXPLORER = Path(__file__).resolve().parent.parent / "docs" / "explorer"
SOURCE = "".join((EXPLORER / name).read_text() for name in ("plan.js", "costs.js"))
NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")

DRIVER = """
const text = (key, value) => (typeof value === "bigint" ? String(value) : value);
function answer(given) {
  const { shape, ...settings } = given;
  const python = Plan.pythonCall(settings);
  try {
    const plan = Plan.makePlan(settings);
    return { python, plan, costs: Costs.hostCosts(settings, plan, Costs.SHAPES[shape]) };
  } catch (error) {
    if (!(error instanceof Plan.Refused)) throw error;
    return { python, refused: error.setting, why: error.message, change: error.change };
  }
}
const said = JSON.stringify(RESULT, text);
"""


def dump(page, *flags):
    """Return what the browser makes of a page, and what it wrote on its console."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags]
    done = subprocess.run(
        [*command, "--virtual-time-budget=8000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def in_node(program, folder):
    done = subprocess.run([NODE, "-"], input=f"{program}console.log(said);", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_browser(program, folder):
    page = folder / "program.html"
    page.write_text(
        f'<meta charset="utf-8"><pre></pre><script>{program}document.querySelector("pre").textContent = said;</script>'
    )
    return json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", dump(page)[0], re.DOTALL)[1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run an expression behind the explorer's counting code, in Node or in a browser."""
    if not (NODE or BROWSER):
        pytest.skip("neither node nor chromium to run JavaScript in")
    engine = partial(in_node if NODE else in_browser, folder=tmp_path_factory.mktemp("explorer"))
    return lambda expression, source=SOURCE: engine(source + DRIVER.replace("RESULT", expression))


def answers(run, cases, **settings):
    return run(f"{json.dumps(cases)}.map(answer)", **settings)


def check(case, said):
    """Hold one answer against Python, which runs the call that the page shows."""
    names = {"anchor", "passing", "compressor", "query_in", "layout", "split_anchor"}
    try:
        plan = eval(said["python"], {"make_method": make_method})
    except ValueError as error:
        why = str(error)
        assert said.get("refused") == why.split(":")[0].replace("prefix", "anchor"), (case, why, said)
        assert set(re.findall(r"\d+", said["why"])) <= {*re.findall(r"\d+", why), "0", "1"}, (case, why, said)
        return
    assert "plan" in said, (case, said)
    method = make_method(said["python"].split('"')[1])
    if case["method"] in ("apb", "spava"):
        for name in names & case.keys():
            if name != "compressor" and (name not in ("anchor", "passing") or case[name] is not None):
                assert getattr(method, name) == case[name], (case, name)
    theirs = said["plan"]
    for name in ("tokens", "hosts", "anchor", "passing", "anchor_rows", "block_tokens", "owner"):
        assert theirs[name] == getattr(plan, name), (case, name)
    assert [{**asdict(block), "tokens": block.tokens} for block in plan.blocks] == theirs["blocks"], case
    for host, mine in zip(plan.host_plans, theirs["host_plans"], strict=True):
        assert [list(span) for span in host.anchor_spans] == mine["anchor_spans"], case
        for name in ("rank", "anchor_rows", "query_rows", "block_rows", "held_rows", "rows"):
            assert getattr(host, name) == mine[name], (case, name)
    for rank, mine in enumerate(said["costs"]):
        cost = method.cost(plan, rank, SHAPES[case["shape"]])
        assert {name: int(value) for name, value in mine.items()} == {**asdict(cost), "flops": cost.flops}, (case, rank)


COUNTS = st.one_of(st.integers(0, 9), st.integers(0, 5000), st.sampled_from([-1, 1024, 4096]))
CASES = st.fixed_dictionaries(
    {
        "method": st.sampled_from([*METHODS, "apb", "apb", "spava"]),
        "shape": st.sampled_from([*SHAPES]),
        "tokens": st.one_of(st.integers(0, 70), st.integers(1, 2**24), st.integers(10, 30).map(lambda i: 2**i)),
        "hosts": st.one_of(st.just(1), st.integers(1, 9), st.integers(0, 64)),
        "anchor": st.one_of(st.none(), COUNTS),
        "passing": st.one_of(st.none(), COUNTS),
        "query": st.one_of(st.integers(0, 60), COUNTS),
        "query_offset": st.one_of(st.just(0), COUNTS),
        "query_in": st.sampled_from(["anchor", "prefill", "after"]),
        "layout": st.sampled_from(["contiguous", "zigzag"]),
        "split_anchor": st.booleans(),
        "compressor": st.sampled_from(["query-aware", "snapkv"]),
    }
)


@given(cases=st.lists(CASES, min_size=20, max_size=60))
def test_the_page_counts_and_refuses_as_python_does(run, cases):
    for case, said in zip(cases, answers(run, cases), strict=True):
        check(case, said)


GRID = [
    {"method": method, "shape": shape, "tokens": tokens, "hosts": hosts, "query": 40, "query_offset": 0, **extra}
    for method, takes in METHODS.items()
    for tokens in (1024, 131072, 1048576, 100_003)
    for hosts in ([1, 2] if takes.one_host else [1, 2, 3, 8, 64])
    for shape in ("llama-3.1-8b", "yi-34b")
    for extra in (
        [
            {"split_anchor": split, "layout": layout, "query_in": place, "compressor": compressor, "query_offset": s}
            for split, layout in ((False, "contiguous"), (True, "zigzag"))
            for place, compressor in (("anchor", "query-aware"), ("prefill", "query-aware"), ("after", "snapkv"))
            for s in (0, 100)
        ]
        if "split_anchor" in takes.settings
        else [{}]
    )
]


def test_on_a_grid_of_every_method(run):
    said = answers(run, GRID)
    for case, one in zip(GRID, said, strict=True):
        check(case, one)
    assert sum("plan" in one for one in said) > 300
    assert max(int(cost["flops"]) for one in said for cost in one.get("costs", [])) > 2**53
