"""Pool scores, select the best of each head and gather their keys and values (APB section 3.4).

A float becomes an unsigned integer of the same order, its key. The `keep`-th highest key of a head is found by digits
of 8 bits, from the top. A head's tokens lie in up to 16 parts, one program each (so parts × heads × batch in all). Each
counts those of its keys that agree with the digits known so far by their next digit, and notes this histogram. One
launch later every part adds the head's histograms up: their sum gives the digit, and the sum of those before its own
says how many of the tokens to keep come before its own. The last launch admits what is higher, and equal keys from the
lowest position on until `keep` are taken; a prefix sum of both counts gives each its place. So the result is a stable
sort's, exactly, and ascending. No program waits for another one; each reads its own keys again, four times, from memory
that the L2 cache holds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "Cut",
    "admit_kernel",
    "choose_cut",
    "gather_kept",
    "gather_kernel",
    "gather_rows",
    "launch",
    "narrow_kernel",
    "pool_kernel",
    "select_kept",
]

BINS = tl.constexpr(256)
"""Values of a digit."""

NOTE = tl.constexpr(260)
"""What a part notes of a digit: how many keys have each value, then `best`, `left` and `higher`, and if it has NaN.

`best` is the key sought, as far as its digits are known, and zeros; `left` is how many of the `keep` keys are not
known to be above it; `higher` is how many keys of earlier parts are.
"""


class Cut(NamedTuple):
    """How a head is cut: tokens at a time (`block`), warps of a program, programs of a head (`parts`).

    All are powers of two: warps up to 8 (as many threads as a digit has values), 32 · warps ≤ block ≤ 16384.
    """

    block: int
    warps: int
    parts: int


def choose_cut(tokens: int) -> Cut:
    """Give a thread four keys at a time, one load of 16 bytes; as many parts as blocks, a power of two up to 16."""
    return Cut(1024, 8, min(16, triton.next_power_of_2(triton.cdiv(tokens, 1024))))


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
            if step != WIDTH // 2:
                near = token + (step - WIDTH // 2)
                exists = (near >= 0) & (near < tokens)
                other = tl.load(scores + near.to(tl.int64) * stride_n, mask=exists, other=float("-inf")).to(tl.float32)
                best = tl.maximum(best, other, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(inside, ordered(best), 0), (here != here).to(tl.int32)


@triton.jit(do_not_specialize=["heads", "tokens", "keep", "sweeps"])
def pool_kernel(
    scores, keys, notes, heads, tokens, keep, sweeps, stride_b, stride_h, stride_n,
    WIDTH: tl.constexpr, MEAN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the keys of one part; note the histogram of their first digit and whether a score is NaN."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scores += row // heads * stride_b + row % heads * stride_h
    keys += (row * PARTS + part) * sweeps * BLOCK  # a whole number of sweeps, so that none needs a mask
    notes += (row * PARTS + part) * NOTE
    token = part * sweeps * BLOCK + tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], tl.int32)
    nan = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, sweeps * BLOCK, BLOCK):
        some, is_nan = pooled(scores, start + token, tokens, stride_n, WIDTH, MEAN)
        tl.store(keys + start + tl.arange(0, BLOCK), some)
        counts += tl.histogram((some >> 24).to(tl.int32), BINS)
        nan |= is_nan
    write_note(notes, counts, 0, keep, 0)
    tl.store(notes + BINS + 3, tl.max(nan, 0))


@triton.jit(do_not_specialize=["sweeps", "shift"])
def narrow_kernel(keys, noted, notes, sweeps, shift, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Take the digit before the one at bit `shift` from what all parts `noted`; note this one's histogram."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    keys += (row * PARTS + part) * sweeps * BLOCK + tl.arange(0, BLOCK)
    best, left, higher, _ = take_digit(noted + row * PARTS * NOTE, part, shift + 8, PARTS)
    counts = tl.zeros([BINS], tl.int32)
    for start in tl.range(0, sweeps * BLOCK, BLOCK):
        digit = (tl.load(keys + start) ^ best) >> tl.cast(shift, tl.uint32)  # more than a digit where they differ above
        counts += tl.histogram(digit.to(tl.int32), BINS, mask=digit < BINS)
    write_note(notes + (row * PARTS + part) * NOTE, counts, best.to(tl.int32, bitcast=True), left, higher)


@triton.jit(do_not_specialize=["keep", "sweeps"])
def admit_kernel(
    keys, first, last, indices, nans, keep, sweeps, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the last digit from the notes on it; write the kept positions of one part, and if the head has NaN."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part == 0:
        nan = tl.load(first + (row * PARTS + tl.arange(0, PARTS)) * NOTE + BINS + 3)
        tl.store(nans + row, tl.max(nan, 0) != 0)
    keys += (row * PARTS + part) * sweeps * BLOCK + tl.arange(0, BLOCK)
    token = part * sweeps * BLOCK + tl.arange(0, BLOCK)
    best, ties, higher, equal = take_digit(last + row * PARTS * NOTE, part, 0, PARTS)
    for start in tl.range(0, sweeps * BLOCK, BLOCK):
        some = tl.load(keys + start)
        higher, equal = admit(some, start + token, best, higher, equal, ties, indices + row * keep)


@triton.jit
def write_note(note, counts, best, left, higher):
    """Store what `NOTE` says, but for NaN."""
    tl.store(note + tl.arange(0, BINS), counts)
    tl.store(note + BINS, best)
    tl.store(note + BINS + 1, left)
    tl.store(note + BINS + 2, higher)


@triton.jit
def take_digit(notes, part, shift, PARTS: tl.constexpr):
    """Take the highest digit that enough keys of a head reach into `best`, at bit `shift`.

    Returns:
        `best`, `left` and `higher`, and how many keys of earlier parts agree with `best` so far.
    """
    own = notes + part * NOTE + BINS
    best, left, higher = tl.load(own).to(tl.uint32, bitcast=True), tl.load(own + 1), tl.load(own + 2)
    parts = tl.arange(0, PARTS)[:, None]
    counts = tl.load(notes + parts * NOTE + tl.arange(0, BINS)[None, :])
    count, earlier = sum_both(counts, tl.where(parts < part, counts, 0))
    reached = tl.cumsum(count, 0, reverse=True)
    beyond = reached - count
    enough = reached >= left
    chosen = enough & (beyond < left)
    digits, equal = sum_both(enough.to(tl.int32), tl.where(chosen, earlier, 0))
    above, before = sum_both(tl.where(chosen, beyond, 0), tl.where(enough, 0, earlier))
    best += (digits - 1).to(tl.uint32) << tl.cast(shift, tl.uint32)
    return best, left - above, higher + before, equal


@triton.jit
def sum_both(x, y):
    """Sum two tensors of counts over their first dimension, in one sum with fields of 32 bits."""
    both = tl.sum(x.to(tl.int64) + (y.to(tl.int64) << 32), 0)
    return both.to(tl.int32), (both >> 32).to(tl.int32)


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
    grid = (batch * heads, cut.parts)  # in this order: only the first may be more than 65535
    sweeps = triton.cdiv(tokens, cut.parts * cut.block)
    keys = torch.empty((*grid, sweeps * cut.block), dtype=torch.uint32, device=scores.device)
    notes = torch.empty((4, *grid, NOTE.value), dtype=torch.int32, device=scores.device)
    indices = torch.empty((batch, heads, keep), dtype=torch.int64, device=scores.device)
    nans = torch.empty((batch, heads), dtype=torch.bool, device=scores.device)
    settings = {"PARTS": cut.parts, "BLOCK": cut.block, "num_warps": cut.warps}
    with torch.cuda.device_of(scores):
        pool_kernel[grid](
            scores, keys, notes[0], heads, tokens, keep, sweeps, *scores.stride(),
            WIDTH=width, MEAN=mean, **settings,
        )  # fmt: skip
        for digit in (1, 2, 3):
            narrow_kernel[grid](keys, notes[digit - 1], notes[digit], sweeps, 24 - 8 * digit, **settings)
        admit_kernel[grid](keys, notes[0], notes[3], indices, nans, keep, sweeps, **settings)
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
