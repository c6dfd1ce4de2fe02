"""Merge a LoRA (arXiv 2106.09685), stored in PEFT's format, into a model's weights."""

from pathlib import Path
from typing import Any

__all__ = ["check_adapter", "merge_adapter"]


def check_adapter(adapter: Path | str) -> None:
    """Refuse what is no adapter before a model is loaded.

    Raises:
        ValueError: the directory lacks the adapter's configuration.
        ImportError: peft is not installed.
    """
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ValueError(
            f"adapter: expected a directory that PEFT has written, with adapter_config.json, got {str(adapter)!r}"
        )
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ImportError("adapter: peft is needed to read it; pip install 'apb[train]'") from None


def merge_adapter(model: Any, adapter: Path | str) -> Any:
    """Return the model with the adapter merged into its weights: W + (alpha / rank) · B A.

    Args:
        model: a transformers model, in full precision or half; its weights are changed in place.
        adapter: a directory as `PeftModel.save_pretrained` writes it.

    Raises:
        ValueError: the adapter was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    try:
        stored = load_peft_weights(str(adapter), device="cpu")
        wrapped = PeftModel.from_pretrained(model, str(adapter))
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
