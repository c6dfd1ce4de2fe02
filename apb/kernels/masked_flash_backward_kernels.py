"""The two kernels of `masked_flash_backward`: a key tile goes down its column, a row tile along its row.

The rows that see a key are one run up to the last row, so both directions are two sweeps, masked and unmasked:

              A      P      B
          ┌──────┬──────┬────────┐
        A │◣     │      │        │      down: ◣ first, some masked row tiles, then ▓ whole row tiles without a mask,
          │▓▓◣   │      │        │      once for each query head that shares the keys
          ├──────┼──────┼────────┤
        B │▓▓▓▓▓▓│▓▓▓▓▓▓│◣       │      along: ▓ first, then ◣, as in the forward pass
          │▓▓▓▓▓▓│▓▓▓▓▓▓│▓▓▓◣    │
          └──────┴──────┴────────┘

Scores, D and P are named there. Rows from `anchor_rows` on see the columns up to row + shift.
"""

import triton
import triton.language as tl

from .masked_flash import load_tile

__all__ = ["grad_keys_kernel", "grad_queries_kernel"]


@triton.jit
def first_row(column, anchor_tokens, anchor_rows, shift):
    """Return the first row that sees a column; all later ones do too."""
    in_block = tl.maximum(column - shift, anchor_rows)
    return tl.where(column < anchor_tokens, column - anchor_tokens + anchor_rows, in_block)


@triton.jit
def sweep_rows(grad_k, grad_v, k_tile, v_tile, q, grad_out, lse, delta, batch, head, group, lo, hi, begin, rows,
               stride_qh, stride_qn, stride_qd, stride_gh, stride_gn, stride_gd, scale_log2,
               D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
               TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Add what the rows [lo, hi) of a group's query heads give to dSᵀ q and Pᵀ gₒ; `begin` is each column's first row.

    Scores are keys × rows. What looks roundabout saves registers, of which there are none to spare: one loop over
    (head of the group, row tile) in place of two, P kept in the inputs' dtype, D loaded late.
    """
    member, start = lo * 0, lo
    for _ in tl.range(0, group * tl.cdiv(hi - lo, BLOCK_M), num_stages=STAGES):
        q_rows, g_rows = q, grad_out
        if not TMA:
            q_rows += member.to(tl.int64) * stride_qh
            g_rows += member.to(tl.int64) * stride_gh
        q_tile = load_tile(q_rows, batch, head + member, start, rows, stride_qn, stride_qd, D, BLOCK_M, BLOCK_D,
                           MASKED, TMA)  # fmt: skip
        g_tile = load_tile(g_rows, batch, head + member, start, rows, stride_gn, stride_gd, D, BLOCK_M, BLOCK_D,
                           MASKED, TMA)  # fmt: skip
        row = start + tl.arange(0, BLOCK_M)
        if MASKED:  # a row behind `hi` gets P = 0
            row_lse = tl.load(lse + member * rows + row, mask=row < hi, other=float("inf"))
        else:
            row_lse = tl.load(lse + member * rows + row)
        scores = tl.dot(k_tile, q_tile.T, input_precision="ieee")
        if MASKED:
            scores = tl.where(row[None, :] >= begin[:, None], scores, float("-inf"))
        weights = tl.exp2(scores * scale_log2 - (row_lse * 1.4426950408889634)[None, :]).to(g_tile.dtype)
        grad_v = tl.dot(weights, g_tile, grad_v, input_precision="ieee")
        grad_weights = tl.dot(v_tile, g_tile.T, input_precision="ieee")
        if MASKED:
            row_delta = tl.load(delta + member * rows + row, mask=row < hi, other=0.0)
        else:
            row_delta = tl.load(delta + member * rows + row)
        grad_scores = weights.to(tl.float32) * (grad_weights - row_delta[None, :])
        grad_k = tl.dot(grad_scores.to(q_tile.dtype), q_tile, grad_k, input_precision="ieee")
        start += BLOCK_M
        member += (start >= hi).to(tl.int32)
        start = tl.where(start >= hi, lo, start)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["rows", "columns", "anchor_tokens", "anchor_rows", "shift", "kv_heads", "group"])
def grad_keys_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, scale, scale_log2,
    rows, columns, anchor_tokens, anchor_rows, shift, kv_heads, group,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_yb, stride_yh, stride_yn, stride_yd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, DIAGONAL_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv (strides x and y) of one key tile of one KV head, over all query heads that share it."""
    tiles = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first = (program % tiles) * BLOCK_N  # the first keys are seen by the most rows
    batch, kv_head = (program // tiles) // kv_heads, (program // tiles) % kv_heads
    last = tl.minimum(first + BLOCK_N, columns) - 1
    lo = tl.maximum(first_row(first, anchor_tokens, anchor_rows, shift), 0)
    full = tl.minimum(tl.maximum(first_row(last, anchor_tokens, anchor_rows, shift), 0), rows)
    full = rows - (rows - full) // BLOCK_M * BLOCK_M  # from here on whole tiles of rows that see all of the keys

    column = first + tl.arange(0, BLOCK_N)
    begin = first_row(column, anchor_tokens, anchor_rows, shift)
    local, dims = tl.arange(0, BLOCK_N)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    inside = (column < columns)[:, None] & (dims < D)
    wide_batch, wide_head, wide_first = batch.to(tl.int64), kv_head.to(tl.int64), first.to(tl.int64)
    k += wide_batch * stride_kb + wide_head * stride_kh + wide_first * stride_kn
    v += wide_batch * stride_vb + wide_head * stride_vh + wide_first * stride_vn
    k_tile = tl.load(k + (local * stride_kn + dims * stride_kd), mask=inside, other=0.0)
    v_tile = tl.load(v + (local * stride_vn + dims * stride_vd), mask=inside, other=0.0)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q_head = kv_head * group
    if not TMA:
        q += wide_batch * stride_qb + q_head.to(tl.int64) * stride_qh
        grad_out += wide_batch * stride_gb + q_head.to(tl.int64) * stride_gh
    plane = (wide_batch * kv_heads * group + q_head) * rows
    acc_k, acc_v = sweep_rows(acc_k, acc_v, k_tile, v_tile, q, grad_out, lse + plane, delta + plane,
                              batch, q_head, group, lo, full, begin, rows,
                              stride_qh, stride_qn, stride_qd, stride_gh, stride_gn, stride_gd, scale_log2,
                              D, BLOCK_M, BLOCK_D, True, TMA, DIAGONAL_STAGES)  # fmt: skip
    acc_k, acc_v = sweep_rows(acc_k, acc_v, k_tile, v_tile, q, grad_out, lse + plane, delta + plane,
                              batch, q_head, group, full, rows, begin, rows,
                              stride_qh, stride_qn, stride_qd, stride_gh, stride_gn, stride_gd, scale_log2,
                              D, BLOCK_M, BLOCK_D, False, TMA, STAGES)  # fmt: skip
    grad_k += wide_batch * stride_xb + wide_head * stride_xh + wide_first * stride_xn
    grad_v += wide_batch * stride_yb + wide_head * stride_yh + wide_first * stride_yn
    tl.store(grad_k + (local * stride_xn + dims * stride_xd), (acc_k * scale).to(k_tile.dtype), mask=inside)
    tl.store(grad_v + (local * stride_yn + dims * stride_yd), acc_v.to(v_tile.dtype), mask=inside)


@triton.jit
def sweep_columns(grad_q, q_tile, g_tile, row_lse, row_delta, k, v, batch, head, lo, hi, limit,
                  stride_kn, stride_kd, stride_vn, stride_vd, scale_log2, D: tl.constexpr, BLOCK_N: tl.constexpr,
                  BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Add what the keys [lo, hi) give to dS k."""
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        k_tile = load_tile(k, batch, head, start, hi, stride_kn, stride_kd, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        v_tile = load_tile(v, batch, head, start, hi, stride_vn, stride_vd, D, BLOCK_N, BLOCK_D, MASKED, TMA)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
        grad_weights = tl.dot(g_tile, v_tile.T, input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[:, None])
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            grad_scores = tl.where(column[None, :] <= limit[:, None], grad_scores, 0.0)
        grad_q = tl.dot(grad_scores.to(k_tile.dtype), k_tile, grad_q, input_precision="ieee")
    return grad_q


@triton.jit(do_not_specialize=["rows", "columns", "anchor_tokens", "anchor_rows", "shift", "kv_heads", "group"])
def grad_queries_kernel(
    q, k, v, grad_out, lse, delta, grad_q, scale, scale_log2,
    rows, columns, anchor_tokens, anchor_rows, shift, kv_heads, group,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_xb, stride_xh, stride_xn, stride_xd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, DIAGONAL_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dq (strides x) of one row tile of one query head; programs in the order of the forward pass."""
    block_tiles = tl.cdiv(rows - anchor_rows, BLOCK_M)
    tiles = block_tiles + tl.cdiv(anchor_rows, BLOCK_M)
    program = tl.program_id(0)
    member, tile = program % group, tiles - 1 - (program // group) % tiles
    batch, kv_head = (program // (group * tiles)) // kv_heads, (program // (group * tiles)) % kv_heads
    q_head = kv_head * group + member
    anchor_tiles = tiles - block_tiles
    if tile < anchor_tiles:
        first, end, beyond = tile * BLOCK_M, anchor_rows, anchor_tokens - anchor_rows
    else:
        first, end, beyond = anchor_rows + (tile - anchor_tiles) * BLOCK_M, rows, shift

    row = first + tl.arange(0, BLOCK_M)
    local, dims = tl.arange(0, BLOCK_M)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    inside = (row < end)[:, None] & (dims < D)
    wide_batch, wide_head, wide_first = batch.to(tl.int64), q_head.to(tl.int64), first.to(tl.int64)
    q += wide_batch * stride_qb + wide_head * stride_qh + wide_first * stride_qn
    grad_out += wide_batch * stride_gb + wide_head * stride_gh + wide_first * stride_gn
    q_tile = tl.load(q + (local * stride_qn + dims * stride_qd), mask=inside, other=0.0)
    g_tile = tl.load(grad_out + (local * stride_gn + dims * stride_gd), mask=inside, other=0.0)
    plane = (wide_batch * kv_heads * group + q_head) * rows
    row_lse = tl.load(lse + plane + row, mask=row < end, other=0.0) * 1.4426950408889634
    row_delta = tl.load(delta + plane + row, mask=row < end, other=0.0)
    if not TMA:
        k += wide_batch * stride_kb + kv_head.to(tl.int64) * stride_kh
        v += wide_batch * stride_vb + kv_head.to(tl.int64) * stride_vh
    limit = tl.minimum(row + beyond, columns - 1)  # the last column that each row sees
    full = tl.minimum(first + beyond + 1, columns) // BLOCK_N * BLOCK_N  # those before it are seen by every row
    hi = tl.minimum(tl.minimum(first + BLOCK_M, end) + beyond, columns)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = sweep_columns(acc, q_tile, g_tile, row_lse, row_delta, k, v, batch, kv_head, 0, full, limit,
                        stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
                        D, BLOCK_N, BLOCK_D, False, TMA, STAGES)  # fmt: skip
    acc = sweep_columns(acc, q_tile, g_tile, row_lse, row_delta, k, v, batch, kv_head, full, hi, limit,
                        stride_kn, stride_kd, stride_vn, stride_vd, scale_log2,
                        D, BLOCK_N, BLOCK_D, True, TMA, DIAGONAL_STAGES)  # fmt: skip
    grad_q += wide_batch * stride_xb + wide_head * stride_xh + wide_first * stride_xn
    tl.store(grad_q + (local * stride_xn + dims * stride_xd), (acc * scale).to(q_tile.dtype), mask=inside)
