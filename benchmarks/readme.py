"""Write the README's tables anew from the ledgers beside this file: `python benchmarks/readme.py`."""

import re
from pathlib import Path

from apb.bench import Row
from apb.bench.plots import newest_run, read_ledger
from apb.bench.prefill.store import newest, read
from apb.evals import ledger as quality_ledger
from apb.evals.report import make_report

HERE = Path(__file__).parent
README = HERE.parent / "README.md"

CASES = {"1024/3584/4096": "32K", "4096/14336/16384": "128K", "8192/57344/65536": "512K"}
KERNELS = {"hopper": "ours for Hopper", "triton": "ours, portable", "fa3": "FlashAttention-3", "cudnn": "cuDNN",
           "flex": "FlexAttention", "sdpa": "FlashAttention-2"}  # fmt: skip
PREFILL = {"flash": "exact attention", "ring-zigzag": "zigzag ring, exact", "ulysses": "Ulysses, exact",
           "star": "Star", "apb": "APB", "apb-balanced": "APB, balanced", "spava": "Spava"}  # fmt: skip
METHODS = ("flash", "minference:vertical=1/32,slash=1/8,dense_below=0", "apb:query_in=prefill,passing=1/2", "apb",
           "apb:query_in=prefill", "star", "star:anchor=1/4", "ape", "apb:passing=0")  # fmt: skip


def speed() -> str:
    """Lay out the newest run of `apb bench kernel`: TFLOP/s by document length and kernel."""
    rows = newest_run(read_ledger(HERE / "ledger.csv"), "masked_attention")
    rate = {(row.case, row.backend): _rate(row) for row in rows}
    lines = [f"| document, on 8 hosts | {' | '.join(KERNELS.values())} |", "| --- |" + " --: |" * len(KERNELS)]
    for case, tokens in CASES.items():
        lines.append(f"| {tokens} | {' | '.join(rate[case, kernel] for kernel in KERNELS)} |")
    run = rows[0]
    versions = f"torch {run.torch}, triton {run.triton}"
    lines.append(f"\nMeasured on one {run.device}, {versions}, {run.date[:10]}, commit {run.commit}.")
    return "\n".join(lines)


def _rate(row: Row) -> str:
    return f"{row.tflops:.0f}" if row.ms > 0 else "no memory" if "OutOfMemory" in row.notes else "–"


def prefill() -> str:
    """Lay out one host and eight simulated ones at 128K tokens, and how far measured times are from simulated ones."""
    rows = [row for row in newest(read(HERE / "prefill.csv")) if (row.shape, row.tokens) == ("llama-3.1-8b", 2**17)]
    device = [row.device for row in rows if row.method == "flash"][-1]
    rows = [row for row in rows if row.device == device and row.dtype == "bfloat16" and row.ttft_ms > 0]
    simulated = [row for row in rows if row.mode == "simulated"]
    shown = {row.method: row for row in simulated if row.hosts == (1 if row.method == "flash" else 8)}
    head = ("128K tokens", "GPUs", "first token, s", "times as fast", "GB a GPU")
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --: |" * (len(head) - 1)]
    for method, name in PREFILL.items():
        row = shown[method]
        faster = shown["flash"].ttft_ms / row.ttft_ms
        lines.append(f"| {name} | {row.hosts} | {row.ttft_ms / 1000:.2f} | {faster:.1f} | {row.peak_gbytes:.0f} |")
    commits = ", ".join(sorted({f"{shown[method].date[:10]}, commit {shown[method].commit}" for method in PREFILL}))
    measured = {(row.method, row.hosts): row for row in rows if row.mode == "measured"}
    both = [(measured[row.method, row.hosts], row) for row in simulated if (row.method, row.hosts) in measured]
    apart = [one.ttft_ms / other.ttft_ms for one, other in both]
    hosts = " and ".join(str(number) for number in sorted({one.hosts for one, _ in both}))
    others = ", ".join(sorted({row.commit for pair in both for row in pair}))
    lines.append(f"\nSimulated on one {device}, {commits}; with {hosts} of them, measured times are")
    lines.append(f"{min(apart):.2f} to {max(apart):.2f} of simulated ones (commits {others}).")
    return "\n".join(lines)


def quality() -> str:
    """Lay out mean scores by method, at the lengths and numbers of hosts at which all eight tasks were asked."""
    records, labels, runs = quality_ledger.read_ledger(HERE / "quality.csv")
    kept = [r for r in records if "+" in r.model and r.method in METHODS]
    sections = make_report(kept, labels=labels, resamples=10).sections
    head = [f"{section.length // 1024}K, {section.hosts} hosts" for section in sections]
    lines = [f"| mean score, % | {' | '.join(head)} |", "| --- |" + " --: |" * len(head)]
    for method in METHODS:
        found = [[line.mean for line in section.lines if line.method == method] for section in sections]
        means = [f"{100 * mean.value:.1f}" if mean else "–" for mean, *_ in (each or [None] for each in found)]
        lines.append(f"| {labels[method]} | {' | '.join(means)} |")
    devices = " and ".join(sorted({run["device"] for run in runs}))
    commits = ", ".join(f"{run['commit']} ({run['date'][:10]})" for run in runs)
    lines.append(f"\nMeasured on one {devices}, commits {commits}.")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Return the README with the tables between their marks."""
    for name, table in (("prefill", prefill()), ("speed", speed()), ("quality", quality())):
        marks = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(marks, lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md: expected one pair of marks for the table {name!r}, got {found}")
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
