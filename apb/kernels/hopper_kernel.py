"""APB's masked attention for Hopper (sm_90), in Gluon: what `masked_flash.py` computes, with Hopper's own means.

One program per multiprocessor draws tiles of rows until none is left. In it, one warp fetches and two consumers, a
warpgroup of 64 rows each, compute; they hand each other turns, so that one's softmax runs under another's products:

    producer     │ tile, K₀, Q │ K₁ V₀ │ K₂ V₁ │ …                          by TMA, into a ring of STAGES pairs
    consumer 0   │         │ Q K₀ᵀ │ softmax₀ │ Q K₁ᵀ, P₀V₀ │ softmax₁ │ …
    consumer 1   │                 │ Q K₀ᵀ    │ softmax₀    │ Q K₁ᵀ, P₀V₀ │ …

Q Kⱼᵀ is issued before Pⱼ₋₁ Vⱼ₋₁: the scores of the next keys are there when the softmax of these is done. The softmax
looks for no maximum: any peak will do that keeps the weights in range, so a row keeps its first block's until one of
the four lanes that share the row adds up more than 2¹² in a block. Only then do the 16 rows of that lane's warp take
new peaks, and what was summed up before is rescaled.

Tiles differ in length, so that equal shares would leave some programs waiting: each draws its next tile from a
counter, in the order KV head by KV head (its keys then stay in L2), longest first, the query heads that share the keys
side by side. A tile's rows leave by TMA as well, through the buffer of its last keys, once every consumer has its
scores from them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from .hopper_channel import Channel, make_channel, pass_turn, take_turn
from .hopper_lanes import any_above, prepare_votes
from .hopper_pairs import Pairs, make_pairs
from .hopper_softmax import hide, raise_peak, weigh

__all__ = ["BLOCK_M", "BLOCK_N", "hopper_flash_kernel"]

_CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)  # rows of a tile: 64 · consumers
BLOCK_N = gl.constexpr(128)  # keys of a tile; its buffer later takes the rows, so not fewer than those
_REGISTERS = gl.constexpr(240)  # of a consumer's thread; 255 is the most


@aggregate
class Work:
    """What producer and consumers share: the channels between them, and the lengths of the attention."""

    tiles: Channel
    q: Channel
    pairs: Pairs
    scored: gl.shared_memory_descriptor  # for two tiles in turn: every consumer has its last scores
    rows: gl.tensor
    columns: gl.tensor
    anchor_tokens: gl.tensor
    anchor_rows: gl.tensor
    kv_heads: gl.tensor
    group: gl.tensor
    all_tiles: gl.tensor
    CAUSAL: gl.constexpr
    D: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, q, pairs, scored, rows, columns, anchor_tokens, anchor_rows, kv_heads, group, all_tiles,
                 CAUSAL, D):  # fmt: skip
        self.tiles, self.q, self.pairs, self.scored = tiles, q, pairs, scored
        self.rows, self.columns = rows, columns
        self.anchor_tokens, self.anchor_rows = anchor_tokens, anchor_rows
        self.kv_heads, self.group, self.all_tiles = kv_heads, group, all_tiles
        self.CAUSAL, self.D = gl.constexpr(CAUSAL), gl.constexpr(D)

    @gluon.jit
    def locate(self, tile):
        """Return a tile's batch, KV head, query head, first and end row, column shift, full and all key blocks."""
        block_tiles = gl.cdiv(self.rows - self.anchor_rows, BLOCK_M)
        anchor_tiles = gl.cdiv(self.anchor_rows, BLOCK_M)
        tiles = block_tiles + anchor_tiles
        rest = tile // self.group
        index = tiles - 1 - rest % tiles  # counted from the top; longest first
        batch, kv_head = rest // tiles // self.kv_heads, rest // tiles % self.kv_heads
        in_anchor = index < anchor_tiles
        first = gl.where(in_anchor, index * BLOCK_M, self.anchor_rows + (index - anchor_tiles) * BLOCK_M)
        end = gl.where(in_anchor, self.anchor_rows, self.rows)
        shift = gl.where(in_anchor, self.anchor_tokens - self.anchor_rows, self.columns - self.rows)
        if self.CAUSAL:
            full = (first + shift + 1) // BLOCK_N  # the blocks before it are seen by every row, whole
            blocks = gl.cdiv(gl.minimum(first + BLOCK_M, end) + shift, BLOCK_N)
        else:
            full = self.columns // BLOCK_N
            blocks = gl.cdiv(self.columns, BLOCK_N)
        full = gl.minimum(full, blocks - 1)  # the last is taken for masked in any case
        return batch, kv_head, kv_head * self.group + tile % self.group, first, end, shift, full, blocks


@gluon.jit
def produce(work, q, k, v, counter):
    """Draw tiles, tell the consumers which, and fetch what they need; one warp."""
    filled = 0
    drawn = 0
    v_batch, v_head, v_row = 0, 0, 0  # where a tile's last values are: they come with the next one's first keys
    tile = gl.atomic_add(counter, 1)
    while tile < work.all_tiles:
        work.tiles.send(drawn, tile)
        batch, kv_head, head, first, _, _, _, blocks = work.locate(tile)
        work.pairs.await_free(filled)
        if filled > 0:
            work.pairs.fetch_values(filled, v, [v_batch, v_head, v_row, 0])
        else:
            work.pairs.leave_out(filled)
        work.pairs.fetch_keys(filled, k, [batch, kv_head, 0, 0])
        for consumer in gl.static_range(_CONSUMERS):  # last: it waits for who still wants the values before leaving Q
            work.q.fetch(drawn * _CONSUMERS + consumer, q, [batch, head, first + consumer * 64, 0])
        filled += 1
        for block in range(1, blocks):
            work.pairs.await_free(filled)
            work.pairs.fetch_keys(filled, k, [batch, kv_head, block * BLOCK_N, 0])
            work.pairs.fetch_values(filled, v, [batch, kv_head, (block - 1) * BLOCK_N, 0])
            filled += 1
        v_batch, v_head, v_row = batch, kv_head, (blocks - 1) * BLOCK_N
        drawn += 1
        tile = gl.atomic_add(counter, 1)
    work.tiles.send(drawn, tile)  # beyond the last: the consumers end too
    if filled > 0:
        work.pairs.await_free(filled)
        work.pairs.fetch_values(filled, v, [v_batch, v_head, v_row, 0])
        work.pairs.leave_out(filled)
        work.pairs.drain(filled)


@gluon.jit
def score(work, q, used, LAYOUT: gl.constexpr):
    """Issue Q Kᵀ for the keys of pair `used`, which must be full."""
    keys = work.pairs.k.index(used % work.pairs.slots).reshape([BLOCK_N, work.D]).permute((1, 0))
    zero = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def add_values(work, acc, p, used):
    """Issue acc + P V for the values of pair `used`, which must be full."""
    values = work.pairs.v.index(used % work.pairs.slots).reshape([BLOCK_N, work.D])
    return warpgroup_mma(p, values, acc, is_async=True)


@gluon.jit
def step(work, q, acc, p, peak, total, scale_log2, limit, block, blocks, used, drawn, CONSUMER: gl.constexpr,
         LAYOUT_S: gl.constexpr, LAYOUT_O: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """Issue Q Kⱼᵀ and Pⱼ₋₁ Vⱼ₋₁, and take the scores into the softmax while the second product runs."""
    DTYPE: gl.constexpr = work.pairs.v.dtype
    work.pairs.await_full(used)
    take_turn(CONSUMER)
    scores = score(work, q, used, LAYOUT_S)
    acc = add_values(work, acc, p, used)
    pass_turn((CONSUMER + 1) % _CONSUMERS)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    if MASKED:
        mbarrier.arrive(work.scored.index(drawn % 2), count=1, pred=block == blocks - 1)
        scores = hide(scores, block, limit, LAYOUT_S)
    p, more = weigh(scores, peak, scale_log2, DTYPE, LAYOUT_O)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if MASKED:
        work.pairs.release_if(used, block < blocks - 1)  # the tile's last keys make room for its rows
    else:
        work.pairs.release(used)
    if any_above(more) != 0:
        p, acc, peak, total, more = raise_peak(scores, acc, peak, total, scale_log2, DTYPE, LAYOUT_O)
    return acc, p, peak, total + more  # ty: ignore[unsupported-operator]


@gluon.jit
def attend_tile(work, drawn, tile, used, scale_log2, CONSUMER: gl.constexpr, LAYOUT_S: gl.constexpr,
                LAYOUT_O: gl.constexpr):  # fmt: skip
    """Compute this consumer's 64 rows of a tile, but for the division: (acc, total, peak, pair of its last values)."""
    _, _, _, first, _, shift, full, blocks = work.locate(tile)
    q_number = drawn * _CONSUMERS + CONSUMER
    by_row: gl.constexpr = gl.SliceLayout(1, LAYOUT_S)
    if work.CAUSAL:
        limit = first + CONSUMER * 64 + shift + gl.arange(0, 64, by_row)  # the last column that each row sees
    else:
        limit = gl.full([64], work.columns - 1, gl.int32, by_row)
    acc = gl.zeros([64, work.D], gl.float32, LAYOUT_O)

    q = work.q.await_full(q_number).reshape([64, work.D])
    work.pairs.await_full(used)
    take_turn(CONSUMER)
    scores = score(work, q, used, LAYOUT_S)
    pass_turn((CONSUMER + 1) % _CONSUMERS)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(work.scored.index(drawn % 2), count=1, pred=blocks == 1)
    gl.thread_barrier()  # the compiler wants one between an arrival and a wait: better here than in every step
    work.pairs.release_if(used, blocks > 1)  # the values in it were the last tile's
    if full == 0:  # block 0 is the diagonal's
        scores = hide(scores, 0, limit, LAYOUT_S)
    peak = gl.max(scores, 1) * scale_log2  # finite, for every row sees column 0
    p, total = weigh(scores, peak, scale_log2, work.pairs.v.dtype, LAYOUT_O)
    used += 1
    for block in range(1, full):
        acc, p, peak, total = step(work, q, acc, p, peak, total, scale_log2, limit, block, blocks, used, drawn,
                                   CONSUMER, LAYOUT_S, LAYOUT_O, False)  # fmt: skip
        used += 1
    for block in range(gl.maximum(full, 1), blocks):
        acc, p, peak, total = step(work, q, acc, p, peak, total, scale_log2, limit, block, blocks, used, drawn,
                                   CONSUMER, LAYOUT_S, LAYOUT_O, True)  # fmt: skip
        used += 1
    work.q.release(q_number)
    work.pairs.await_full(used)
    acc = warpgroup_mma_wait(0, deps=(add_values(work, acc, p, used),))
    return acc, total, peak, used


@gluon.jit
def store_rows(work, target, acc, total, peak, tile, used, drawn, CONSUMER: gl.constexpr, LAYOUT_S: gl.constexpr,
               LAYOUT_O: gl.constexpr):  # fmt: skip
    """Divide and store this consumer's rows of a tile, for which pair `used` − 1, with its last keys, is kept."""
    out, out_map, lse, stride_b, stride_h, stride_n = target
    batch, _, head, first, end, _, _, _ = work.locate(tile)
    first += CONSUMER * 64
    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, LAYOUT_S), assert_trivial=True)
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT_S))
    lse_row = (batch.to(gl.int64) * work.kv_heads * work.group + head) * work.rows + first
    gl.store(lse + lse_row + row, (peak + gl.log2(total)) * 0.6931471805599453, mask=first + row < end)
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, LAYOUT_O))[:, None]
    acc = acc.to(out.dtype.element_ty)
    mbarrier.wait(work.scored.index(drawn % 2), drawn // 2 & 1)
    if (first + 64 <= end) | (end == work.rows):  # TMA leaves out what lies beyond the last row
        keys = work.pairs.k.index((used - 1) % work.pairs.slots)
        room = keys._reinterpret(keys.dtype, [BLOCK_N // 64, 1, 1, 64, work.D], work.q.buffers.layout)
        room = room.index(CONSUMER)
        room.reshape([64, work.D]).store(acc)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_map, [batch, head, first, 0], room)
        tma.store_wait(0)
    else:  # the anchor's last rows, with the block's behind them
        line = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT_O))
        dim = gl.arange(0, work.D, gl.SliceLayout(0, LAYOUT_O))
        begin = batch.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h + (first + line).to(gl.int64) * stride_n
        begin = gl.multiple_of(begin // 8 * 8, [8])  # as TMA needs them; the compiler cannot know
        gl.store(out + begin[:, None] + dim[None, :], acc, mask=(first + line < end)[:, None])
    work.pairs.release(used - 1)


@gluon.jit
def consume(work, target, scale_log2, CONSUMER: gl.constexpr):
    """Compute and store 64 rows of each tile; one warpgroup."""
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LAYOUT_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.D, 16])
    if CONSUMER == _CONSUMERS - 1:
        pass_turn(0)
    drawn = 0
    used = 0
    tile = work.tiles.receive(drawn)
    while tile < work.all_tiles:
        acc, total, peak, used = attend_tile(work, drawn, tile, used, scale_log2, CONSUMER, LAYOUT_S, LAYOUT_O)
        store_rows(work, target, acc, total, peak, tile, used, drawn, CONSUMER, LAYOUT_S, LAYOUT_O)
        drawn += 1
        tile = work.tiles.receive(drawn)
    if CONSUMER == 0:
        take_turn(0)  # the last turn, which nobody else takes


@gluon.jit(do_not_specialize=["rows", "columns", "anchor_tokens", "anchor_rows", "kv_heads", "group", "all_tiles"])
def hopper_flash_kernel(q, k, v, out, out_map, lse, counter, scale_log2, rows, columns, anchor_tokens, anchor_rows,
                        kv_heads, group, all_tiles, stride_b, stride_h, stride_n, CAUSAL: gl.constexpr,
                        D: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Start the warps of one program; `counter` is 0, `lse` contiguous, `out_map` describes `out` and its strides."""
    prepare_votes()  # ty: ignore[missing-argument]
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_tiles = gl.allocate_shared_memory(q.dtype, [_CONSUMERS, 1, 1, 64, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    tiles, qs = make_channel(numbers, 2, _CONSUMERS), make_channel(q_tiles, _CONSUMERS, 1)
    pairs = make_pairs(k_tiles, v_tiles, STAGES)
    scored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(scored.index(i), count=_CONSUMERS)
    fence_async_shared()
    work = Work(tiles, qs, pairs, scored, rows, columns, anchor_tokens, anchor_rows, kv_heads, group, all_tiles,
                CAUSAL, D)  # fmt: skip
    target = (out, out_map, lse, stride_b, stride_h, stride_n)
    gl.warp_specialize([
        (consume, (work, target, scale_log2, gl.constexpr(0))),
        (consume, (work, target, scale_log2, gl.constexpr(1))),
        (produce, (work, q, k, v, counter)),
    ], [4, 1], [_REGISTERS, 24])  # fmt: skip
