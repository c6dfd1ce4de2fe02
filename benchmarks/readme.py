"""Write the README's tables anew from the ledgers beside this file: `python benchmarks/readme.py`."""

import re
from pathlib import Path

from apb.bench.plots import newest_run, read_ledger
from apb.evals import ledger as quality_ledger
from apb.evals.report import make_report

HERE = Path(__file__).parent
README = HERE.parent / "README.md"

CASES = {"1024/3584/4096": "32K", "4096/14336/16384": "128K", "8192/57344/65536": "512K"}
KERNELS = {"hopper": "ours for Hopper", "triton": "ours, portable", "fa3": "FlashAttention-3", "cudnn": "cuDNN",
           "flex": "FlexAttention", "sdpa": "FlashAttention-2"}  # fmt: skip
METHODS = ("flash", "minference:vertical=1/32,slash=1/8,dense_below=0", "apb", "apb:query_in=prefill", "star",
           "star:anchor=1/4", "ape", "apb:passing=0")  # fmt: skip


def speed() -> str:
    """Lay out the newest run of `apb bench kernel`: TFLOP/s by document length and kernel."""
    rows = newest_run(read_ledger(HERE / "ledger.csv"), "masked_attention")
    rate = {(row.case, row.backend): f"{row.tflops:.0f}" for row in rows}
    lines = [f"| document, on 8 hosts | {' | '.join(KERNELS.values())} |", "| --- |" + " --: |" * len(KERNELS)]
    for case, tokens in CASES.items():
        lines.append(f"| {tokens} | {' | '.join(rate[case, kernel] for kernel in KERNELS)} |")
    run = rows[0]
    versions = f"torch {run.torch}, triton {run.triton}"
    lines.append(f"\nMeasured on one {run.device}, {versions}, {run.date[:10]}, commit {run.commit}.")
    return "\n".join(lines)


def quality() -> str:
    """Lay out mean scores by method, at the lengths and numbers of hosts at which all eight tasks were asked."""
    records, labels, (run,) = quality_ledger.read_ledger(HERE / "quality.csv")
    kept = [r for r in records if "+" in r.model and r.length > 2048 and r.method in METHODS]
    sections = make_report(kept, labels=labels, resamples=10).sections
    head = [f"{section.length // 1024}K, {section.hosts} hosts" for section in sections]
    lines = [f"| mean score, % | {' | '.join(head)} |", "| --- |" + " --: |" * len(head)]
    for method in METHODS:
        found = [[line.mean for line in section.lines if line.method == method] for section in sections]
        means = [f"{100 * mean.value:.1f}" if mean else "–" for mean, *_ in (each or [None] for each in found)]
        lines.append(f"| {labels[method]} | {' | '.join(means)} |")
    lines.append(f"\nMeasured on one {run['device']}, {run['date'][:10]}, commit {run['commit']}.")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return the README with both tables between their marks."""
    for name, table in (("speed", speed()), ("quality", quality())):
        marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(marks, lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md: expected one pair of marks for the table {name!r}, got {found}")
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
