"""Compile a Triton kernel for a GPU that is not there, and read what the assembler says of it.

Spilled registers, too much shared memory and serialised tensor-core instructions are the three ways in which a
kernel turns slow without turning wrong. All three are known at compile time, on any machine with Triton.
`python -m apb.kernels.aot 90` prints them for every kernel. Needs a process in which TRITON_INTERPRET is unset.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from . import (
    decode,
    hopper,
    hopper_kernel,
    masked_flash,
    masked_flash_backward,
    masked_flash_backward_kernels,
    merge,
    vertical_slash,
)  # fmt: skip
from .aot_loops import count_loop_spills

__all__ = [
    "SHARED_BYTES_LIMIT",
    "TRITON_NAME",
    "Report",
    "all_reports",
    "compile_kernel",
    "report_decode",
    "report_hopper",
    "report_masked_flash",
    "report_masked_flash_backward",
    "report_merge",
    "report_merge_into",
    "report_vertical_slash",
    "what",
]

SHARED_BYTES_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one program may take, by compute capability × 10."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one compiled kernel costs.

    Attributes:
        registers: per thread (255 at most).
        stack_bytes: local memory per thread.
        spill_bytes: registers stored to and loaded from local memory, per thread.
        loop_spills: of those accesses, the ones in the innermost loops with tensor-core products.
        shared_bytes: shared memory per program.
        wgmma_serialised: the assembler gave up on asynchronous tensor-core instructions (messages C75xx).
        messages: the assembler's output, to be read.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    loop_spills: int
    shared_bytes: int
    wgmma_serialised: bool
    messages: str


def compile_kernel(
    kernel: triton.JITFunction,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    warps: int,
    stages: int,
) -> Report:
    """Compile `kernel` for sm_`capability` as a launch with contiguous, aligned tensors would.

    Args:
        kernel: a function under @triton.jit.
        types: Triton type of each argument that is no constant, such as "*bf16", "fp32" or
            "tensordesc<bf16[1, 1, 64, 128]>"; a name left out is an i32.
        constants: value of each tl.constexpr argument, and of arguments that specialise to 1.
        capability: 80, 86, 90 or 100.
        warps: warps of a program.
        stages: stages of the software pipeline.

    Returns:
        The report of the assembler.

    Raises:
        RuntimeError: if this process runs Triton's interpreter.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted here: compile in a process without TRITON_INTERPRET")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # The launcher specialises pointers and strides that are multiples of 16, so do the same.
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name.startswith("stride_") and name not in constants)
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    compiled = triton.compile(
        source(kernel, signature, dict(constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    return _assemble(compiled.asm["ptx"], capability, compiled.metadata.shared)


def _assemble(ptx: str, capability: int, shared_bytes: int) -> Report:
    """Run the bundled ptxas once more, for its messages."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    arch = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        cubin = Path(folder) / "kernel.cubin"
        command = [ptxas, "-v", f"--gpu-name={arch}", source, "-o", cubin]
        messages = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        stack, stores, loads = (
            sum(int(n) for n in re.findall(rf"(\d+) bytes {what}", messages))
            for what in ("stack frame", "spill stores", "spill loads")
        )
        loop_spills = count_loop_spills(cubin) if stores + loads else 0
    return Report(
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", messages)),
        stack_bytes=stack,
        spill_bytes=stores + loads,
        loop_spills=loop_spills,
        shared_bytes=shared_bytes,
        wgmma_serialised="C75" in messages,
        messages=messages,
    )


def report_masked_flash(dtype: torch.dtype, dim: int, capability: int, *, tma: bool, causal: bool = True) -> Report:
    """Compile the masked attention kernel with its table's tiles, for keys and values that TMA can read or cannot."""
    tiles = masked_flash.choose_tiles(dtype, dim, divmod(capability, 10), tma=tma)
    name, block_d = TRITON_NAME[dtype], triton.next_power_of_2(dim)
    types = {x: f"*{name}" for x in ("q", "k", "v", "out")} | {"lse": "*fp32", "scale_log2": "fp32"}
    if tiles.tma:
        types["k"] = types["v"] = f"tensordesc<{name}[1, 1, {tiles.block_n}, {block_d}]>"
    constants = {f"stride_{x}d": 1 for x in "qkvo"} | {
        "D": dim, "BLOCK_D": block_d, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "TMA": tiles.tma,
        "STAGES": tiles.stages, "DIAGONAL_STAGES": tiles.diagonal_stages, "CAUSAL": causal,
    }  # fmt: skip
    kernel = masked_flash.masked_flash_kernel
    return compile_kernel(kernel, types, constants, capability=capability, warps=tiles.warps, stages=tiles.stages)


def report_decode(dtype: torch.dtype, dim: int, packed_rows: int, capability: int) -> Report:
    """Compile the split-KV kernel for a number of rows · heads of a group."""
    tiles = decode.choose_tiles(dtype, dim, packed_rows, divmod(capability, 10))
    name, block_d = TRITON_NAME[dtype], triton.next_power_of_2(dim)
    kept_rows, merged_rows, parts = decode.split_shape(packed_rows, tiles.block_m, block_d)
    types = {x: f"*{name}" for x in ("q", "k", "v", "out")} | {"lse": "*fp32", "partials": "*fp32", "lengths": "*i32"}
    types |= {"tickets": "*i32", "scale_log2": "fp32"}
    constants = {f"stride_{x}d": 1 for x in "qkv"} | {
        "CAUSAL": True, "D": dim, "BLOCK_D": block_d, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "ROWS": kept_rows, "MERGED": merged_rows, "PARTS": parts,
    }  # fmt: skip
    kernel = decode.split_kv_decode_kernel
    return compile_kernel(kernel, types, constants, capability=capability, warps=tiles.warps, stages=tiles.stages)


def report_masked_flash_backward(dtype: torch.dtype, dim: int, capability: int, *, tma: bool, keys: bool) -> Report:
    """Compile the kernel of the keys' and values' gradient, or of the queries'."""
    gradient, name = "keys" if keys else "queries", TRITON_NAME[dtype]
    tiles = masked_flash_backward.choose_tiles(gradient, dtype, dim, divmod(capability, 10), tma=tma)
    block_d = triton.next_power_of_2(dim)
    types = {x: f"*{name}" for x in ("q", "k", "v", "grad_out", "grad_q", "grad_k", "grad_v")}
    types |= {"lse": "*fp32", "delta": "*fp32", "scale": "fp32", "scale_log2": "fp32"}
    if tiles.tma:
        tokens = tiles.block_m if keys else tiles.block_n
        streamed = ("q", "grad_out") if keys else ("k", "v")
        types |= {x: f"tensordesc<{name}[1, 1, {tokens}, {block_d}]>" for x in streamed}
    constants = {f"stride_{x}d": 1 for x in ("qkvgxy" if keys else "qkvgx")} | {
        "D": dim, "BLOCK_D": block_d, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "TMA": tiles.tma,
        "STAGES": tiles.stages, "DIAGONAL_STAGES": tiles.diagonal_stages,
    }  # fmt: skip
    module = masked_flash_backward_kernels
    kernel = module.grad_keys_kernel if keys else module.grad_queries_kernel
    return compile_kernel(kernel, types, constants, capability=capability, warps=tiles.warps, stages=tiles.stages)


def report_hopper(dtype: torch.dtype, dim: int, *, causal: bool = True) -> Report:
    """Compile the Hopper kernel for tensors whose last stride is 1."""
    block_n = hopper_kernel.BLOCK_N.value
    name, boxes = TRITON_NAME[dtype], {"q": 64, "k": block_n, "v": block_n, "out_map": 64}
    types = {"out": f"*{name}", "lse": "*fp32", "counter": "*i32", "scale_log2": "fp32"}
    for x, rows in boxes.items():
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], hopper.GLUON_TYPE[dtype])
        types[x] = f"tensordesc<{name}[1, 1, {rows}, {dim}],{layout!r}>"
    constants = {"CAUSAL": causal, "D": dim, "STAGES": hopper.choose_stages(dim)}
    return compile_kernel(hopper_kernel.hopper_flash_kernel, types, constants, capability=90, warps=4, stages=1)


def report_vertical_slash(dtype: torch.dtype, dim: int, capability: int, *, tma: bool) -> Report:
    """Compile the kernel over listed keys, one list for all row tiles, for keys that TMA can read or cannot."""
    cut = vertical_slash.choose_tiles(dtype, dim, divmod(capability, 10), tma=tma)
    name, block_d = TRITON_NAME[dtype], triton.next_power_of_2(dim)
    types = {x: f"*{name}" for x in ("q", "k", "v", "k_tiles", "v_tiles", "out")} | {"lse": "*fp32"}
    types |= {x: "*i32" for x in ("tiles", "tile_counts", "columns", "column_counts")} | {"covered": "*u8"}
    types["scale_log2"] = "fp32"
    if cut.tma:
        types["k_tiles"] = types["v_tiles"] = f"tensordesc<{name}[1, 1, {cut.block_n}, {block_d}]>"
    constants = {f"stride_{x}d": 1 for x in "qkvo"} | {
        "LISTS": False, "D": dim, "BLOCK_D": block_d, "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n,
        "TILE": vertical_slash.TILE, "TMA": cut.tma, "STAGES": cut.stages,
        "COLUMN_STAGES": cut.column_stages,
    }  # fmt: skip
    kernel = vertical_slash.vertical_slash_kernel
    return compile_kernel(kernel, types, constants, capability=capability, warps=cut.warps, stages=cut.stages)


def report_merge(dim: int, capability: int) -> Report:
    """Compile the merge kernel for float32 partials and a bfloat16 result."""
    block_d = triton.next_power_of_2(dim)
    types = {"outs": "*fp32", "lses": "*fp32", "out": "*bf16", "lse": "*fp32"}
    at_once, program_rows = merge.merge_shape(8, block_d)
    constants = {"stride_sd": 1, "stride_ln": 1, "D": dim, "BLOCK_D": block_d, "PARTS": at_once,
                 "BLOCK_ROWS": program_rows}  # fmt: skip
    return compile_kernel(merge.merge_kernel, types, constants, capability=capability, warps=4, stages=3)


def report_merge_into(dim: int, capability: int) -> Report:
    """Compile the merge in place for a bfloat16 part."""
    block_d = triton.next_power_of_2(dim)
    types = {"out": "*fp32", "lse": "*fp32", "part": "*bf16", "part_lse": "*fp32"}
    constants = {"stride_od": 1, "stride_ln": 1, "stride_pd": 1, "stride_mn": 1, "D": dim, "BLOCK_D": block_d}
    constants["BLOCK_ROWS"] = merge.merge_shape(2, block_d)[1]
    return compile_kernel(merge.merge_into_kernel, types, constants, capability=capability, warps=4, stages=3)


TRITON_NAME = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def all_reports(capability: int, dims: Sequence[int] = (64, 128, 256)) -> Iterator[dict[str, Any]]:
    """Compile every kernel with its tiles for one capability and some head dims; yield what it is and its report."""
    for dtype, some in ((torch.bfloat16, dims), (torch.float32, (128,))):
        for dim in some:
            reports = {}
            for tma in (False, True) if dtype == torch.bfloat16 and capability >= 90 else (False,):
                name = "masked_flash" + (" tma" if tma else "")
                reports[name] = report_masked_flash(dtype, dim, capability, tma=tma)
                if dtype == torch.bfloat16 and dim == 128:
                    reports[name + " full"] = report_masked_flash(dtype, dim, capability, tma=tma, causal=False)
                for keys in (False, True) if dim <= 128 else ():
                    part = f"masked_flash_backward {'keys' if keys else 'queries'}" + (" tma" if tma else "")
                    reports[part] = report_masked_flash_backward(dtype, dim, capability, tma=tma, keys=keys)
                reports["vertical_slash" + (" tma" if tma else "")] = report_vertical_slash(
                    dtype, dim, capability, tma=tma
                )
            for packed_rows in (16, 64) if dtype == torch.bfloat16 else (16,):
                reports[f"decode {packed_rows} rows"] = report_decode(dtype, dim, packed_rows, capability)
            for name, report in reports.items():
                yield what(name, dtype, dim, capability) | asdict(report)
    if capability == 90:
        for dtype, some in ((torch.bfloat16, hopper.DIMS), (torch.float16, (128,))):
            for dim in some:
                yield what("hopper", dtype, dim, capability) | asdict(report_hopper(dtype, dim))
        yield what("hopper full", dtype, dim, capability) | asdict(report_hopper(dtype, dim, causal=False))
    from .aot_compress import compress_reports  # it imports this module

    yield from compress_reports(capability)
    yield what("merge", torch.float32, 128, capability) | asdict(report_merge(128, capability))
    yield what("merge into", torch.bfloat16, 128, capability) | asdict(report_merge_into(128, capability))


def what(kernel: str, dtype: torch.dtype, dim: int, capability: int) -> dict[str, Any]:
    """Name one compilation."""
    return {"kernel": kernel, "dtype": TRITON_NAME[dtype], "dim": dim, "capability": capability}


if __name__ == "__main__":  # one line of JSON a report; arguments: a capability, or all of them; then head dims
    for argument in sys.argv[1:2] or SHARED_BYTES_LIMIT:
        for line in all_reports(int(argument), *([[int(dim) for dim in sys.argv[2:]]] if sys.argv[2:] else [])):
            print(json.dumps(line), flush=True)
