"""Tell what this machine can run, and why not the rest."""

import argparse
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from apb.device import GLUON_INSTALLED

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments: none."""


def run(arguments: argparse.Namespace) -> int:
    """Check each capability by using it, where that is cheap."""
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPU cores")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        print(f"GPU {index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    for name, verdict in _findings().items():
        print(f"{'no ' if verdict.startswith('no: ') else 'yes'}  {name}: {verdict.removeprefix('no: ')}")
    return 0


def _findings() -> dict[str, str]:
    gpus = torch.cuda.device_count()
    return {
        "attention, reference and sdpa": "any CPU or GPU",
        "attention, flex": "compiled on the GPU" if gpus else "runs uncompiled, slowly, without a CUDA device",
        "attention, triton": _triton(),
        "attention, hopper": _hopper(),
        "hosts as threads, simulated hosts": "in this process",
        "hosts as processes, gloo": "any number of CPU processes"
        if torch.distributed.is_available() and torch.distributed.is_gloo_available()
        else "no: this torch is built without gloo",
        "hosts as processes, NCCL": _nccl(gpus),
        "Hugging Face models": _extra("transformers", "hf"),
        "plan pictures": _extra("matplotlib", "viz"),
        "the demo's model": _extra("gguf", "demo"),
    }


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "no: triton is not installed (it exists for Linux)"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"compiled for sm_{major}{minor}" if major >= 8 else f"no: sm_{major}{minor}; the kernels need sm_80"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "under the interpreter (float32 and float16), for learning and testing"
    return "no: no CUDA device; TRITON_INTERPRET=1 in the environment runs the kernels under the interpreter"


def _hopper() -> str:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "no: no Hopper GPU (compute capability 9.0)"
    return _triton() if GLUON_INSTALLED else "no: not Triton 3.6, whose Gluon it is written in"


def _nccl(gpus: int) -> str:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "no: this torch is built without NCCL"
    if gpus < 2:
        return f"no: {gpus} CUDA device{'s' * (gpus != 1)} here; with one, take threads or simulated hosts on it"
    return f"up to {gpus} hosts on this machine, more with torchrun over several"


def _extra(package: str, extra: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no: {package} is not installed; pip install 'apb[{extra}]'"
