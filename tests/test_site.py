"""The check of the built site finds what it should; the site's settings and files keep reading within one host."""

import os
import re
from pathlib import Path

import pytest
from browser import check

ROOT = Path(__file__).resolve().parent.parent
VENDOR = ROOT / "docs" / "assets" / "vendor"
SITE = os.environ.get("APB_SITE")  # a built site, to be checked as `make docs` does


SOUND = '<h1 id="top">A</h1><a href="sub/b.html#here">b</a><a href="https://example.org/x">far</a><a href="#top">up</a>'


@pytest.fixture
def site(tmp_path):
    """A sound site of two pages and a style sheet."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(SOUND)
    (tmp_path / "sub" / "b.html").write_text(
        '<link rel="stylesheet" href="../s.css?v=1"><link rel="canonical" href="https://example.org/b">'
        '<style>p { background: url("data:image/png;base64,AA=="); }</style>'
        '<h2 id="here">B</h2><img alt="dot" src="data:image/png;base64,AA=="><a href="../a.html">a</a>'
    )
    (tmp_path / "s.css").write_text("p { background: url(dot.png); }")
    (tmp_path / "dot.png").write_bytes(b"")
    return tmp_path


def test_a_sound_site_has_no_fault(site):
    assert list(check.find_faults(site)) == []


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        ('<a href="none.html">x</a>', "a.html links to none.html: no such file"),
        ('<a href="/none.html">x</a>', "a.html links to /none.html: no such file"),
        ('<a href="#none">x</a>', "a.html links to #none: no such anchor"),
        ('<a href="sub/b.html#none">x</a>', "a.html links to sub/b.html#none: no such anchor"),
        ('<script src="none.js"></script>', "a.html loads none.js: no such file"),
        ('<script src="https://x.org/a.js"></script>', "a.html loads https://x.org/a.js: another host"),
        ('<script src="//x.org/a.js"></script>', "a.html loads //x.org/a.js: another host"),
        ('<link rel="preconnect" href="https://x.org">', "a.html loads https://x.org: another host"),
        ('<img alt="a" srcset="https://x.org/a.png 2x">', "a.html loads https://x.org/a.png: another host"),
        ('<iframe src="https://x.org"></iframe>', "a.html loads https://x.org: another host"),
        ('<p style="background: url(//x.org/a)">', "a.html loads //x.org/a: another host"),
        ("<style>@import 'https://x.org/a.css';</style>", "a.html loads https://x.org/a.css: another host"),
        ('<img src="dot.png">', "a.html shows dot.png without an alt"),
        ("<pre><b>Traceback</b> (most <i>recent</i> call last):</pre>", "a.html: a block of code failed, and its"),
    ],
)
def test_a_fault_is_found(site, plant, fault):
    (site / "a.html").write_text(SOUND + plant)
    (found,) = check.find_faults(site)
    assert found.startswith(fault)


def test_a_fault_of_a_style_sheet_is_found(site):
    (site / "s.css").write_text('@import "https://x.org/a.css"; p { background: url(none.png); }')
    assert set(check.find_faults(site)) == {
        "s.css loads https://x.org/a.css: another host",
        "s.css loads none.png: no such file",
    }


def test_a_folder_without_pages_is_no_site(tmp_path):
    assert list(check.find_faults(tmp_path)) == [f"{tmp_path}: no page"]


def test_the_console_is_listened_to(site):
    if not check.has_browser():
        pytest.skip("no chromium runs here")
    assert list(check.find_complaints(site / "a.html")) == []
    (site / "a.html").write_text('<script src="https://x.org/a.js"></script><script>boom();</script>')
    script, network = check.find_complaints(site / "a.html")
    assert "boom is not defined" in script and network == "a.html asks for https://x.org/a.js"


@pytest.mark.skipif(SITE is None, reason="APB_SITE names no built site")
def test_the_built_site(capsys):
    assert check.main(Path(str(SITE)).resolve()) == 0, capsys.readouterr().out


def test_the_settings_name_no_other_host():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert not re.search(r"https?://|repo_url", settings)


def test_what_is_vendored_is_whole():
    text = (VENDOR / "README.txt").read_text()
    folders = {path.name for path in VENDOR.iterdir() if path.is_dir()}
    assert folders == set(re.findall(r"^([\w-]+)/", text, re.MULTILINE))
    assert all((VENDOR / folder / "LICENSE").is_file() for folder in folders)
    fonts = set(check.css_addresses((VENDOR / "katex" / "katex.min.css").read_text()))
    assert fonts == {f"fonts/{path.name}" for path in (VENDOR / "katex" / "fonts").iterdir()}
    theme = (ROOT / "docs" / "theme" / "main.html").read_text()
    for file in re.findall(r"'(assets/[^']+)'", theme):
        assert (ROOT / "docs" / file).is_file(), file
