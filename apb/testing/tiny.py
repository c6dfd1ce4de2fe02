"""Tiny Hugging Face models with peaked attention, so that mistakes of mask, position and merge show."""

from typing import Any, Literal

import torch

__all__ = ["tiny_model"]


def tiny_model(
    family: Literal["llama", "qwen2", "qwen3", "mistral"] = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    peak: float = 6.0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """Make a random causal language model of a real architecture, 4 query and 2 KV heads of dim 16.

    Random weights attend almost evenly, which hides bugs; every weight matrix but the embedding is scaled by `peak`,
    which spreads the attention logits.

    Args:
        family: which architecture.
        seed: starts the draw of the weights.
        layers: decoder layers.
        peak: factor on the weight matrices.
        dtype: of the weights.
        config: further settings for the transformers configuration.
    """
    import transformers

    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "mistral":
        settings["sliding_window"] = None
    configuration = getattr(transformers, f"{names[family]}Config")(**(settings | config))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names[family]}ForCausalLM")(configuration).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(peak)
    return model
