"""Score every key against one vector of its head: score(t) = k_t · q, in float32, reading the keys once."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Cut", "choose_cut", "launch", "score_kernel", "score_keys"]


class Cut(NamedTuple):
    """How the work is cut: keys of a program (a power of two), warps."""

    rows: int
    warps: int


def choose_cut(block_d: int) -> Cut:
    """Give a program about 8192 values of the keys, 64 a thread: enough loads under way, enough programs."""
    return Cut(max(1, 8192 // block_d), 4)


@triton.jit(do_not_specialize=["heads", "tokens"])
def score_kernel(
    k, query, scores, heads, tokens, stride_kb, stride_kh, stride_kn, stride_kd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Score ROWS keys of one head; `query` and `scores` are contiguous."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    k += row // heads * stride_kb + row % heads * stride_kh
    k += token.to(tl.int64)[:, None] * stride_kn + dims.to(tl.int64)[None, :] * stride_kd
    q = tl.load(query + row * D + dims, mask=dims < D, other=0.0)
    keys = tl.load(k, mask=(token < tokens)[:, None] & (dims < D)[None, :], other=0.0)
    tl.store(scores + row * tokens + token, tl.sum(keys.to(tl.float32) * q[None, :], 1), mask=token < tokens)


def launch(k: Tensor, query: Tensor, cut: Cut) -> Tensor:
    """Run the kernel with a cut of one's own."""
    batch, heads, tokens, dim = k.shape
    scores = torch.empty((batch, heads, tokens), dtype=torch.float32, device=k.device)
    if scores.numel():
        with torch.cuda.device_of(k):
            score_kernel[(triton.cdiv(tokens, cut.rows), batch * heads)](
                k, query, scores, heads, tokens, *k.stride(),
                D=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=cut.rows, num_warps=cut.warps,
            )  # fmt: skip
    return scores


@torch.library.custom_op("apb::score_keys", mutates_args=())
def score_keys(k: Tensor, query: Tensor) -> Tensor:
    """Return scores [batch, heads, tokens] of keys [batch, heads, tokens, dim] for query [batch, heads, dim].

    The query is contiguous and float32, the keys may be of any float dtype and stride.
    """
    return launch(k, query, choose_cut(triton.next_power_of_2(k.shape[3])))


@score_keys.register_fake
def _(k, query):
    return k.new_empty(k.shape[:3], dtype=torch.float32)
