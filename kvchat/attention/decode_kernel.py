"""Triton kernels of `ragged_decode`: split-KV attention of one new token over rows as they were encoded.

Letters: H KV heads, G query heads per KV head, D head_dim.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from kvchat.attention.decode_codes import (
    HEADS,
    LOG2E,
    SUBNORMAL,
    byte_codes,
    dot,
    laid,
    levels,
    row_numbers,
    scaled,
    two_parts,
)
from kvchat.attention.decode_nibbles import nibble_rows


@triton.jit
def _softmax(logits, m, scale, SOFTCAP: tl.constexpr, inside):
    """One step of the running softmax in base 2: weights of a tile, the new maximum, the factor on what was before."""
    if SOFTCAP > 0:
        power = tl.exp2(logits * (scale * 2.0 * LOG2E / SOFTCAP))
        logits = 1.0 - 2.0 / (power + 1.0)
        factor = SOFTCAP * LOG2E
    else:
        factor = scale * LOG2E
    logits = tl.where(inside[None, :], logits, float("-inf"))
    top = tl.maximum(m, tl.max(logits, 1) * factor)
    safe = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp2(logits * factor - safe[:, None]), top, tl.exp2(m - safe)


@triton.jit
def _store(out, lse, slot, head, column, acc, m, total, G: tl.constexpr, D: tl.constexpr):
    """Write one part of a partial result, (16, W) at channels `column`."""
    inside = (head < G)[:, None] & (column < D)[None, :]
    at = out + (slot * G + head)[:, None].to(tl.int64) * D + column[None, :]
    tl.store(at, acc, mask=inside)
    tl.store(
        lse + slot * G + head,
        tl.where(total > 0, m + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")),
        mask=head < G,
    )


@triton.jit
def _tail(
    query, keys, values, length, out, lse, slot, head, kv_head, part, stride, scale,
    G: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One share of one head's tail."""
    column, row = tl.arange(0, PAD), tl.arange(0, TILE)
    total_rows = tl.load(length)
    share = tl.cdiv(tl.cdiv(total_rows, SPLITS), TILE) * TILE
    first = part * share
    last = tl.minimum(first + share, total_rows)
    here = (head < G)[:, None] & (column < D)[None, :]
    q = tl.load(query + (kv_head * G + head)[:, None] * D + column[None, :], mask=here, other=0.0)
    keys += kv_head.to(tl.int64) * stride
    values += kv_head.to(tl.int64) * stride
    m = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, PAD), tl.float32)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        inside = start + row < last
        at = (start + row) * D
        k = tl.load(keys + at[None, :] + column[:, None], mask=inside[None, :] & (column < D)[:, None], other=0.0)
        v = tl.load(values + at[:, None] + column[None, :], mask=inside[:, None] & (column < D)[None, :], other=0.0)
        logits = dot(q, k, tl.zeros((HEADS, TILE), tl.float32), WIDE)
        p, m, decay = _softmax(logits, m, scale, SOFTCAP, inside)
        total = total * decay + tl.sum(p, 1)
        acc = dot(p.to(v.dtype), v, acc * decay[:, None], WIDE)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    _store(out, lse, slot, head, column, acc * share[:, None], m, total, G, D)


@triton.jit
def attend_rows(
    query, addresses, boosts, programs, starts, tiles, tail_keys, tail_values, tail_length, out, lse,
    tail_programs, first_slot, tail_slot, tail_stride, scale,
    FORM: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, SCALE: tl.constexpr,
    VALUE_SCALE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, TAIL_TILE: tl.constexpr, TAIL_STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Partial results of the tail's shares, which are short and so come first, and of one form's programs.

    `programs`: as `WorkList.bounds`. Grid: programs, heads / 16.
    """
    if OVERLAP:
        gdc_launch_dependents()
    share = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    if share < tail_programs:
        _tail(
            query, tail_keys, tail_values, tail_length, out, lse, tail_slot + share, head, share // SPLITS,
            share % SPLITS, tail_stride, scale, G, D, PAD, SPLITS, TAIL_TILE, TAIL_STAGES, SOFTCAP, WIDE,
        )  # fmt: skip
    else:
        program = share - tail_programs
        # What does not wait for another is asked for at once.
        place = addresses + FORM * 6
        places = (
            tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3), tl.load(place + 4),
            tl.load(place + 5), tl.load(boosts + FORM), tl.load(starts + program),
        )  # fmt: skip
        first = tl.load(programs + program * 3)
        last = tl.load(programs + program * 3 + 1)
        queries = query + tl.load(programs + program * 3 + 2) * G * D
        # No branch on whether there is work: loads that follow one would wait for its condition.
        if KEY_BITS == 4:
            fewer = tl.program_id(1) * HEADS + tl.arange(0, 8 if G <= 8 else 16)
            nibble_rows(
                queries, places, tiles, first, last, out, lse, first_slot + program, fewer, scale,
                SCALE, VALUE_SCALE, G, D, PAD, TILE, STAGES, SOFTCAP, PACKED, WIDE,
            )  # fmt: skip
        else:
            _sealed(
                queries, places, tiles, first, last, out, lse, first_slot + program, head, scale,
                KEY_BITS, VALUE_BITS, SCALE, VALUE_SCALE, G, D, PAD, TILE, STAGES, SOFTCAP, PACKED, WIDE,
            )  # fmt: skip


@triton.jit
def _sealed(
    query, places, tiles, first, last, out, lse, slot, head, scale,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, SCALE: tl.constexpr, VALUE_SCALE: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Running softmax of one head's queries over rows `first` to `last` where keys are plain, else over tiles.

    `places`: addresses of the six planes, boost and the first tile. `tiles`: as `WorkList.words`, one load a tile,
    because a load that waits for another needs two stages.
    """
    STEP: tl.constexpr = TILE if KEY_BITS == 16 else 1
    KEY_PARTS: tl.constexpr = 16 // KEY_BITS
    VALUE_PARTS: tl.constexpr = 16 // VALUE_BITS
    KW: tl.constexpr = PAD // KEY_PARTS
    VW: tl.constexpr = PAD // VALUE_PARTS
    DTYPE: tl.constexpr = query.dtype.element_ty
    KEY_WORD: tl.constexpr = DTYPE if KEY_BITS == 16 else tl.uint16
    VALUE_WORD: tl.constexpr = DTYPE if VALUE_BITS == 16 else tl.uint16
    # Tensors lie elsewhere after every seal, and a captured graph does not: so their addresses are data.
    keys, values, key_scale, key_min, value_scale, value_min, boost, ahead = places
    keys = tl.multiple_of(keys.to(tl.pointer_type(KEY_WORD)), 16)
    values = tl.multiple_of(values.to(tl.pointer_type(VALUE_WORD)), 16)
    key_scale = tl.multiple_of(key_scale.to(tl.pointer_type(SCALE)), 16)
    key_min = tl.multiple_of(key_min.to(tl.pointer_type(SCALE)), 16)

    row, kw, vw, column = tl.arange(0, TILE), tl.arange(0, KW), tl.arange(0, VW), tl.arange(0, PAD)
    k_here, v_here = kw < D // KEY_PARTS, vw < D // VALUE_PARTS
    if KEY_BITS == 16:
        q_here = (head < G)[:, None] & (column < D)[None, :]
        q0 = tl.load(query + head[:, None] * D + column[None, :], mask=q_here, other=0.0)
    else:
        pair = kw[:, None] * 2 + tl.arange(0, 2)[None, :]
        q_here = (head < G)[:, None, None] & (pair < D)[None, :, :]
        both = tl.load(query + head[:, None, None] * D + pair[None, :, :], mask=q_here, other=0.0)
        q0, q1 = tl.split(both.to(tl.float32))
        q0, q1 = laid(q0, WIDE), laid(q1, WIDE)

    m = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    offset = tl.zeros((HEADS,), tl.float32)
    a0 = tl.zeros((HEADS, VW), tl.float32)
    a1 = tl.zeros((HEADS, VW), tl.float32)
    a2 = tl.zeros((HEADS, VW), tl.float32)
    a3 = tl.zeros((HEADS, VW), tl.float32)
    if KEY_BITS < 16:
        # Of the unit that the last tile had: most tiles have the same.
        scaled_by = tl.full((), -1, tl.int64)
        s0, s1, sums = q0, q1, total
    for step in tl.range(first, last, STEP, num_stages=STAGES):
        if KEY_BITS == 16:
            start = first.to(tl.int64) + (step - first)
            inside = row < last - step
        else:
            tile = ahead
            ahead = tl.load(tiles + tl.minimum(step + 1, last - 1))
            start = tile >> 32
            inside = row < (tile & 0xFF).to(tl.int32)
            unit = (tile >> 8 & 0xFFFFFF) * D
        at = keys + start * (D // KEY_PARTS) + (kw[:, None] + row[None, :] * (D // KEY_PARTS))
        k = tl.load(at, mask=inside[None, :] & k_here[:, None], other=0)
        at = values + start * (D // VALUE_PARTS) + (vw[None, :] + row[:, None] * (D // VALUE_PARTS))
        v = tl.load(at, mask=inside[:, None] & v_here[None, :], other=0)

        zero = tl.zeros((HEADS, TILE), tl.float32)
        if KEY_BITS == 16:
            logits = dot(q0, k, zero, WIDE)
        else:
            z0, z1 = two_parts(key_scale + unit, KW, D)
            l0, l1 = two_parts(key_min + unit, KW, D)
            k0, k1 = byte_codes(k, PACKED)
            if unit != scaled_by:
                s0, c0 = scaled(q0, z0[None, :], l0[None, :], 128.0)
                s1, c1 = scaled(q1, z1[None, :], l1[None, :], 128.0)
                sums = tl.sum(c0 + c1, 1)
                scaled_by = unit
            logits = dot(s1, k1, dot(s0, k0, zero, WIDE), WIDE) * SUBNORMAL + sums[:, None]
        p, m, decay = _softmax(logits, m, scale, SOFTCAP, inside)
        total = total * decay + tl.sum(p, 1)

        if VALUE_BITS == 16:
            a0 = dot(p.to(DTYPE), v, a0 * decay[:, None], WIDE)
        else:
            by_row = row_numbers(value_scale, start + row, inside, VALUE_SCALE) * boost
            weights = (p * by_row[None, :]).to(tl.float16)
            if VALUE_BITS == 8:
                low = row_numbers(value_min, start + row, inside, VALUE_SCALE)
                offset = offset * decay + tl.sum(p * low[None, :], 1)
                v0, v1 = byte_codes(v, PACKED)
            else:
                v0, v1, v2, v3 = levels(v, PACKED)
                a2 = dot(weights, v2, a2 * decay[:, None], WIDE)
                a3 = dot(weights, v3, a3 * decay[:, None], WIDE)
            a0 = dot(weights, v0, a0 * decay[:, None], WIDE)
            a1 = dot(weights, v1, a1 * decay[:, None], WIDE)

    # A program without work writes nothing.
    head = tl.where(first < last, head, G)
    share = 1.0 / tl.where(total > 0, total, 1.0)
    factor = share if VALUE_BITS == 16 else share * (SUBNORMAL / boost)
    add = (offset * share)[:, None]
    column = vw * VALUE_PARTS
    _store(out, lse, slot, head, column, a0 * factor[:, None] + add, m, total, G, D)
    if VALUE_BITS < 16:
        _store(out, lse, slot, head, column + 1, a1 * factor[:, None] + add, m, total, G, D)
    if VALUE_BITS == 4:
        _store(out, lse, slot, head, column + 2, a2 * factor[:, None], m, total, G, D)
        _store(out, lse, slot, head, column + 3, a3 * factor[:, None], m, total, G, D)
