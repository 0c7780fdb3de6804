"""The Triton kernel that joins the partial results of `decode_kernel`.

Letters: H KV heads, G query heads per KV head, D head_dim.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kvchat.attention.decode_codes import LOG2E


@triton.jit
def _read(out, lse, first, count, slot, head, column, G: tl.constexpr, D: tl.constexpr):
    """Log-sum-exps and rows of slots of one query head, `first` + `slot`, of which there are `count`."""
    inside = slot < count
    part = tl.load(lse + (first + slot) * G + head, mask=inside, other=float("-inf"))
    at = out + ((first + slot) * G + head)[:, None].to(tl.int64) * D + column[None, :]
    return part, tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _fold(part, rows, m, total, acc, other):
    """Add slots to a running sum `acc`; `other` only decays."""
    top = tl.maximum(m, tl.max(part, 0))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight, decay = tl.exp2(part - safe), tl.exp2(m - safe)
    total = total * decay + tl.sum(weight, 0)
    return top, total, acc * decay + tl.sum(rows * weight[:, None], 0), other * decay


@triton.jit
def _gather(out, lse, first, count, head, m, total, acc, other, column, G: tl.constexpr, D: tl.constexpr,
            SLOTS: tl.constexpr):  # fmt: skip
    """Add `count` slots of one query head."""
    slot = tl.arange(0, SLOTS)
    part, rows = _read(out, lse, first, count, slot, head, column, G, D)
    m, total, acc, other = _fold(part, rows, m, total, acc, other)
    for start in tl.range(SLOTS, count, SLOTS):
        part, rows = _read(out, lse, first, count, start + slot, head, column, G, D)
        m, total, acc, other = _fold(part, rows, m, total, acc, other)
    return m, total, acc, other


@triton.jit
def combine(
    out, lse, spans, back, result, result_lse, tail_slot,
    FORMS: tl.constexpr, ROTATED: tl.constexpr, G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Join the partial results of one query head; what is rotated is rotated back once. Grid: query heads, PAD / WIDTH.

    `spans` (FORMS, H, 2): first slot and number of slots. Bit i of ROTATED: form i holds rotated values, and WIDTH is
    PAD. `back` (D, D): a rotated row @ back, in the fixed point of `codecs.rotate`, is the row. OVERLAP: launched
    before the partial results are there.
    """
    if OVERLAP:
        gdc_wait()
    head = tl.program_id(0)
    kv_head, member = head // G, head % G
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    m = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    plain = tl.zeros((WIDTH,), tl.float32)
    rotated = tl.zeros((WIDTH,), tl.float32)
    first = tail_slot + kv_head * SPLITS
    m, total, plain, rotated = _gather(out, lse, first, SPLITS, member, m, total, plain, rotated, column, G, D, SPLITS)
    for form in tl.static_range(FORMS):
        span = spans + (form * H + kv_head) * 2
        first, count = tl.load(span), tl.load(span + 1)
        if (ROTATED >> form) & 1:
            m, total, rotated, plain = _gather(
                out, lse, first, count, member, m, total, rotated, plain, column, G, D, SLOTS
            )
        else:
            m, total, plain, rotated = _gather(
                out, lse, first, count, member, m, total, plain, rotated, column, G, D, SLOTS
            )
    if ROTATED:
        row = tl.arange(0, PAD)
        here = (row < D)[:, None] & (column < D)[None, :]
        matrix = tl.load(back + row[:, None] * D + column[None, :], mask=here, other=0.0)
        plain += tl.sum(rotated[:, None] * matrix, 0)
    tl.store(result + head * D + column, (plain / total).to(result.dtype.element_ty), mask=column < D)
    tl.store(result_lse + head, (m + tl.log2(total)) / LOG2E, mask=tl.program_id(1) == 0)
