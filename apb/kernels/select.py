"""Pool scores, select the best of each head and gather their keys and values (APB section 3.4).

A float becomes an unsigned integer of the same order. One program per head then finds the `keep`-th highest of them
two bits at a time, from the top: one sum counts how many keys reach each of the three thresholds that split the range
left. A last sweep admits what is higher, and equal keys from the lowest position on until `keep` are taken; a prefix
sum of both counts gives each its place. So the result is a stable sort's, exactly, and ascending. The keys lie in
scratch memory, near the one multiprocessor that reads them again and again.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Cut",
    "choose_cut",
    "gather_kept",
    "gather_kernel",
    "gather_rows",
    "launch",
    "select_kept",
    "select_kernel",
]


class Cut(NamedTuple):
    """How the selecting program sweeps its head: tokens at a time (a power of two ≤ 16384), warps, unrolled steps."""

    block: int
    warps: int
    unroll: int


def choose_cut(tokens: int) -> Cut:
    """Give a thread four keys at a time: one load of 16 bytes; more at once spill registers."""
    block = min(2048, max(512, triton.next_power_of_2(tokens)))
    return Cut(block, block // 128, 4)


@triton.jit
def ordered(x):
    """Map float32 to uint32 of the same order, −0 to 0, NaN above all (as a sort has it)."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = tl.where((bits == size) | (size == 0), size + 0x80000000, 0x7FFFFFFF - size)
    return tl.where(size > 0x7F800000, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def pooled(scores, token, tokens, stride_n, WIDTH: tl.constexpr, MEAN: tl.constexpr):
    """Return the ordered keys of the pooled scores of `token`, 0 (below all) outside, and whether a score is NaN."""
    inside = token < tokens
    here = tl.load(scores + token.to(tl.int64) * stride_n, mask=inside, other=0.0).to(tl.float32)
    best = here
    if MEAN:
        total = tl.zeros_like(here)
        count = tl.zeros_like(here)
        for step in tl.static_range(WIDTH):  # in the order of PyTorch's pooling: the same roundings
            near = token + (step - WIDTH // 2)
            exists = (near >= 0) & (near < tokens)
            total += tl.load(scores + near.to(tl.int64) * stride_n, mask=exists, other=0.0).to(tl.float32)
            count += exists.to(tl.float32)
        best = tl.div_rn(total, tl.maximum(count, 1.0))
    else:
        for step in tl.static_range(WIDTH):
            near = token + (step - WIDTH // 2)
            exists = (near >= 0) & (near < tokens)
            other = tl.load(scores + near.to(tl.int64) * stride_n, mask=exists, other=float("-inf")).to(tl.float32)
            best = tl.maximum(best, other, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(inside, ordered(best), 0), (here != here).to(tl.int32)


@triton.jit(do_not_specialize=["heads", "tokens", "keep", "sweeps"])
def select_kernel(
    scores, scratch, indices, nans, heads, tokens, keep, sweeps, stride_b, stride_h, stride_n,
    WIDTH: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the ascending positions of the `keep` best pooled scores of one head, and whether it has NaN."""
    row = tl.program_id(0).to(tl.int64)
    scores += row // heads * stride_b + row % heads * stride_h
    scratch += row * sweeps * BLOCK  # a whole number of sweeps, so that none needs a mask
    indices += row * keep
    lane = tl.arange(0, BLOCK)
    nan = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, sweeps * BLOCK, BLOCK):
        keys, is_nan = pooled(scores, start + lane, tokens, stride_n, WIDTH, MEAN)
        tl.store(scratch + start + lane, keys)
        nan |= is_nan
    tl.store(nans + row, tl.max(nan, 0) != 0)
    tl.debug_barrier()  # from here on threads read what others wrote

    best = tl.full([], 0, tl.uint32)  # the highest key that `keep` keys reach, as far as its bits are known
    above = tl.full([], 0, tl.int32)  # how many keys are above the range in which it is known to lie
    for step in tl.range(0, 16):
        unit = tl.full([], 1, tl.uint32) << tl.cast(30 - 2 * step, tl.uint32)
        low, mid, high = best + unit, best + unit * 2, best + unit * 3
        reached = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, sweeps * BLOCK, BLOCK, loop_unroll_factor=UNROLL):
            keys = tl.load(scratch + start + lane)
            reached += reaches(keys, low, mid, high)
        lows, mids, highs = totals(reached)
        best = tl.where(highs >= keep, high, tl.where(mids >= keep, mid, tl.where(lows >= keep, low, best)))
        above = tl.where(highs >= keep, above, tl.where(mids >= keep, highs, tl.where(lows >= keep, mids, lows)))

    higher = tl.full([], 0, tl.int32)
    equal = tl.full([], 0, tl.int32)
    for start in tl.range(0, sweeps * BLOCK, BLOCK):
        keys = tl.load(scratch + start + lane)
        higher, equal = admit(keys, start + lane, best, higher, equal, keep - above, indices)


@triton.jit
def reaches(keys, low, mid, high):
    """Say for each key which thresholds it reaches: three fields of 10 bits, to be added over up to 1023 sweeps."""
    return (keys >= low).to(tl.int32) + ((keys >= mid).to(tl.int32) << 10) + ((keys >= high).to(tl.int32) << 20)


@triton.jit
def totals(reached):
    """Add the three fields up over all lanes, in one sum with fields of 21 bits."""
    low = (reached & 0x3FF).to(tl.int64)
    mid = ((reached >> 10) & 0x3FF).to(tl.int64)
    high = (reached >> 20).to(tl.int64)
    total = tl.sum(low + (mid << 21) + (high << 42), 0)
    return (total & 0x1FFFFF).to(tl.int32), ((total >> 21) & 0x1FFFFF).to(tl.int32), (total >> 42).to(tl.int32)


@triton.jit
def admit(keys, token, best, higher, equal, ties, indices):
    """Write the kept tokens of one sweep to their places; return how many higher and equal keys there were so far."""
    is_higher = keys > best
    is_equal = keys == best  # never outside, where keys are 0: any score's is more
    both = is_higher.to(tl.int32) + (is_equal.to(tl.int32) << 16)
    upto = tl.cumsum(both, 0)
    tied = equal + (upto >> 16)
    place = higher + (upto & 0xFFFF) + tl.minimum(tied, ties) - 1
    tl.store(indices + place, token.to(tl.int64), mask=is_higher | (is_equal & (tied <= ties)))
    total = tl.sum(both, 0)
    return higher + (total & 0xFFFF), equal + (total >> 16)


@triton.jit(do_not_specialize=["heads", "keep"])
def gather_kernel(
    k, v, indices, message, heads, keep, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK_ROWS kept rows of one head's keys and values side by side; `indices` and `message` are contiguous."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = (place < keep)[:, None]
    token = tl.load(indices + row * keep + place, mask=place < keep, other=0)[:, None]
    message += (row * keep + place)[:, None] * (DK + DV)
    k_dims, v_dims = tl.arange(0, BLOCK_DK)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k += batch * stride_kb + head * stride_kh + token * stride_kn + k_dims.to(tl.int64) * stride_kd
    v += batch * stride_vb + head * stride_vh + token * stride_vn + v_dims.to(tl.int64) * stride_vd
    k_rows = tl.load(k, mask=inside & (k_dims < DK))
    v_rows = tl.load(v, mask=inside & (v_dims < DV))
    tl.store(message + k_dims, k_rows, mask=inside & (k_dims < DK))
    tl.store(message + DK + v_dims, v_rows, mask=inside & (v_dims < DV))


def gather_rows(values: int) -> int:
    """Give a gathering program about 4096 values, if `values` is what it moves of each row (of K and V, padded)."""
    return max(1, triton.next_power_of_2(4096 // values))


def launch(scores: Tensor, keep: int, width: int, mean: bool, cut: Cut) -> tuple[Tensor, Tensor]:
    """Run the selection with a cut of one's own; needs what `select_kept` needs."""
    batch, heads, tokens = scores.shape
    sweeps = triton.cdiv(tokens, cut.block)
    scratch = torch.empty((batch, heads, sweeps, cut.block), dtype=torch.uint32, device=scores.device)
    indices = torch.empty((batch, heads, keep), dtype=torch.int64, device=scores.device)
    nans = torch.empty((batch, heads), dtype=torch.bool, device=scores.device)
    with torch.cuda.device_of(scores):
        select_kernel[(batch * heads,)](
            scores, scratch, indices, nans, heads, tokens, keep, sweeps, *scores.stride(),
            WIDTH=width, MEAN=mean, BLOCK=cut.block, UNROLL=cut.unroll, num_warps=cut.warps,
        )  # fmt: skip
    return indices, nans


@torch.library.custom_op("apb::select_kept", mutates_args=())
def select_kept(scores: Tensor, keep: int, width: int, mean: bool) -> tuple[Tensor, Tensor]:
    """Return positions [batch, heads, keep], ascending, of the best pooled scores, and which heads have NaN scores.

    Scores [batch, heads, tokens] are pooled over `width` (odd) neighbours, their mean or their maximum; ties go to
    the lowest position, NaN counts as the highest. Needs batch · heads > 0 and 0 < keep ≤ tokens < 2²¹.
    """
    return launch(scores, keep, width, mean, choose_cut(scores.shape[2]))


@select_kept.register_fake
def _(scores, keep, width, mean):
    shape = scores.shape[:2]
    return scores.new_empty((*shape, keep), dtype=torch.int64), scores.new_empty(shape, dtype=torch.bool)


@torch.library.custom_op("apb::gather_kept", mutates_args=())
def gather_kept(k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """Gather rows of k and v [batch, heads, tokens, dim] side by side: [batch, heads, kept, dim of k + dim of v].

    Indices [batch, heads, kept] are contiguous int64, k and v share a dtype.
    """
    (batch, heads, _, dim_k), dim_v, keep = k.shape, v.shape[3], indices.shape[2]
    message = k.new_empty((batch, heads, keep, dim_k + dim_v))
    blocks = triton.next_power_of_2(dim_k), triton.next_power_of_2(dim_v)
    rows = gather_rows(sum(blocks))
    if message.numel():
        with torch.cuda.device_of(k):
            gather_kernel[(triton.cdiv(keep, rows), batch * heads)](
                k, v, indices, message, heads, keep, *k.stride(), *v.stride(),
                DK=dim_k, DV=dim_v, BLOCK_DK=blocks[0], BLOCK_DV=blocks[1], BLOCK_ROWS=rows,
                num_warps=4,
            )  # fmt: skip
    return message


@gather_kept.register_fake
def _(k, v, indices):
    return k.new_empty((*indices.shape, k.shape[3] + v.shape[3]))
