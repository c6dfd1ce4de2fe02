"""Peaked random inputs in awkward layouts, and the comparison with the float64 oracle."""

import torch
from hypothesis import strategies as st

from apb.testing.tolerance import assert_attention

__all__ = ["HEADS", "LAYOUTS", "LENGTHS", "SEEDS", "assert_attention", "draw_inputs", "lay_out"]

SEEDS = st.integers(0, 2**31)
LENGTHS = st.sampled_from([0, 1, 2, 7, 16, 33, 70])
LAYOUTS = st.sampled_from(["dense", "tokens_first", "step_2", "nan_around"])
HEADS = st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]))  # batch, kv, group


def draw_inputs(seed, heads, rows, columns, dim, dtype, layout="dense", device="cpu"):
    """Draw q, k, v with scores in the tens, so that a wrong mask or merge cannot hide."""
    batch, kv_heads, group = heads
    generator = torch.Generator(device).manual_seed(seed)
    shapes = (batch, kv_heads * group, rows, dim), (batch, kv_heads, columns, dim), (batch, kv_heads, columns, dim)
    q, k, v = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return tuple(lay_out(x.to(dtype), layout) for x in (6 * q, k, v))


def lay_out(x, layout):
    """Keep the values of x, change what lies around and between them."""
    if layout == "tokens_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "step_2":
        return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    if layout == "nan_around":
        batch, heads, tokens, dim = x.shape
        big = x.new_full((batch + 1, heads + 1, tokens + 9, dim + 8), torch.nan)
        big[:batch, :heads, 3 : tokens + 3, :dim] = x
        return big[:batch, :heads, 3 : tokens + 3, :dim]
    return x
