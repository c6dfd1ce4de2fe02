"""All layers' retaining heads in two tensors, so that one product computes every layer's."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from apb.compress.retaining_head import RetainingHead
from apb.costs import ModelShape

__all__ = ["StackedHeads", "retaining_loss"]


class StackedHeads(nn.Module):
    """scores = fc2 · silu(fc1 · x) for every layer at once; float32 weights, computed in the dtype of x.

    The same formula as `RetainingHead.score`, which runs what is trained here. Only float16 is computed in float32,
    for gradients this small would vanish in it.

    Args:
        shape: sizes of the model.
        width: hidden units.
        seed: starts the draw: uniform in ±1/√inputs, as `nn.Linear` draws.
    """

    def __init__(self, shape: ModelShape, *, width: int, seed: int = 0) -> None:
        super().__init__()
        inputs = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int) -> nn.Parameter:
            weight = torch.rand(shape.layers, rows, columns, generator=generator)
            return nn.Parameter((2 * weight - 1) * columns**-0.5)

        self.fc1 = draw(width, inputs)
        """`[layers, width, inputs]`"""
        self.fc2 = draw(shape.kv_heads, width)
        """`[layers, kv_heads, width]`"""

    def score(
        self, features: Float[Tensor, "layers tokens inputs"], first_layer: int = 0
    ) -> Float[Tensor, "layers kv_heads tokens"]:
        """Score tokens in the layers from `first_layer` on, as many as `features` has."""
        features = features.float() if features.dtype == torch.float16 else features
        layers = slice(first_layer, first_layer + len(features))
        fc1, fc2 = (weight[layers].to(features.dtype) for weight in (self.fc1, self.fc2))
        hidden = F.silu(torch.bmm(features, fc1.mT))
        return torch.bmm(fc2, hidden.mT)

    def export(self, dtype: torch.dtype = torch.float32) -> RetainingHead:
        """Return a copy of the heads as the compressor that runs them, on the CPU."""
        fc1, fc2 = (
            tuple(layer.detach().to("cpu", dtype, copy=True) for layer in weight) for weight in (self.fc1, self.fc2)
        )
        return RetainingHead(fc1=fc1, fc2=fc2)


def retaining_loss(
    scores: Float[Tensor, "layers kv_heads tokens"],
    labels: Float[Tensor, "layers kv_heads tokens"],
    smoothing: float,
) -> Float[Tensor, " layers"]:
    """Return SmoothL1(score, label) + smoothing · (score_t − score_t−1)², each layer's mean over heads and tokens."""
    scores = scores.float()
    error = F.smooth_l1_loss(scores, labels, reduction="none").mean(dim=(1, 2))
    steps = scores.diff(dim=-1).square().sum(dim=(1, 2))
    return error + smoothing * steps / (scores.shape[1] * max(1, scores.shape[2] - 1))
