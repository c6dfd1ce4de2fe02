"""Shapes of real models, for layers with random weights."""

from dataclasses import dataclass

from apb.costs import ModelShape

__all__ = ["SHAPES", "DecoderShape"]


@dataclass(frozen=True, kw_only=True)
class DecoderShape(ModelShape):
    """All that a decoder with random weights is made of."""

    name: str
    vocab: int
    rope_theta: float = 10_000.0
    qkv_bias: bool = False

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's weights: QKV, O, a gated FFN, two norms."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        values = self.hidden * (qkv + self.heads * self.head_dim + 3 * self.ffn + 2) + self.qkv_bias * qkv
        return values * self.bytes_per_value

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: the layers, the embedding, the last norm and the output embedding."""
        return self.layers * self.layer_bytes + (2 * self.vocab + 1) * self.hidden * self.bytes_per_value


_SHAPES = (
    DecoderShape(
        name="llama-3.1-8b", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256,
        rope_theta=500_000.0,
    ),
    DecoderShape(
        name="qwen-2.5-14b", layers=48, hidden=5120, heads=40, kv_heads=8, head_dim=128, ffn=13824, vocab=152064,
        rope_theta=1_000_000.0, qkv_bias=True,
    ),
    DecoderShape(
        name="yi-34b", layers=60, hidden=7168, heads=56, kv_heads=8, head_dim=128, ffn=20480, vocab=64000,
        rope_theta=5_000_000.0,
    ),
    DecoderShape(name="tiny", layers=2, hidden=128, heads=8, kv_heads=2, head_dim=16, ffn=256, vocab=512),
)  # fmt: skip

SHAPES = {shape.name: shape for shape in _SHAPES}
"""By name; "tiny" is for tests, and for trying things on a laptop."""
