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

LOG2E = tl.constexpr(1.4426950408889634)
SUBNORMAL = tl.constexpr(16777216.0)
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
        # t: bit 3 of codes below 8. i: place of the level's size, bytes 1 and 2 swapped, so that c and d hold the sizes
        # of two outputs each. a, b: signs of codes at odd and at even places. 0x3C2A1908, 0xAF846850: the eight sizes.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, i, a, b, c, d; "
            "not.b32 t, $4; and.b32 t, t, 0x88888888; shr.b32 a, t, 3; sub.u32 a, t, a; "
            "and.b32 i, $4, 0x77777777; xor.b32 i, i, a; prmt.b32 i, i, 0, 0x3120; "
            "prmt.b32 c, 0x3C2A1908, 0xAF846850, i; shr.b32 i, i, 16; prmt.b32 d, 0x3C2A1908, 0xAF846850, i; "
            "and.b32 a, t, 0x80808080; shl.b32 b, t, 4; and.b32 b, b, 0x80808080; "
            "prmt.b32 $0, c, b, 0x6240; prmt.b32 $1, c, a, 0x6341; "
            "prmt.b32 $2, d, b, 0x7250; prmt.b32 $3, d, a, 0x7351; }",
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
    """Numbers of every fourth channel from each of (B,) `at`, and one, two and three after it on, (B, W) each."""
    word, place = tl.arange(0, W), tl.arange(0, 4)
    here = (word < D // 4)[None, :, None]
    all_four = tl.load(at[:, None, None] + (word[None, :, None] * 4 + place[None, None, :]), mask=here, other=0.0)
    even, odd = tl.split(tl.reshape(all_four, (at.shape[0], W, 2, 2)))
    n0, n2 = tl.split(even)
    n1, n3 = tl.split(odd)
    return n0, n1, n2, n3


@triton.jit
def row_numbers(address, row, inside, DTYPE: tl.constexpr):
    """Numbers of rows from `address` on, in float32. Read as words of 32 bits: the least that is loaded ahead."""
    if tl.float16 == DTYPE:
        at = address + row * 2
        word = tl.load((at & -4).to(tl.pointer_type(tl.uint32)), mask=inside, other=0 if inside is not None else None)
        return (word >> (at & 2).to(tl.uint32) * 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return tl.load(address.to(tl.pointer_type(DTYPE)) + row, mask=inside, other=0.0 if inside is not None else None)


@triton.jit
def laid(x, WIDE: tl.constexpr):
    """(16, W) or (B, H, W) float32 numbers in float16, by adding a product of zeros: so they lie as tensor cores want.

    Else what is made of them in a loop would be moved there at every step.
    """
    if len(x.shape) == 2:
        left, right = tl.zeros((x.shape[0], 16), tl.float16), tl.zeros((16, x.shape[1]), tl.float16)
    else:
        left = tl.zeros((x.shape[0], x.shape[1], 16), tl.float16)
        right = tl.zeros((x.shape[0], 16, x.shape[2]), tl.float16)
    return dot(left, right, x, WIDE).to(tl.float16)


@triton.jit
def scaled(query, scale, low, MIDDLE: tl.constexpr):
    """Queries times key scales in float16, and what each channel adds to every logit besides, in float32."""
    wide = query.to(tl.float32) * scale.to(tl.float32)
    near = tl.minimum(tl.maximum(wide, -60000.0), 60000.0).to(tl.float16)
    # What rounding did to the scaled query is made up for at the middle code.
    return near, query.to(tl.float32) * low.to(tl.float32) + (wide - near.to(tl.float32)) * MIDDLE
