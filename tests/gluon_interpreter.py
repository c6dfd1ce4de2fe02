"""The subset of Gluon that our Hopper kernel uses, on a CPU: its own source, on the machine of `gluon_machine.py`."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from gluon_machine import Box, Machine, Pointer, Product, allocate, arrive, store

__all__ = ["Box", "Pointer", "interpreted"]

PARTS = ("channel", "lanes", "pairs", "softmax", "kernel")


def _language(machine):
    """Return stand-ins for the modules that the kernel imports."""
    gl = ModuleType("language")
    numbers = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    vars(gl).update(numbers, int32=torch.int32, int64=torch.int64)
    vars(gl).update(
        constexpr=lambda x: x, tensor=object, shared_memory_descriptor=object, static_range=range,
        allocate_shared_memory=allocate, convert_layout=lambda x, layout, **_: x, to_tensor=lambda x: x,
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, float(value)).to(dtype),
        arange=lambda start, stop, layout: torch.arange(start, stop),
        where=lambda x, a, b: torch.where(torch.as_tensor(x), a, b), exp2=torch.exp2, log2=torch.log2,
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), cdiv=lambda a, b: -(-a // b),
        store=store, atomic_add=machine.add, inline_asm_elementwise=machine.assembly,
        warp_specialize=machine.specialise, multiple_of=lambda x, n: x, thread_barrier=lambda: None,
    )  # fmt: skip
    for name in ("NVMMADistributed", "DistributedLinear", "DotOperand", "Slice", "Blocked", "SwizzledShared"):
        setattr(gl, f"{name}Layout", lambda *_, **__: None)
    hopper = ModuleType("hopper")
    hopper.mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "mbarrier", init=lambda barrier, count: barrier.init(count),
        expect=lambda barrier, n: barrier.arrive(1, expected=n), wait=lambda barrier, parity: barrier.wait(parity),
        arrive=arrive,
    )  # fmt: skip
    hopper.tma = SimpleNamespace(
        async_copy_global_to_shared=machine.copy, async_copy_shared_to_global=machine.send, store_wait=machine.sent
    )  # fmt: skip
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma = Product
    hopper.warpgroup_mma_wait = Product.wait
    gluon = ModuleType("gluon")
    gluon.jit = lambda function=None, **_: function if function else gluon.jit
    gluon.constexpr_function = lambda function: function
    gluon.language = gl
    core = ModuleType("core")
    core._aggregate = lambda cls: cls
    experimental = ModuleType("experimental")
    experimental.gluon = gluon
    name = "triton.experimental.gluon"
    return {
        "triton.experimental": experimental,
        name: gluon,
        f"{name}.language": gl,
        f"{name}.language.nvidia.hopper": hopper,
        "triton.language.core": core,
    }


@contextmanager
def interpreted(seed=0):
    """Yield the module `apb.kernels.hopper_kernel`, made of plain functions, and the machine that runs them."""
    machine = Machine(seed)
    folder = Path(importlib.util.find_spec("apb").submodule_search_locations[0]) / "kernels"
    package = ModuleType("interpreted_kernels")
    package.__path__ = [str(folder)]
    stand_ins = _language(machine) | {"interpreted_kernels": package}
    names = [*stand_ins, *(f"interpreted_kernels.hopper_{part}" for part in PARTS)]
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(stand_ins)
    try:
        yield importlib.import_module("interpreted_kernels.hopper_kernel"), machine
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
