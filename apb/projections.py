"""Read a Hugging Face model's q, k and v before RoPE, with forward hooks that last as long as a prefill."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from einops import rearrange
from torch import Tensor, nn

__all__ = ["capture_projections"]


@contextmanager
def capture_projections(model: Any, found: dict[tuple[int, str], Tensor]) -> Generator[None]:
    """Note every layer's projections (for Qwen3: after its q/k norms) while the body runs, in this thread only.

    Args:
        model: a transformers model whose attention modules have q_proj, k_proj, v_proj and o_proj.
        found: filled with (layer, "q", "k" or "v") → `[batch, heads, rows, dim]`.

    Raises:
        ValueError: an attention module without one of the projections.
    """
    hooks = []
    try:
        for module in model.modules():
            if not isinstance(getattr(module, "layer_idx", None), int) or not hasattr(module, "o_proj"):
                continue
            for name in "qkv":
                source = getattr(module, f"{name}_norm", None) or getattr(module, f"{name}_proj", None)
                if source is None:
                    raise ValueError(
                        f"model: {type(module).__name__} has no {name}_proj, so its projections before RoPE cannot be "
                        f"read; use a compressor that needs none (query-aware)"
                    )
                hooks.append(source.register_forward_hook(_noter(found, module.layer_idx, name, module.head_dim)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _noter(
    found: dict[tuple[int, str], Tensor], layer: int, name: str, head_dim: int
) -> Callable[[nn.Module, Any, Tensor], None]:
    mine = threading.get_ident()

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if threading.get_ident() != mine:
            return  # another thread host runs the same model
        found[layer, name] = rearrange(output.reshape(*output.shape[:2], -1, head_dim), "b n h d -> b h n d")

    return note
