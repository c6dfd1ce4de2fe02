"""Score every key against the mean of the question's vectors: score(t) = k_t · mean_i q_i, in float32.

Two launches, one for the means and one that reads the keys, once. Where the GPU can (compute capability 9.0 on), the
second starts with the first, and waits for it only when its keys are on their way: a mean hides behind a read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["MEAN_CUT", "MEAN_DIMS", "Cut", "choose_cut", "launch", "mean_kernel", "score_kernel", "score_keys"]


class Cut(NamedTuple):
    """How the work is cut: keys, or vectors at a time, of a program (a power of two), warps."""

    rows: int
    warps: int


MEAN_CUT, MEAN_DIMS = Cut(256, 8), 32
"""A program takes 32 dims of a KV head's mean: 64 tokens of a group of 4 heads are one tile, all under way at once."""


def choose_cut(block_d: int) -> Cut:
    """Give a program about 8192 values of the keys, 64 a thread: enough loads under way, enough programs."""
    return Cut(max(1, 8192 // block_d), 4)


@triton.jit(do_not_specialize=["heads", "group", "tokens"])
def mean_kernel(
    query, mean, heads, group, tokens, stride_qb, stride_qh, stride_qn, stride_qd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Average BLOCK_D dims of a KV head's vectors, `group` heads of `tokens` each; `mean` is contiguous."""
    if OVERLAP:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    query += row // heads * stride_qb + row % heads * group * stride_qh + dims.to(tl.int64)[None, :] * stride_qd
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in tl.range(0, group * tokens, ROWS):
        at = start + tl.arange(0, ROWS)
        offset = (at // tokens).to(tl.int64) * stride_qh + (at % tokens).to(tl.int64) * stride_qn
        exists = (at < group * tokens)[:, None] & (dims < D)[None, :]
        total += tl.load(query + offset[:, None], mask=exists, other=0.0).to(tl.float32)
    tl.store(mean + row * D + dims, tl.sum(total, 0) / (group * tokens), mask=dims < D)


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def score_kernel(
    k, mean, scores, heads, rows, tokens, stride_kb, stride_kh, stride_kn, stride_kd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Score ROWS keys of one of `rows` heads; `mean` and `scores` are contiguous.

    Programs side by side take the same tokens of all heads, which models' projections write side by side.
    """
    row = (tl.program_id(0) % rows).to(tl.int64)
    token = tl.program_id(0) // rows * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, BLOCK_D)
    k += row // heads * stride_kb + row % heads * stride_kh
    k += token.to(tl.int64)[:, None] * stride_kn + dims.to(tl.int64)[None, :] * stride_kd
    exists = (token < tokens)[:, None] & (dims < D)[None, :]
    keys = tl.load(k, mask=exists, other=0.0, eviction_policy="evict_first")  # others' data may stay in the L2 cache
    if OVERLAP:
        gdc_wait()  # what `mean_kernel` stored is seen from here on
    q = tl.load(mean + row * D + dims, mask=dims < D, other=0.0)
    tl.store(scores + row * tokens + token, tl.sum(keys.to(tl.float32) * q[None, :], 1), mask=token < tokens)


def launch(k: Tensor, query: Tensor, cut: Cut) -> Tensor:
    """Run the kernels with a cut of one's own."""
    batch, heads, tokens, dim = k.shape
    rows, group = batch * heads, query.shape[1] // max(1, heads)
    scores = torch.empty((batch, heads, tokens), dtype=torch.float32, device=k.device)
    if scores.numel():
        mean = torch.empty((batch, heads, dim), dtype=torch.float32, device=k.device)
        overlap = k.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(k.device) >= (9, 0)
        with torch.cuda.device_of(k):
            mean_kernel[(rows, triton.cdiv(dim, MEAN_DIMS))](
                query, mean, heads, group, query.shape[2], *query.stride(),
                D=dim, BLOCK_D=MEAN_DIMS, ROWS=MEAN_CUT.rows, OVERLAP=overlap, num_warps=MEAN_CUT.warps,
            )  # fmt: skip
            score_kernel[(triton.cdiv(tokens, cut.rows) * rows,)](
                k, mean, scores, heads, rows, tokens, *k.stride(), D=dim, BLOCK_D=triton.next_power_of_2(dim),
                ROWS=cut.rows, OVERLAP=overlap, num_warps=cut.warps, **{"launch_pdl": True} if overlap else {},
            )  # fmt: skip
    return scores


@torch.library.custom_op("apb::score_keys", mutates_args=())
def score_keys(k: Tensor, query: Tensor) -> Tensor:
    """Return scores [batch, kv_heads, tokens] of keys [batch, kv_heads, tokens, dim], for query's mean by KV head.

    The query is [batch, q_heads, query_tokens, dim]. Both may be of any float dtype and stride.
    """
    return launch(k, query, choose_cut(triton.next_power_of_2(k.shape[3])))


@score_keys.register_fake
def _(k, query):
    return k.new_empty(k.shape[:3], dtype=torch.float32)
