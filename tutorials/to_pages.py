"""Turn the tutorials into pages of the documentation, with what each cell printed and drew, and into notebooks.

    python tutorials/to_pages.py    # docs/tutorials/<name>.md and .ipynb for each tutorials/<number>_<name>.py

A tutorial that raises ends the build. A page is made anew only when its tutorial, this file, the package or the ledgers
changed. Figures of matplotlib that a cell leaves open become pictures; their labels say what is to be seen.
"""

import contextlib
import html
import io
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "tutorials"


def read_cells(text: str) -> list[tuple[str, int, str]]:
    """Split a percent-format file into cells: (what follows `# %%`, number of lines before the body, body)."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("# %%")]
    ends = [*starts[1:], len(lines)]
    return [
        (lines[i].removeprefix("# %%").strip(), i + 1, "\n".join(lines[i + 1 : end]).strip("\n"))
        for i, end in zip(starts, ends, strict=True)
    ]


def run_page(path: Path) -> str:
    """Execute a tutorial cell by cell and return its page; to be run in a process of its own."""
    namespace: dict[str, object] = {"__name__": "__main__", "__file__": str(path)}
    parts = []
    for kind, line, body in read_cells(path.read_text()):
        if kind == "[markdown]":
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE))
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # The line numbers are the file's own: tracebacks are right, and Triton finds its kernels' source.
            exec(compile("\n" * line + body, str(path), "exec"), namespace)
        code = f"```python\n{body.strip()}\n```"
        if "answer" in kind:
            code = '??? success "Answer"\n\n' + re.sub(r"^(?=.)", "    ", code, flags=re.MULTILINE)
        parts.append(code)
        if printed.getvalue():
            parts.append(f'```text title="Output"\n{printed.getvalue().rstrip()}\n```')
        parts += open_figures()
    name = path.relative_to(ROOT)
    parts.append(
        f"*This page is the file `{name}`, executed. Run it with `python {name}`, or take it as "
        f"[a notebook]({path.stem}.ipynb).*"
    )
    return "\n\n".join(parts) + "\n"


def open_figures() -> list[str]:
    """Return the figures that stand open as pictures of the page, and close them."""
    pyplot, found = sys.modules.get("matplotlib.pyplot"), []
    for number in pyplot.get_fignums() if pyplot else ():
        figure, picture = pyplot.figure(number), io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
        data = b64encode(picture.getvalue()).decode()
        alt = html.escape(str(figure.get_label()), quote=True)
        found.append(f'<img alt="{alt}" src="data:image/svg+xml;base64,{data}">')
        pyplot.close(figure)
    return found


def notebook(text: str) -> str:
    """Return a percent-format file as a notebook without outputs."""
    cells = []
    for number, (kind, _, body) in enumerate(read_cells(text)):
        markdown = kind == "[markdown]"
        source = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if markdown else body.strip()
        hidden = {"jupyter": {"source_hidden": True}} if "answer" in kind else {}
        cell = {"cell_type": "markdown" if markdown else "code", "id": f"cell-{number}", "metadata": hidden}
        cells.append(cell | {"source": source} | ({} if markdown else {"execution_count": None, "outputs": []}))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def make_page(path: Path, stamp: str) -> bool:
    """Write a tutorial's page and notebook, unless the page bears `stamp` already; return whether that went well."""
    page = PAGES / f"{path.stem}.md"
    if page.is_file() and page.read_text().startswith(stamp):
        return True
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, __file__, str(path)],
        env=os.environ | {"PYTHONPATH": search, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.returncode == 0:
        page.with_suffix(".ipynb").write_text(notebook(path.read_text()))
        page.write_text(stamp + child.stdout)
        print(f"wrote {page.relative_to(ROOT)}", flush=True)
    return child.returncode == 0


def main() -> None:
    """Write the pages that are missing or out of date, one a core at a time."""
    sources = [Path(__file__), *sorted((ROOT / "apb").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.csv"))]
    package = b"".join(source.read_bytes() for source in sources)
    paths = sorted(ROOT.glob("tutorials/[0-9]*.py"))
    digests = [sha256(package + path.read_bytes()).hexdigest()[:16] for path in paths]
    stamps = [
        f"<!-- made by {Path(__file__).name} from {p.name} {d} -->\n" for p, d in zip(paths, digests, strict=True)
    ]
    PAGES.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        made = list(pool.map(make_page, paths, stamps))
    failed = [str(path.relative_to(ROOT)) for path, fine in zip(paths, made, strict=True) if not fine]
    if failed:
        sys.exit(f"failed, and so has no page: {', '.join(failed)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.write(run_page(Path(sys.argv[1]).resolve()))
    else:
        main()
