"""The documentation's Python runs and prints what it shows; its links and the files it names exist.

Every ```python block of README.md and docs/ is executed, the blocks of one page in one namespace, unless the line
before it is `<!-- not run: why -->`. If the next fence is ```text title="Output", it must hold what the block printed.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MADE = {DOCS / "tutorials" / f"{path.stem}.md" for path in ROOT.glob("tutorials/[0-9]*.py")}  # when docs are built
PAGES = [*ROOT.glob("*.md"), *sorted(set(DOCS.rglob("*.md")) - MADE)]

FENCE = re.compile(
    r"(?P<skip><!-- not run: [^\n]+ -->\n)?^```python\n(?P<code>.*?)^```$"
    r'(?:\n+^```text title="Output"\n(?P<output>.*?)^```$)?',
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:apb|tutorials|tests|benchmarks)/[\w./-]*)`")


def name(path):
    return str(path.relative_to(ROOT))


def without_fences(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """Return the anchors of a page's headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.+)$", without_fences(path.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower()) for text in headings}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("page", [p for p in PAGES if "```python\n" in p.read_text()], ids=name)
def test_python_blocks_run_and_print_what_they_show(page, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    text, namespace = page.read_text(), {"__name__": "docs"}
    for block in FENCE.finditer(text):
        if block["skip"]:
            continue
        line = text.count("\n", 0, block.start("code"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block["code"], str(page), "exec"), namespace)
        if block["output"] is not None:
            assert printed.getvalue().rstrip() == block["output"].rstrip(), f"{name(page)}, line {line + 1}"


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("tutorials/[0-9]*.py")], ids=name)
def test_links_lead_somewhere(page):
    here = page if page.suffix == ".md" else DOCS / "tutorials" / f"{page.stem}.md"
    for link in LINK.findall(without_fences(page.read_text())):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (here.parent / path).resolve() if path else here
        assert target in MADE or target.exists(), f"{name(page)} links to {link}"
        if anchor and target.exists():
            assert anchor in anchors(target), f"{name(page)} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page):
    for path in FILE.findall(page.read_text()):
        assert (ROOT / path).exists() or list(ROOT.glob(path)), f"{name(page)} names {path}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in {*PAGES, *MADE}:
        if DOCS in page.parents:
            assert str(page.relative_to(DOCS)) in navigation
