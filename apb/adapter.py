"""Merge a LoRA (arXiv 2106.09685), stored in PEFT's format, into a model's weights."""

from pathlib import Path
from typing import Any

__all__ = ["PACKAGED", "check_adapter", "merge_adapter"]


PACKAGED = ("smollm2-135m-long",)
"""Adapters that come with this package, by name; each has a model card in `apb/data/adapters`."""


def check_adapter(adapter: Path | str) -> Path:
    """Return an adapter's directory, or refuse what is none before a model is loaded.

    Args:
        adapter: a directory that PEFT has written, or a name of `PACKAGED`.

    Raises:
        ValueError: the directory lacks the adapter's configuration.
        ImportError: peft is not installed.
    """
    directory = Path(adapter).expanduser()
    if not directory.is_dir() and str(adapter) in PACKAGED:
        directory = Path(__file__).parent / "data" / "adapters" / str(adapter)
    if not (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"adapter: expected a directory that PEFT has written, with adapter_config.json, or "
            f"{' or '.join(PACKAGED)}, got {str(adapter)!r}"
        )
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ImportError("adapter: peft is needed to read it; pip install 'apb[train]'") from None
    return directory


def merge_adapter(model: Any, adapter: Path | str) -> Any:
    """Return the model with the adapter merged into its weights: W + (alpha / rank) · B A.

    Args:
        model: a transformers model, in full precision or half; its weights are changed in place.
        adapter: a directory as `PeftModel.save_pretrained` writes it, or a name of `PACKAGED`.

    Raises:
        ValueError: the adapter was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    directory = str(check_adapter(adapter))
    try:
        stored = load_peft_weights(directory, device="cpu")
        wrapped = PeftModel.from_pretrained(model, directory)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(_misfit(model, adapter, str(error).strip().splitlines()[-1].strip())) from error
    odd = sorted(stored.keys() ^ get_peft_model_state_dict(wrapped).keys())
    if odd:
        raise ValueError(_misfit(model, adapter, f"{len(odd)} weights are on one side only, such as {odd[0]}"))
    return wrapped.merge_and_unload().eval()


def _misfit(model: Any, adapter: Path | str, why: str) -> str:
    return (
        f"adapter: {str(adapter)!r} does not fit {type(model).__name__} of {model.config.num_hidden_layers} layers "
        f"({why}); give the adapter of this model, or the model that it was trained on"
    )
