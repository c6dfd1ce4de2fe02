"""Every kernel compiled for GPUs that are not here: no spills, memory that fits, asynchronous tensor cores."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from apb.kernels.aot import SHARED_BYTES_LIMIT


@pytest.mark.parametrize(("capability", "dims"), [(80, "128"), (86, "128"), (90, "64 128 256"), (100, "128")])
def test_kernels_compile_well(capability, dims):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "apb.kernels.aot", str(capability), *dims.split()]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert lines.returncode == 0, lines.stderr[-2000:]
    reports = [json.loads(line) for line in lines.stdout.splitlines()]
    kernels = {
        "masked_flash",
        "masked_flash_backward",
        "decode",
        "merge",
        "vertical_slash",
        "select",
        "gather",
        "score",
    }
    kernels |= {"retaining_head"} | ({"hopper"} if capability == 90 else set())
    assert {report["kernel"].split()[0] for report in reports} == kernels
    for report in reports:
        messages = report.pop("messages")
        # Hopper: a tile's numbers, put aside during its loops. sm_86 takes sm_80's tiles, and a few are a little tight.
        few = 128 if capability == 86 else 48 if report["kernel"].startswith("hopper") else 0
        assert report["spill_bytes"] <= few and report["stack_bytes"] <= few, report
        assert report["shared_bytes"] <= SHARED_BYTES_LIMIT[capability], report
        assert not report["wgmma_serialised"], (report, messages)
