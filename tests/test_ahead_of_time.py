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
        # Hopper: a tile's numbers, put aside between its loops. sm_86 takes sm_80's tiles; some are a little tight.
        hopper = report["kernel"].startswith("hopper")
        few = 128 if capability == 86 else 320 if hopper else 0
        assert report["loop_spills"] == 0 or capability == 86, report
        assert report["spill_bytes"] <= few and report["stack_bytes"] <= few, report
        assert report["shared_bytes"] <= SHARED_BYTES_LIMIT[capability], report
        assert not report["wgmma_serialised"], (report, messages)


@pytest.mark.parametrize("capability", [90, 100])
def test_spills_inside_a_loop_are_noticed(capability):
    """The portable kernel with four warps for a tile that needs eight or more."""
    code = f"""
import torch
from apb.kernels import aot, masked_flash
tiles = masked_flash.choose_tiles(torch.bfloat16, 256, divmod({capability}, 10), tma=False)
tiles = tiles._replace(block_n=128, warps=4)
masked_flash.choose_tiles = lambda *_, **__: tiles
report = aot.report_masked_flash(torch.bfloat16, 256, {capability}, tma=False)
assert report.loop_spills > 100, report
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
