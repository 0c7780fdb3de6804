"""The part of `decode_kernel` that reads rows of 4 bits a number.

Every warp takes a group of 32 rows of its own, with a running softmax of its own; they meet after the last row alone.
Rows stand on the side of the tensor cores that takes 16 at a time and query heads on the side that takes 8, so that a
few heads waste little and accumulators take half the registers: more warps are under way at once.

Letters: B groups of a step, one a warp, H query heads of a program (8 or 16), D head_dim, W words of a row (D / 4,
padded to a power of two).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# Triton has a language of its own, of which `if` on a constant and `else` are a part.
# ruff: noqa: RET505

from __future__ import annotations

import triton
import triton.language as tl

from kvchat.attention.decode_codes import (
    LOG2E,
    SUBNORMAL,
    dot,
    four_parts,
    laid,
    levels,
    nibble_codes,
    row_numbers,
    scaled,
)

ROWS = tl.constexpr(32)
"""Rows that share a key scale."""
LOWEST = tl.constexpr(-1e30)
"""Below every logit; finite, so that groups without rows need no care."""


@triton.jit
def nibble_rows(
    query, places, tiles, first, last, out, lse, slot, head, scale,
    SCALE: tl.constexpr, VALUE_SCALE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Running softmax of one head's queries over tiles `first` to `last`, of B groups or fewer each.

    query: of query head 0. head: (H,). places, tiles: see `_sealed` of `decode_kernel`.
    """
    B: tl.constexpr = TILE // ROWS
    W: tl.constexpr = PAD // 4
    H: tl.constexpr = head.shape[0]
    # Tensors lie elsewhere after every seal, and a captured graph does not: so their addresses are data.
    keys, values, key_scale, key_min, value_scale, _, boost, ahead = places
    keys = tl.multiple_of(keys.to(tl.pointer_type(tl.uint16)), 16)
    values = tl.multiple_of(values.to(tl.pointer_type(tl.uint16)), 16)
    key_scale = tl.multiple_of(key_scale.to(tl.pointer_type(SCALE)), 16)
    key_min = tl.multiple_of(key_min.to(tl.pointer_type(SCALE)), 16)

    q0, q1, q2, q3 = _queries(query, head, B, G, D, W, WIDE)
    group = tl.arange(0, B)
    row, word = group[:, None] * ROWS + tl.arange(0, ROWS)[None, :], tl.arange(0, W)
    zero = tl.zeros((B, ROWS, H), tl.float32)
    m = tl.full((B, H), LOWEST, tl.float32)
    total = tl.zeros((B, 8, H), tl.float32)
    a0 = tl.zeros((B, W, H), tl.float32)
    a1 = tl.zeros((B, W, H), tl.float32)
    a2 = tl.zeros((B, W, H), tl.float32)
    a3 = tl.zeros((B, W, H), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        tile = ahead
        ahead = tl.load(tiles + tl.minimum(step + 1, last - 1))
        start = tile >> 32
        count = (tile & 0xFF).to(tl.int32)
        # The last row and its group stand in for those that are not there: loads without a mask are cheaper.
        near = tl.minimum(row, count - 1)
        unit = ((tile >> 8 & 0xFFFFFF) * D) + tl.minimum(group, (count - 1) // ROWS) * D
        at = near[:, :, None] * (D // 4) + word[None, None, :]
        k = tl.load(keys + start * (D // 4) + at, mask=(word < D // 4)[None, None, :], other=0)
        at = near[:, None, :] * (D // 4) + word[None, :, None]
        v = tl.load(values + start * (D // 4) + at, mask=(word < D // 4)[None, :, None], other=0)
        by_row = row_numbers(value_scale, start + near, None, VALUE_SCALE) * boost

        s0, s1, s2, s3 = four_parts(key_scale + unit, W, D)
        l0, l1, l2, l3 = four_parts(key_min + unit, W, D)
        if tl.float16 == SCALE:
            constant = dot(_alike(l1), q1, zero, WIDE)
            constant = dot(_alike(l3), q3, constant, WIDE) * 16.0
            constant = dot(_alike(l0), q0, constant, WIDE)
            constant = dot(_alike(l2), q2, constant, WIDE)
            s0, s1 = q0 * s0[:, :, None], q1 * s1[:, :, None]
            s2, s3 = q2 * s2[:, :, None], q3 * s3[:, :, None]
        else:
            s0, c0 = scaled(q0, s0[:, :, None], l0[:, :, None], 8.0)
            s1, c1 = scaled(q1, s1[:, :, None], l1[:, :, None], 8.0)
            s2, c2 = scaled(q2, s2[:, :, None], l2[:, :, None], 8.0)
            s3, c3 = scaled(q3, s3[:, :, None], l3[:, :, None], 8.0)
            constant = tl.sum((c0 + c2) + (c1 + c3) * 16.0, 1)[:, None, :]
        k0, k1, k2, k3 = nibble_codes(k, PACKED)
        codes = dot(k1, s1, dot(k0, s0, zero, WIDE), WIDE)
        codes = dot(k3, s3, dot(k2, s2, codes, WIDE), WIDE)
        logits = tl.where((row < count)[:, :, None], _logits(codes, constant, scale, SOFTCAP), float("-inf"))

        top = tl.maximum(m, tl.max(logits, 1))
        decay = tl.exp2(m - top)[:, None, :]
        m = top
        p = tl.exp2(logits - top[:, None, :])
        total = total * decay + tl.sum(tl.reshape(p, (B, ROWS // 8, 8, H)), 1)
        weights = (p * by_row[:, :, None]).to(tl.float16)
        v0, v1, v2, v3 = levels(v, PACKED)
        a0 = dot(v0, weights, a0 * decay, WIDE)
        a1 = dot(v1, weights, a1 * decay, WIDE)
        a2 = dot(v2, weights, a2 * decay, WIDE)
        a3 = dot(v3, weights, a3 * decay, WIDE)

    # A program without work writes nothing.
    head = tl.where(first < last, head, G)
    top = _joined(m, B, True)
    decay = tl.exp2(m - top[None, :])
    sums = _joined(tl.sum(total, 1) * decay, B, False)
    sums = tl.where(first < last, sums, 1.0)
    # Channels of a word are neighbours.
    rows = tl.join(tl.join(a0, a2), tl.join(a1, a3)) * decay[:, None, :, None, None]
    rows = _joined(rows, B, False) * (1.0 / (sums * boost) * SUBNORMAL)[None, :, None, None]
    number = (slot * G + head)[None, :, None, None].to(tl.int64)
    channel = _channels(word)
    here = (head < G)[None, :, None, None] & (channel < D)
    tl.store(out + number * D + channel, rows, mask=here)
    tl.store(lse + slot * G + head, top + tl.log2(sums), mask=head < G)


@triton.jit
def _joined(x, B: tl.constexpr, LARGEST: tl.constexpr):
    """Maximum or sum over the first dimension, of B. Halves are split: so each thread gets all of its own at once."""
    if B == 1:
        return tl.reshape(x, x.shape[1:])
    else:
        if len(x.shape) == 2:
            x = tl.permute(tl.reshape(x, (2, B // 2, x.shape[1])), (1, 2, 0))
        else:
            x = tl.permute(tl.reshape(x, (2, B // 2, x.shape[1], x.shape[2], 2, 2)), (1, 2, 3, 4, 5, 0))
        low, high = tl.split(x)
        return _joined(tl.maximum(low, high) if LARGEST else low + high, B // 2, LARGEST)


@triton.jit
def _channels(word):
    """Numbers of the channels of (W,) words, (W, 1, 2, 2)."""
    two = tl.arange(0, 2)
    return word[:, None, None, None] * 4 + two[None, None, :, None] * 2 + two[None, None, None, :]


@triton.jit
def _queries(query, head, B: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """Every fourth channel of the queries, from 0, 1, 2 and 3 on, (B, W, H) each, in float16.

    The second and last are over 16, for `nibble_codes` leaves their codes four bits higher.
    """
    channel, number = _channels(tl.arange(0, W)), head[None, :, None, None]
    all_four = tl.load(query + number * D + channel, mask=(number < G) & (channel < D), other=0.0).to(tl.float32)
    even, odd = tl.split(all_four)
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    return _turned(q0, B, WIDE), _turned(q1 * 0.0625, B, WIDE), _turned(q2, B, WIDE), _turned(q3 * 0.0625, B, WIDE)


@triton.jit
def _turned(x, B: tl.constexpr, WIDE: tl.constexpr):
    """(W, H) queries B times, (B, W, H)."""
    whole = tl.broadcast_to(tl.trans(x)[None, :, :], (B, x.shape[1], x.shape[0]))
    return tl.trans(laid(whole, WIDE), 0, 2, 1)


@triton.jit
def _logits(codes, constant, scale, SOFTCAP: tl.constexpr):
    """Logits in base 2."""
    if SOFTCAP > 0:
        power = tl.exp2((codes * SUBNORMAL + constant) * (scale * 2.0 * LOG2E / SOFTCAP))
        return (1.0 - 2.0 / (power + 1.0)) * (SOFTCAP * LOG2E)
    else:
        return codes * (scale * SUBNORMAL * LOG2E) + constant * (scale * LOG2E)


@triton.jit
def _alike(low):
    """Mins of (B, W) channels as the keys of all rows."""
    return tl.broadcast_to(low[:, None, :], (low.shape[0], ROWS, low.shape[1]))
