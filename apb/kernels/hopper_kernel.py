"""APB's masked attention for Hopper (sm_90), in Gluon: what `masked_flash.py` computes, with Hopper's own means.

One program per multiprocessor draws tiles of rows until none is left. In it, one warp fetches and the consumers, a
warpgroup of 64 rows each, compute; they hand each other turns, so that one's softmax runs under another's products:

    producer     │ tile, Q │ K₀ V₀ │ K₁ V₁ │ K₂ V₂ │ …                      by TMA, into rings of STAGES buffers
    consumer 0   │         │ Q K₀ᵀ │ softmax₀ │ Q K₁ᵀ, P₀V₀ │ softmax₁ │ …
    consumer 1   │                 │ Q K₀ᵀ    │ softmax₀    │ Q K₁ᵀ, P₀V₀ │ …

Q Kⱼᵀ is issued before Pⱼ₋₁ Vⱼ₋₁: the scores of the next keys are there when the softmax of these is done. Tiles differ
in length, so that equal shares would leave some programs waiting: each draws its next tile from a counter, in the
order KV head by KV head (its keys then stay in L2), longest first, the query heads that share the keys side by side.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate

from .hopper_channel import Channel, make_channel, pass_turn, take_turn

__all__ = ["hopper_flash_kernel"]


@aggregate
class Work:
    """What producer and consumers share: the channels between them, and the lengths of the attention."""

    tiles: Channel
    q: Channel
    k: Channel
    v: Channel
    rows: gl.tensor
    columns: gl.tensor
    anchor_tokens: gl.tensor
    anchor_rows: gl.tensor
    kv_heads: gl.tensor
    group: gl.tensor
    all_tiles: gl.tensor
    CAUSAL: gl.constexpr
    D: gl.constexpr
    CONSUMERS: gl.constexpr
    BLOCK_N: gl.constexpr
    Q_IN_REGISTERS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, q, k, v, rows, columns, anchor_tokens, anchor_rows, kv_heads, group, all_tiles,
                 CAUSAL, D, CONSUMERS, BLOCK_N, Q_IN_REGISTERS):  # fmt: skip
        self.tiles, self.q, self.k, self.v = tiles, q, k, v
        self.rows, self.columns = rows, columns
        self.anchor_tokens, self.anchor_rows = anchor_tokens, anchor_rows
        self.kv_heads, self.group, self.all_tiles = kv_heads, group, all_tiles
        self.CAUSAL, self.D = gl.constexpr(CAUSAL), gl.constexpr(D)
        self.CONSUMERS, self.BLOCK_N = gl.constexpr(CONSUMERS), gl.constexpr(BLOCK_N)
        self.Q_IN_REGISTERS = gl.constexpr(Q_IN_REGISTERS)

    @gluon.jit
    def locate(self, tile):
        """Return a tile's batch, KV head, query head, first and end row, column shift, full and all key blocks."""
        block_m: gl.constexpr = 64 * self.CONSUMERS
        block_tiles = gl.cdiv(self.rows - self.anchor_rows, block_m)
        anchor_tiles = gl.cdiv(self.anchor_rows, block_m)
        tiles = block_tiles + anchor_tiles
        rest = tile // self.group
        index = tiles - 1 - rest % tiles  # counted from the top; longest first
        batch, kv_head = rest // tiles // self.kv_heads, rest // tiles % self.kv_heads
        in_anchor = index < anchor_tiles
        first = gl.where(in_anchor, index * block_m, self.anchor_rows + (index - anchor_tiles) * block_m)
        end = gl.where(in_anchor, self.anchor_rows, self.rows)
        shift = gl.where(in_anchor, self.anchor_tokens - self.anchor_rows, self.columns - self.rows)
        if self.CAUSAL:
            full = (first + shift + 1) // self.BLOCK_N  # the blocks before it are seen by every row, whole
            blocks = gl.cdiv(gl.minimum(first + block_m, end) + shift, self.BLOCK_N)
        else:
            full = self.columns // self.BLOCK_N
            blocks = gl.cdiv(self.columns, self.BLOCK_N)
        return batch, kv_head, kv_head * self.group + tile % self.group, first, end, shift, full, blocks


@gluon.jit
def produce(work, q, k, v, counter):
    """Draw tiles, tell the consumers which, and fetch what they need; one warp."""
    filled = 0
    drawn = 0
    tile = gl.atomic_add(counter, 1)
    while tile < work.all_tiles:
        work.tiles.send(drawn, tile)
        batch, kv_head, head, first, _, _, _, blocks = work.locate(tile)
        work.k.fetch(filled, k, [batch, kv_head, 0, 0])  # first, since a buffer is free before the consumers leave Q
        for consumer in gl.static_range(work.CONSUMERS):
            work.q.fetch(drawn * work.CONSUMERS + consumer, q, [batch, head, first + consumer * 64, 0])
        work.v.fetch(filled, v, [batch, kv_head, 0, 0])
        filled += 1
        for block in range(1, blocks):
            work.k.fetch(filled, k, [batch, kv_head, block * work.BLOCK_N, 0])
            work.v.fetch(filled, v, [batch, kv_head, block * work.BLOCK_N, 0])
            filled += 1
        drawn += 1
        tile = gl.atomic_add(counter, 1)
    work.tiles.send(drawn, tile)  # beyond the last: the consumers end too


@gluon.jit
def weigh(scores, peak, total, scale_log2, limit, columns, MASKED: gl.constexpr):
    """Take a block's scores into the online softmax: (2^(score − peak), peak, Σ of it, decay of what came before)."""
    if MASKED:
        scores = gl.where(columns[None, :] <= limit[:, None], scores, float("-inf"))
    # Every row sees column 0, so its peak is finite from the first block on: no (−inf) − (−inf) below.
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    return weights, new_peak, total * decay + gl.sum(weights, 1), decay


@gluon.jit
def score(work, q, used, LAYOUT: gl.constexpr):
    """Issue Q Kᵀ for use number `used` of the keys' channel, which must be full."""
    keys = work.k.buffers.index(used % work.k.slots).reshape([work.BLOCK_N, work.D]).permute((1, 0))
    zero = gl.zeros([64, work.BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def add_values(work, acc, weights, used):
    """Wait for use number `used` of the values' channel, and issue acc + P V."""
    values = work.v.await_full(used).reshape([work.BLOCK_N, work.D])
    return warpgroup_mma(weights, values, acc, is_async=True)


@gluon.jit
def step(work, q, acc, weights, peak, total, scale_log2, limit, block, used, CONSUMER: gl.constexpr,
         LAYOUT_S: gl.constexpr, LAYOUT_O: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """Issue Q Kⱼᵀ and Pⱼ₋₁ Vⱼ₋₁, and take the scores into the softmax while the second product runs."""
    p = gl.convert_layout(weights.to(work.v.buffers.dtype), gl.DotOperandLayout(0, LAYOUT_O, 2))
    work.k.await_full(used)
    take_turn(CONSUMER)
    scores = score(work, q, used, LAYOUT_S)
    acc = add_values(work, acc, p, used - 1)
    pass_turn((CONSUMER + 1) % work.CONSUMERS)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    work.k.release(used)
    columns = block * work.BLOCK_N + gl.arange(0, work.BLOCK_N, gl.SliceLayout(0, LAYOUT_S))
    weights, peak, total, decay = weigh(scores, peak, total, scale_log2, limit, columns, MASKED)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    work.v.release(used - 1)
    return acc * gl.convert_layout(decay, gl.SliceLayout(1, LAYOUT_O))[:, None], weights, peak, total


@gluon.jit
def attend_tile(work, q_number, tile, used, scale_log2, CONSUMER: gl.constexpr, LAYOUT_S: gl.constexpr,
                LAYOUT_O: gl.constexpr):  # fmt: skip
    """Compute this consumer's 64 rows of a tile, but for the division: (acc, total, peak, uses of K and V)."""
    _, _, _, first, _, shift, full, blocks = work.locate(tile)
    by_row: gl.constexpr = gl.SliceLayout(1, LAYOUT_S)
    if work.CAUSAL:
        limit = first + CONSUMER * 64 + shift + gl.arange(0, 64, by_row)  # the last column that each row sees
    else:
        limit = gl.full([64], work.columns - 1, gl.int32, by_row)
    peak = gl.full([64], -float("inf"), gl.float32, by_row)
    total = gl.zeros([64], gl.float32, by_row)
    acc = gl.zeros([64, work.D], gl.float32, LAYOUT_O)

    q = work.q.await_full(q_number).reshape([64, work.D])
    if work.Q_IN_REGISTERS:
        q = q.load(gl.DotOperandLayout(0, LAYOUT_S, 2))
        work.q.release(q_number)
    work.k.await_full(used)
    take_turn(CONSUMER)
    scores = score(work, q, used, LAYOUT_S)
    pass_turn((CONSUMER + 1) % work.CONSUMERS)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    work.k.release(used)
    columns = gl.arange(0, work.BLOCK_N, gl.SliceLayout(0, LAYOUT_S))
    weights, peak, total, _ = weigh(scores, peak, total, scale_log2, limit, columns, True)
    used += 1
    for block in range(1, full):
        acc, weights, peak, total = step(work, q, acc, weights, peak, total, scale_log2, limit, block, used,
                                         CONSUMER, LAYOUT_S, LAYOUT_O, False)  # fmt: skip
        used += 1
    for block in range(gl.maximum(full, 1), blocks):
        acc, weights, peak, total = step(work, q, acc, weights, peak, total, scale_log2, limit, block, used,
                                         CONSUMER, LAYOUT_S, LAYOUT_O, True)  # fmt: skip
        used += 1
    if not work.Q_IN_REGISTERS:
        work.q.release(q_number)
    p = gl.convert_layout(weights.to(work.v.buffers.dtype), gl.DotOperandLayout(0, LAYOUT_O, 2))
    acc = warpgroup_mma_wait(0, deps=(add_values(work, acc, p, used - 1),))
    work.v.release(used - 1)
    return acc, total, peak, used


@gluon.jit
def consume(work, target, CONSUMER: gl.constexpr):
    """Compute and store 64 rows of each tile; one warpgroup."""
    out, lse, scale_log2, stride_ob, stride_oh, stride_on, stride_od = target
    LAYOUT_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.BLOCK_N, 16])
    LAYOUT_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, work.D, 16])
    if CONSUMER == work.CONSUMERS - 1:
        pass_turn(0)
    drawn = 0
    used = 0
    tile = work.tiles.receive(drawn)
    while tile < work.all_tiles:
        acc, total, peak, used = attend_tile(work, drawn * work.CONSUMERS + CONSUMER, tile, used, scale_log2,
                                             CONSUMER, LAYOUT_S, LAYOUT_O)  # fmt: skip
        batch, _, head, first, end, _, _, _ = work.locate(tile)
        first += CONSUMER * 64
        row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT_S))
        lse_row = (batch.to(gl.int64) * work.kv_heads * work.group + head) * work.rows + first
        gl.store(lse + lse_row + row, (peak + gl.log2(total)) * 0.6931471805599453, mask=first + row < end)
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, LAYOUT_O))[:, None]
        row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT_O))
        dim = gl.arange(0, work.D, gl.SliceLayout(0, LAYOUT_O))
        origin = batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh + first.to(gl.int64) * stride_on
        pointers = out + origin + (row.to(gl.int64) * stride_on)[:, None] + (dim.to(gl.int64) * stride_od)[None, :]
        gl.store(pointers, acc.to(out.dtype.element_ty), mask=(first + row < end)[:, None])
        drawn += 1
        tile = work.tiles.receive(drawn)
    if CONSUMER == 0:
        take_turn(0)  # the last turn, which nobody else takes


@gluon.jit(do_not_specialize=["rows", "columns", "anchor_tokens", "anchor_rows", "kv_heads", "group", "all_tiles"])
def hopper_flash_kernel(q, k, v, out, lse, counter, scale_log2, rows, columns, anchor_tokens, anchor_rows, kv_heads,
                        group, all_tiles, stride_ob, stride_oh, stride_on, stride_od, CAUSAL: gl.constexpr,
                        D: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
                        Q_IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """Start the warps of one program; `counter` is 0, and `lse` contiguous."""
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, 64, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    tiles, qs = make_channel(numbers, 2, CONSUMERS), make_channel(q_tiles, CONSUMERS, 1)
    ks, vs = make_channel(k_tiles, STAGES, CONSUMERS), make_channel(v_tiles, STAGES, CONSUMERS)
    fence_async_shared()
    work = Work(tiles, qs, ks, vs, rows, columns, anchor_tokens, anchor_rows, kv_heads, group, all_tiles,
                CAUSAL, D, CONSUMERS, BLOCK_N, Q_IN_REGISTERS)  # fmt: skip
    target = (out, lse, scale_log2, stride_ob, stride_oh, stride_on, stride_od)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (work, target, gl.constexpr(0))),
            (consume, (work, target, gl.constexpr(1))),
            (produce, (work, q, k, v, counter)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (work, target, gl.constexpr(0))),
            (consume, (work, target, gl.constexpr(1))),
            (consume, (work, target, gl.constexpr(2))),
            (produce, (work, q, k, v, counter)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
