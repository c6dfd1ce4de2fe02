"""Gradients of attention's output and LSE, and the comparison of what follows from them with the float64 oracle."""

import math

import torch
from attention_cases import lay_out
from einops import repeat

from apb.reference import attention
from apb.testing.tolerance import assert_rows_close

__all__ = ["assert_gradients", "draw_grads"]


def draw_grads(seed, q, layout="dense"):
    """Draw the gradients of the output and of the LSE."""
    generator = torch.Generator(q.device).manual_seed(seed + 1)
    grad_out = torch.randn(q.shape, generator=generator, device=q.device).to(q.dtype)
    return lay_out(grad_out, layout), torch.randn(q.shape[:-1], generator=generator, device=q.device)


def assert_gradients(found, q, k, v, mask, grad_out, grad_lse, *, scale=None, only="qkv"):
    """Assert that the gradients of the inputs named in `only` are the oracle's, row by row.

    The yardstick is the textbook formula differentiated in the inputs' own dtype; the band grows with the size of the
    scores, since rounding those is rounding the weights.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = mask.to(q.device)
    truth = _differentiated(lambda *x: attention(*x, mask, scale), (q, k, v), (grad_out, grad_lse), torch.float64)
    eager = _differentiated(lambda *x: _eager(*x, mask, scale), (q, k, v), (grad_out, grad_lse), q.dtype)
    size = 1 + scale * float(q.detach().norm(dim=-1).max() * k.detach().norm(dim=-1).max())
    every = {name: pair for name, *pair in zip("qkv", truth, eager, strict=True)}
    for name, got in zip(only, found, strict=True):
        assert got.dtype == q.dtype
        wanted, yardstick = every[name]
        band = float(wanted.abs().max()) * (size if q.dtype == torch.float32 else 1.0)
        assert_rows_close(got, wanted, eager=yardstick, value_scale=band)


def _differentiated(attend, inputs, grads, dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = attend(*inputs)
    return torch.autograd.grad((out, lse), inputs, (grads[0].to(out.dtype), grads[1].to(lse.dtype)))


def _eager(q, k, v, mask, scale):
    group = q.shape[1] // k.shape[1]
    k, v = (repeat(x, "b h m d -> b (h g) m d", g=group) for x in (k, v))
    scores = (scale * (q @ k.transpose(-1, -2))).masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1) @ v, torch.logsumexp(scores.float(), dim=-1)
