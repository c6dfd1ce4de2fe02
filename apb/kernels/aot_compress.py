"""Compile the compressor's kernels ahead of time, with each of their cuts; `apb.kernels.aot` prints the reports."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any, Literal

import torch
import triton

from . import retaining_head, score, select
from .aot import TRITON_NAME, Report, compile_kernel, what

__all__ = [
    "compress_reports",
    "report_gather",
    "report_mean",
    "report_retaining_head",
    "report_score",
    "report_select",
]


def report_select(
    step: Literal["pool", "narrow", "admit"],
    tokens: int,
    capability: int,
    *,
    dtype: torch.dtype = torch.float32,
    width: int = 1,
    mean: bool = False,
) -> Report:
    """Compile a step of the selection, with the cut for a number of tokens; what to pool is read by the first alone."""
    cut = select.choose_cut(tokens)
    types = {"scores": f"*{TRITON_NAME[dtype]}", "keys": "*u32", "indices": "*i64", "nans": "*i1"}
    types |= {x: "*i32" for x in ("notes", "noted", "first", "last")}
    constants = {"PARTS": cut.parts, "BLOCK": cut.block}
    if step == "pool":
        constants |= {"stride_n": 1, "WIDTH": width, "MEAN": mean}
    kernel = {"pool": select.pool_kernel, "narrow": select.narrow_kernel, "admit": select.admit_kernel}[step]
    return compile_kernel(kernel, types, constants, capability=capability, warps=cut.warps, stages=3)


def report_gather(dtype: torch.dtype, dim: int, capability: int) -> Report:
    """Compile the gather for keys and values of one dim."""
    name, block = TRITON_NAME[dtype], triton.next_power_of_2(dim)
    types = {x: f"*{name}" for x in ("k", "v", "message")} | {"indices": "*i64"}
    constants = {"stride_kd": 1, "stride_vd": 1, "DK": dim, "DV": dim, "BLOCK_DK": block, "BLOCK_DV": block}
    constants["BLOCK_ROWS"] = select.gather_rows(2 * block)
    return compile_kernel(select.gather_kernel, types, constants, capability=capability, warps=4, stages=3)


def report_mean(dtype: torch.dtype, dim: int, capability: int) -> Report:
    """Compile the means that query-aware scores take."""
    types = {"query": f"*{TRITON_NAME[dtype]}", "mean": "*fp32"}
    constants = {"stride_qd": 1, "D": dim, "BLOCK_D": score.MEAN_DIMS, "ROWS": score.MEAN_CUT.rows}
    constants["OVERLAP"] = capability >= 90
    warps = score.MEAN_CUT.warps
    return compile_kernel(score.mean_kernel, types, constants, capability=capability, warps=warps, stages=3)


def report_score(dtype: torch.dtype, dim: int, capability: int) -> Report:
    """Compile the query-aware score."""
    block = triton.next_power_of_2(dim)
    cut = score.choose_cut(block)
    types = {"k": f"*{TRITON_NAME[dtype]}", "mean": "*fp32", "scores": "*fp32"}
    constants = {"stride_kd": 1, "D": dim, "BLOCK_D": block, "ROWS": cut.rows, "OVERLAP": capability >= 90}
    return compile_kernel(score.score_kernel, types, constants, capability=capability, warps=cut.warps, stages=3)


def report_retaining_head(dtype: torch.dtype, dim: int, width: int, capability: int, *, tma: bool) -> Report:
    """Compile the retaining head, for inputs that TMA can read or cannot."""
    tiles = retaining_head.choose_tiles(dtype, width, dim, divmod(capability, 10), tma=tma)
    name = TRITON_NAME[dtype]
    types = {x: f"*{name}" for x in ("q", "k", "v", "fc1", "fc2")} | {"scores": "*fp32"}
    if tiles.tma:
        types |= {x: f"tensordesc<{name}[1, 1, {tiles.block_m}, {tiles.block_k}]>" for x in "qkv"}
        types["fc1"] = f"tensordesc<{name}[1, 1, {tiles.block_n}, {tiles.block_k}]>"
    constants = {f"stride_{x}d": 1 for x in "qkv"} | {
        "D": dim, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "BLOCK_H": 16,
        "TMA": tiles.tma, "STAGES": tiles.stages,
    }  # fmt: skip
    kernel = retaining_head.retaining_head_kernel
    return compile_kernel(kernel, types, constants, capability=capability, warps=tiles.warps, stages=tiles.stages)


def compress_reports(capability: int) -> Iterator[dict[str, Any]]:
    """Compile each kernel with each of its cuts for one capability; yield what it is and its report."""
    for tokens, width, mean in ((500, 1, False), (16384, 5, False), (16384, 5, True)):
        report = report_select("pool", tokens, capability, width=width, mean=mean)
        yield what(f"select pool {tokens} width {width}", torch.float32, 0, capability) | asdict(report)
    for step, tokens in product(("narrow", "admit"), (500, 16384)):
        report = report_select(step, tokens, capability)
        yield what(f"select {step} {tokens}", torch.float32, 0, capability) | asdict(report)
    for dtype, dim in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 128)):
        yield what("gather", dtype, dim, capability) | asdict(report_gather(dtype, dim, capability))
        yield what("score mean", dtype, dim, capability) | asdict(report_mean(dtype, dim, capability))
        yield what("score", dtype, dim, capability) | asdict(report_score(dtype, dim, capability))
        for tma in (False, True) if dtype == torch.bfloat16 and capability >= 90 else (False,):
            report = report_retaining_head(dtype, dim, 1024, capability, tma=tma)
            yield what("retaining_head" + (" tma" if tma else ""), dtype, dim, capability) | asdict(report)
