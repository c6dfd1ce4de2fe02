"""Check the built site: links lead somewhere, reading asks no other host, pictures have words, consoles stay silent.

    python docs/check_site.py site    # what `make docs` runs after the build; says what is wrong, and exits with 1

Links to other hosts are for a reader to click, and are not followed. If there is a Chromium, it opens one page of each
kind from disk, where no name of a host resolves, and must not complain.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHOWN = (
    "index.html",
    "tutorials/2_split_a_context.html",
    "explorer/index.html",
    "how-to/compare-methods.html",
    "explanation/design.html",  # has a diagram
    "modules/plan.html",  # has formulas
    "reference/plan.html",
)
LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
ASKED = re.compile(r'"initiator":"null".*"url":"(https?://[^"]+)"')  # by a page from disk; the browser's own differ
TAG = re.compile("<[^>]*>")
CSS_ADDRESS = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")


class Page(HTMLParser):
    """One page's anchors, the addresses that it loads and those that it links to, and its pictures without words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.wordless: list[str] = []
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one tag says."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self._in_style = tag == "style"
        self.loads += css_addresses(given.get("style", ""))
        if tag == "a" or (tag == "link" and not LOADED_LINKS & set(given.get("rel", "").split())):
            self.links += [given["href"]] if "href" in given else []
        else:
            self.loads += [given[name] for name in ("src", "href", "data", "poster") if name in given]
            self.loads += [each.split()[0] for each in given.get("srcset", "").split(",") if each.strip()]
        if tag == "img" and not given.get("alt"):
            self.wordless.append(given.get("src", "")[:60])

    def handle_data(self, data: str) -> None:
        """Note what a style element loads."""
        if self._in_style:
            self.loads += css_addresses(data)

    def handle_endtag(self, tag: str) -> None:
        """Leave a style element."""
        self._in_style = False


def css_addresses(text: str) -> list[str]:
    """Return the addresses that a style sheet loads."""
    return [first or second for first, second in CSS_ADDRESS.findall(text)]


def find_faults(site: Path) -> Iterator[str]:
    """Yield, in a line each, what is wrong with the files of a site."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: no page"
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loads:
            if why := misses(site, path, address, pages) or goes_elsewhere(address):
                yield f"{name} loads {address}: {why}"
        for address in page.links:
            if not goes_elsewhere(address) and (why := misses(site, path, address, pages)):
                yield f"{name} links to {address}: {why}"
        yield from (f"{name} shows {source} without an alt" for source in page.wordless)
        if "Traceback (most recent call last)" in TAG.sub("", path.read_text()):  # highlighting splits it up
            yield f"{name}: a block of code failed, and its traceback is on the page"
    for path in sorted(site.rglob("*.css")):
        for address in css_addresses(path.read_text()):
            if why := misses(site, path, address, pages) or goes_elsewhere(address):
                yield f"{path.relative_to(site)} loads {address}: {why}"


def goes_elsewhere(address: str) -> str | None:
    """Say so if an address is of another host."""
    parts = urlsplit(address)
    return "another host" if parts.netloc or parts.scheme in ("http", "https") else None


def misses(site: Path, path: Path, address: str, pages: dict[Path, Page]) -> str | None:
    """Say what an address of this site, written in the file `path`, does not find."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    base = site if parts.path.startswith("/") else path.parent
    target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    # "#__" are the theme's own, which scripts make; the explorer reads settings, not an anchor, from its address.
    if anchor and not anchor.startswith("__") and target in pages and anchor not in pages[target].anchors:
        return None if "=" in anchor else "no such anchor"
    return None


def browse(*flags: str) -> subprocess.CompletedProcess[str] | None:
    """Run a headless Chromium, again if it ends badly; None: there is none, or it does not run here."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    for _ in range(3 if browser else 0):
        command = [str(browser), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"The browser failed: {error}", file=sys.stderr)
    return None


@cache
def has_browser() -> bool:
    """Whether there is a Chromium that runs here."""
    return browse("--dump-dom", "about:blank") is not None


def find_complaints(page: Path) -> Iterator[str]:
    """Yield what a browser writes on its console when it opens a page from disk, and what that asks other hosts for."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.json"
        offline = ("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", f"--user-data-dir={folder}")
        done = browse(f"--log-net-log={log}", *offline, "--dump-dom", page.as_uri())
        asked = set(ASKED.findall(log.read_text())) if log.exists() else set()
    if done is None:
        yield f"{page.name}: the browser does not open it"
        return
    yield from (f"{page.name}: {line}" for line in done.stderr.splitlines() if ":CONSOLE" in line)
    yield from (f"{page.name} asks for {address}" for address in sorted(asked))


def main(site: Path) -> int:
    """Print what is wrong with a site and return how a command ends."""
    faults = list(find_faults(site))
    for name in SHOWN if has_browser() else ():
        faults += find_complaints(site / name)
    for fault in faults:
        print(fault)
    opened = f"{len(SHOWN)} in a browser" if has_browser() else "none in a browser, for no Chromium runs here"
    print(f"Checked {len(list(site.rglob('*.html')))} pages, {opened}; faults: {len(faults)}.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
