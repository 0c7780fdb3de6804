"""Triton functions of the decode kernel that make codes and scales what tensor cores read.

Codes are read as 16-bit words, two or four channels each, so that keys and values reach the tensor cores the way plain
half-precision rows do. A code in the low bits of a float16 is that number times 2 ** -24 (a subnormal), exactly; tensor
cores take these at full speed, so a code costs one bitwise operation and the factor is applied to the sum.

Letters: D head_dim, W words of a row (padded to a power of two).
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"
# Triton has a language of its own, of which `if` on a constant and `else` are a part.
# ruff: noqa: RET505

from __future__ import annotations

import triton
import triton.language as tl

HEADS = tl.constexpr(16)
"""Query heads of a group, padded: the least that a tensor core takes."""


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """a @ b + acc in float32. WIDE: the interpreter has no bfloat16 product."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def byte_codes(x, PACKED: tl.constexpr):
    """Low and high byte of each word as float16 times 2 ** -24. PACKED: two words an instruction."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $2, 0x00FF00FF; prmt.b32 $1, $2, 0, 0x4341;",
            "=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return (x & 0xFF).to(tl.float16, bitcast=True), (x >> 8).to(tl.float16, bitcast=True)


@triton.jit
def nibble_codes(x, PACKED: tl.constexpr):
    """The four codes of each word as float16 times 2 ** -24, the second and last of them times 16."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 h; shr.b32 h, $4, 8; and.b32 $0, $4, 0x000F000F; and.b32 $1, $4, 0x00F000F0; "
            "and.b32 $2, h, 0x000F000F; and.b32 $3, h, 0x00F000F0; }",
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        high = x >> 8
        return (
            (x & 0x0F).to(tl.float16, bitcast=True),
            (x & 0xF0).to(tl.float16, bitcast=True),
            (high & 0x0F).to(tl.float16, bitcast=True),
            (high & 0xF0).to(tl.float16, bitcast=True),
        )


@triton.jit
def _level(x, SHIFT: tl.constexpr):
    """Level of the code at bit SHIFT of each word, as float16 times 2 ** -24: see `codecs.rotate`."""
    code = (x >> SHIFT) & 15
    place = tl.where(code < 8, 7 - code, code - 8)
    low = tl.where(place < 2, tl.where(place == 0, 8, 25), tl.where(place == 2, 42, 60))
    high = tl.where(place < 6, tl.where(place == 4, 80, 104), tl.where(place == 6, 132, 175))
    size = tl.where(place < 4, low, high) | tl.where(code < 8, 0x8000, 0)
    return size.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def levels(x, PACKED: tl.constexpr):
    """Levels of the four codes of each word. PACKED: eight codes at once by byte permutation."""
    if PACKED:
        # t: bit 3 of codes below 8. i: place of the level's size. 0x3C2A1908, 0xAF846850: the eight sizes.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, i, a, b, c, d; "
            "not.b32 t, $4; and.b32 t, t, 0x88888888; shr.b32 a, t, 3; sub.u32 a, t, a; "
            "and.b32 i, $4, 0x77777777; xor.b32 i, i, a; "
            "prmt.b32 a, 0x3C2A1908, 0xAF846850, i; shr.b32 i, i, 16; prmt.b32 b, 0x3C2A1908, 0xAF846850, i; "
            "prmt.b32 c, a, b, 0x5410; prmt.b32 d, a, b, 0x7632; "
            "and.b32 a, c, 0x00FF00FF; shl.b32 b, t, 12; and.b32 b, b, 0x80008000; or.b32 $0, a, b; "
            "prmt.b32 a, c, 0, 0x4341; shl.b32 b, t, 8; and.b32 b, b, 0x80008000; or.b32 $1, a, b; "
            "and.b32 a, d, 0x00FF00FF; shl.b32 b, t, 4; and.b32 b, b, 0x80008000; or.b32 $2, a, b; "
            "prmt.b32 a, d, 0, 0x4341; and.b32 b, t, 0x80008000; or.b32 $3, a, b; }",
            "=&r,=&r,=&r,=&r,r",
            [x],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return _level(x, 0), _level(x, 4), _level(x, 8), _level(x, 12)


@triton.jit
def two_parts(at, W: tl.constexpr, D: tl.constexpr):
    """Numbers of the even and of the odd channels from `at` on, (W,) each."""
    word, place = tl.arange(0, W), tl.arange(0, 2)
    both = tl.load(at + (word[:, None] * 2 + place[None, :]), mask=(word < D // 2)[:, None], other=0.0)
    return tl.split(both)


@triton.jit
def four_parts(at, W: tl.constexpr, D: tl.constexpr):
    """Numbers of every fourth channel from `at`, `at` + 1, `at` + 2 and `at` + 3 on, (W,) each."""
    word, place = tl.arange(0, W), tl.arange(0, 4)
    all_four = tl.load(at + (word[:, None] * 4 + place[None, :]), mask=(word < D // 4)[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(all_four, (W, 2, 2)))
    n0, n2 = tl.split(even)
    n1, n3 = tl.split(odd)
    return n0, n1, n2, n3


@triton.jit
def every(query, START: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr):
    """Channels START, START + STEP, ... of (16, PAD) queries, by a product: so they lie as tensor cores want."""
    row, column = tl.arange(0, PAD), tl.arange(0, PAD // STEP)
    chosen = (row[:, None] == column[None, :] * STEP + START).to(tl.float16)
    return dot(query, chosen, tl.zeros((HEADS, PAD // STEP), tl.float32), WIDE).to(tl.float16)


@triton.jit
def columns(low, W: tl.constexpr, TILE: tl.constexpr):
    """Mins of (W,) channels as the keys of TILE rows, all alike."""
    return tl.broadcast_to(low[:, None], (W, TILE))


@triton.jit
def scaled(query, scale, low, MIDDLE: tl.constexpr):
    """A query times key scales in float16, and what each channel adds to every logit besides, in float32."""
    wide = query.to(tl.float32) * scale[None, :].to(tl.float32)
    near = tl.minimum(tl.maximum(wide, -60000.0), 60000.0).to(tl.float16)
    # What rounding did to the scaled query is made up for at the middle code.
    return near, query.to(tl.float32) * low[None, :].to(tl.float32) + (wide - near.to(tl.float32)) * MIDDLE
