"""Tiny Hugging Face models with peaked attention, so that mistakes of mask, position and merge show."""

from typing import Any, Literal

import torch

__all__ = ["tiny_model"]


_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    # Scaled as in Llama 3.1, from 32 positions, so that a short test sees it.
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "yi": (
        "Llama",
        {
            "hidden_size": 112,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2.5": (
        "Qwen2",
        {
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "use_sliding_window": False,
            "sliding_window": 131_072,
            "max_window_layers": 48,
        },
    ),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
}


def tiny_model(
    family: Literal["llama", "llama3", "yi", "qwen2", "qwen2.5", "qwen3", "mistral"] = "llama",
    *,
    seed: int = 0,
    layers: int = 2,
    peak: float = 6.0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Any:
    """Make a random causal language model of a real architecture, 4 query and 2 KV heads of dim 16 (Yi: 7 and 1).

    Random weights attend almost evenly, which hides bugs; every weight matrix but the embedding is scaled by `peak`,
    which spreads the attention logits.

    Args:
        family: which architecture, with the settings of that family's models.
        seed: starts the draw of the weights.
        layers: decoder layers.
        peak: factor on the weight matrices.
        dtype: of the weights.
        config: further settings for the transformers configuration.
    """
    import transformers

    name, own = _FAMILIES[family]
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
    configuration = getattr(transformers, f"{name}Config")(**(settings | own | config))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(configuration).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(peak)
    return model
