"""The explorer counts as Python does, refuses what Python refuses, and works in a browser, from disk."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from browser import check as check_site
from hypothesis import given
from hypothesis import strategies as st

from apb.bench.prefill.shapes import SHAPES
from apb.methods import METHODS, make_method

EXPLORER = Path(__file__).resolve().parent.parent / "docs" / "explorer"
SOURCE = "".join((EXPLORER / name).read_text() for name in ("plan.js", "costs.js"))
NODE = shutil.which("node")

ANSWER = """
function answer({ shape, ...settings }) {
  const python = Plan.pythonCall(settings);
  try {
    const plan = Plan.makePlan(settings);
    return { python, plan, costs: Costs.hostCosts(settings, plan, Costs.SHAPES[shape]) };
  } catch (error) {
    if (!(error instanceof Plan.Refused)) throw error;
    return { python, refused: error.setting, why: error.message, change: error.change };
  }
}
function leave(given) {
  const said = [];
  for (let left = 9; left && !said.at(-1)?.plan; left--) {
    said.push(answer(given));
    given = { ...given, ...said.at(-1).change };
  }
  return "plan" in said.at(-1) || said;
}
const text = (key, value) => (typeof value === "bigint" ? String(value) : value);
"""


def dump(url):
    """Return the page that a browser makes of an address, and the lines that it wrote on its console."""
    done = check_site.browse("--virtual-time-budget=8000", "--dump-dom", url)
    assert done is not None, "the browser failed three times"
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def in_node(program, folder):
    """Return what the program calls `said`."""
    done = subprocess.run([NODE, "-"], input=f"{program}console.log(said);", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_browser(program, folder):
    """Return what the program calls `said`."""
    page, show = folder / "program.html", 'document.querySelector("pre").textContent = said;'
    page.write_text(f'<meta charset="utf-8"><pre></pre><script>{program}{show}</script>')
    return shown(dump(page.as_uri())[0])


def shown(page):
    return json.loads(html.unescape(re.search(r"<pre[^>]*>([^<]*)</pre>\s*(<script|</body)", page)[1]))


@pytest.fixture(scope="module")
def js(tmp_path_factory):
    """Run an expression behind the page's counting code."""
    folder = tmp_path_factory.mktemp("explorer")

    def run(expression, *, source=SOURCE, engine=in_node if NODE else in_browser):
        if not (NODE if engine is in_node else check_site.has_browser()):
            pytest.skip("no node, or no chromium, to run JavaScript in")
        return engine(f"{source}{ANSWER}const said = JSON.stringify({expression}, text);", folder)

    return run


def answers(js, cases, **options):
    return js(f"{json.dumps(cases)}.map(answer)", **options)


def check(case, said):
    """Hold one answer against Python, which runs the call that the page shows."""
    try:
        plan = eval(said["python"], {"make_method": make_method})
    except ValueError as error:
        # The same setting, and no figure that Python does not name.
        why = str(error)
        assert said.get("refused") == why.split(":")[0].replace("prefix", "anchor"), (case, why, said)
        assert set(re.findall(r"\d+", said["why"])) <= {*re.findall(r"\d+", why), "0", "1"}, (case, why, said)
        return
    assert "plan" in said, (case, said)
    method, theirs = make_method(said["python"].split('"')[1]), said["plan"]
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


@given(cases=st.lists(CASES, min_size=20, max_size=40))
def test_the_page_counts_and_refuses_as_python_does(js, cases):
    for case, said in zip(cases, answers(js, cases), strict=True):
        check(case, said)


GRID = [
    {"method": method, "shape": shape, "tokens": tokens, "hosts": hosts, "query": 40, "query_offset": 0, **settings}
    for method, named in METHODS.items()
    for tokens in (1024, 131072, 1048576, 100_003)
    for hosts in ([1, 2] if named.one_host else [1, 3, 8, 64])
    for shape in ("llama-3.1-8b", "yi-34b")
    for settings in (
        [
            {"split_anchor": split, "layout": layout, "query_in": place, "compressor": compressor, "query_offset": s}
            for split, layout in ((False, "contiguous"), (True, "zigzag"))
            for place, compressor in (("anchor", "query-aware"), ("prefill", "query-aware"), ("after", "snapkv"))
            for s in (0, 100)
        ]
        if "split_anchor" in named.settings and shape == "yi-34b"
        else [{}]
    )
]


@pytest.mark.parametrize("engine", [in_node, in_browser])
def test_on_a_grid_of_every_method(js, engine):
    said = answers(js, GRID, engine=engine)
    for case, one in zip(GRID, said, strict=True):
        check(case, one)
    assert sum("plan" in one for one in said) > 300
    assert max(int(cost["flops"]) for one in said for cost in one.get("costs", [])) > 2**53


@given(cases=st.lists(CASES, min_size=20, max_size=40))
def test_the_ways_out_lead_out(js, cases):
    assert [said for said in js(f"{json.dumps(cases)}.map(leave)") if said is not True] == []


def test_methods_and_shapes_are_pythons(js):
    shapes, methods = js("[Costs.SHAPES, Plan.METHODS]")
    for name, shape in shapes.items():
        assert {key: getattr(SHAPES[name], key) for key in shape} == shape
        assert SHAPES[name].bytes_per_value == 2
    assert [*shapes] == [*SHAPES]
    assert {name: (of["title"], of.get("one_host", False)) for name, of in methods.items()} == {
        name: (of.title, of.one_host) for name, of in METHODS.items()
    }


BUGS = {
    "a zigzag that does not turn back": ("2 * p.hosts - 1 - index", "index - p.hosts"),
    "a gather is counted without the anchor's share": ("plan.split_anchor && slot === 0 ?", "false ?"),
    "a shared prefix that no cache keeps": ("block_rows + length(kept)", "block_rows"),
    "the first block passes on what later blocks see as anchor": (
        "p.passing, stop - start - skipped",
        "p.passing, stop - start",
    ),
    "the ring sends its own keys once more": ("h.rank === next ? 0 : h.block_rows", "h.block_rows"),
    "an anchor longer than a block is let through": ("p.anchor > p.block_tokens &&", "false &&"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(js, bug):
    old, new = BUGS[bug]
    assert SOURCE.count(old) == 1
    cases = [case for case in GRID if case["shape"] == "yi-34b" and case["hosts"] < 10]
    cases += [{**case, "anchor": 1000, "passing": 10**6, "compressor": "snapkv"} for case in cases if len(case) > 6]
    with pytest.raises(AssertionError):
        for case, said in zip(cases, answers(js, cases, source=SOURCE.replace(old, new)), strict=True):
            check(case, said)


WATCH = """<script>
  const errors = [];
  addEventListener("error", (event) => errors.push(event.message ?? event.target.src ?? event.target.href), true);
</script>"""
VISIT = """<pre></pre><script>
  const $ = (selector) => document.querySelector(selector);
  const set = (selector, value) => {
    $(selector).value = value;
    $(selector).dispatchEvent(new Event("input", { bubbles: true }));
  };
  const look = () => ({
    python: $("[data-part=python]").textContent,
    table: [...document.querySelectorAll(".costs tbody tr")].map((tr) =>
      [...tr.querySelectorAll("td")].map((td) => +td.dataset.exact)),
    busiest: document.querySelector(".costs .busiest th")?.textContent,
    said: $("[data-part=summary]").textContent,
    refused: $("[data-part=refused]").hidden ? null : $("[data-part=why]").textContent,
    invalid: document.querySelector("[aria-invalid]")?.id,
    shapes: document.querySelectorAll("svg polygon").length,
    bars: [...document.querySelectorAll(".bars [role=img]")].map((bar) => bar.getAttribute("aria-label")),
  });
  const steps = [look()];
  const visit = (selector, value) => { set(selector, value); steps.push(look()); };
  visit("#x-hosts-slider", 4);
  visit("#x-anchor-slider", 10);
  visit("#x-method", "star");
  visit("#x-anchor", 100000);
  $("[data-part=way-out]").click();
  steps.push(look());
  setTimeout(() => {
    $("body > pre").textContent = JSON.stringify({ errors, steps, hash: location.hash,
      status: $("[role=status]").textContent });
  }, 1000);
</script></body>"""


def test_the_page_in_a_browser(tmp_path):
    if not check_site.has_browser():
        pytest.skip("no chromium runs here")
    shutil.copytree(EXPLORER, tmp_path / "explorer")
    page = tmp_path / "explorer" / "explorer.html"
    page.write_text(page.read_text().replace("<title>", f"{WATCH}<title>").replace("</body>", VISIT))
    text, console = dump(f"{page.as_uri()}#method=apb&tokens=100003&hosts=3&query=7&layout=zigzag&shape=yi-34b")
    said = shown(text)
    assert said["errors"] == console == []

    calls = [
        'make_method("apb:layout=zigzag").plan(tokens=100003, hosts=3, query=7)',
        'make_method("apb:layout=zigzag").plan(tokens=100003, hosts=4, query=7)',
        'make_method("apb:anchor=1024,layout=zigzag").plan(tokens=100003, hosts=4, query=7)',
        'make_method("star:anchor=1024").plan(tokens=100003, hosts=4, query=7)',
        None,  # refused
        'make_method("star:anchor=25001").plan(tokens=100003, hosts=4, query=7)',
    ]
    for call, step in zip(calls, said["steps"], strict=True):
        if call is None:
            assert "100000 tokens reaches into the second block" in step["refused"] and step["invalid"] == "x-anchor"
            continue
        assert step["python"] == call and step["refused"] is None
        method, plan = make_method(call.split('"')[1]), eval(call, {"make_method": make_method})
        costs = [method.cost(plan, rank, SHAPES["yi-34b"]) for rank in range(plan.hosts)]
        names = ("rows", "pairs", "attention_flops", "linear_flops", "sent_bytes", "cache_bytes")
        assert step["table"] == [[getattr(cost, name) for name in names] for cost in costs]
        flops = [cost.flops for cost in costs]
        assert step["busiest"] == f"{flops.index(max(flops))} busiest"
        exact = make_method("flash")
        whole = exact.cost(exact.plan(tokens=plan.tokens, hosts=1), 0, SHAPES["yi-34b"]).flops
        assert f"{whole / max(flops):.1f} times fewer than exact attention on one host" in step["said"]
        assert len(step["bars"]) == plan.hosts and step["shapes"] > len(plan.blocks)
    assert said["status"] == said["steps"][-1]["said"]
    assert said["hash"] == "#method=star&shape=yi-34b&tokens=100003&hosts=4&anchor=25001"


def test_both_pages_load_the_same_and_nothing_from_elsewhere():
    alone, inside = ((EXPLORER / name).read_text() for name in ("explorer.html", "index.md"))
    files = re.findall(r'(?:src|href)="([^"]+)"', alone)
    assert files == re.findall(r'(?:src|href)="([^"]+)"', inside)
    assert all((EXPLORER / name).exists() for name in files)
    for path in EXPLORER.iterdir():
        assert not re.search(r"https?://|@import|\bfetch\(|\bimport\b", path.read_text()), path.name
