"""Plug attention into a Hugging Face model through its attention interface; nobody's modelling file is copied.

The model itself stays as it is: with the "apb" attention implementation and nothing plugged in, it attends exactly as
with "sdpa". What is plugged in comes with each call of the model, as the keyword `apb`.
"""

from copy import deepcopy
from typing import Any, Protocol

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from apb.costs import ModelShape

__all__ = ["Attends", "check_positions", "model_shape", "register", "run_layers", "share_weights"]

IMPLEMENTATION = "apb"


class Attends(Protocol):
    """What can be plugged in: `apb.session.Session`, or anything else that attends for a layer."""

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "batch q_heads rows dim"],
        k: Float[Tensor, "batch kv_heads rows dim"],
        v: Float[Tensor, "batch kv_heads rows dim"],
        scale: float | None,
    ) -> Float[Tensor, "batch q_heads rows dim"]:
        """Attend in one layer; q, k and v after RoPE."""
        ...


def register() -> None:
    """Make "apb" known as an attention implementation of transformers, with the mask that "sdpa" has."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _attention(
    module: Any,
    q: Float[Tensor, "batch q_heads rows dim"],
    k: Float[Tensor, "batch kv_heads rows dim"],
    v: Float[Tensor, "batch kv_heads rows dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    apb: Attends | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch rows q_heads dim"], None]:
    """Attend as transformers' interface asks: q, k and v after RoPE, one call a layer."""
    if apb is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **kwargs)
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"model: layer {module.layer_idx} attends with {name}={kwargs[name]!r}, which apb does not compute; "
                f"use a model with plain causal attention (Llama, Qwen2, Qwen3, Yi, …)"
            )
    out = apb.attend(int(module.layer_idx), q, k, v, scaling)
    return rearrange(out, "b h n d -> b n h d"), None


def run_layers(
    model: Any, ids: Int[Tensor, "batch rows"], positions: Int[Tensor, " rows"], attends: Attends
) -> Float[Tensor, "batch rows hidden"]:
    """Run rows through the model's layers with `attends` plugged in; return the last hidden states.

    The model must be in the "apb" implementation (`register`, then `model.set_attn_implementation("apb")`).
    """
    # A mask of four dimensions is final, so that transformers builds none: `attends` is the mask.
    final_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    return model.base_model(
        input_ids=ids,
        position_ids=positions.to(ids.device).expand(len(ids), -1),
        attention_mask=final_mask,
        use_cache=False,
        apb=attends,
    ).last_hidden_state


def check_positions(config: Any, tokens: int) -> None:
    """Refuse more tokens than the model has positions.

    Raises:
        ValueError: naming both numbers.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ValueError(
            f"document: with its question and at most so many new tokens it needs {tokens} positions, the model has "
            f"{positions}; shorten the document or lower max_new_tokens, or set the model's RoPE scaling"
        )


def share_weights(model: Any) -> Any:
    """Return a model with modules of its own and the same weights, so that thread hosts do not share hooks."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, memo)


def model_shape(config: Any) -> ModelShape:
    """Read the sizes that costs depend on from a transformers configuration.

    Raises:
        ValueError: the configuration lacks one of them.
    """
    try:
        heads = config.num_attention_heads
        return ModelShape(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=config.intermediate_size,
            layers=config.num_hidden_layers,
        )
    except AttributeError as error:
        raise ValueError(f"config: {type(config).__name__} is not a decoder configuration apb knows: {error}") from None
