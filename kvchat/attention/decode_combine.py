"""The Triton kernel that joins the partial results of `decode_kernel`.

Letters: H KV heads, G query heads per KV head, D head_dim.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,assignment"
# Triton has a language of its own, which unpacks nothing within a tuple.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kvchat.attention.decode_codes import LOG2E


@triton.jit
def _largest(lse, first, count, member, G: tl.constexpr, MOST: tl.constexpr):
    """The largest log-sum-exp of `count` slots of one query head from `first` on."""
    slot = tl.arange(0, MOST)
    top = tl.full((MOST,), float("-inf"), tl.float32)
    for start in tl.range(0, count, MOST, loop_unroll_factor=1):
        at = (first + start + slot) * G + member
        top = tl.maximum(top, tl.load(lse + at, mask=start + slot < count, other=float("-inf")))
    return tl.max(top, 0)


@triton.jit
def _sums(
    out, lse, first, count, member, m, column,
    G: tl.constexpr, D: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weights of `count` slots of one query head from `first` on, (SLOTS,), and their weighted rows, (W,), summed."""
    slot = tl.arange(0, SLOTS)
    total = tl.zeros((SLOTS,), tl.float32)
    acc = tl.zeros((SLOTS, column.shape[0]), tl.float32)
    for start in tl.range(0, count, SLOTS, num_stages=STAGES, loop_unroll_factor=1):
        inside = start + slot < count
        at = (first + start + slot) * G + member
        weight = tl.exp2(tl.load(lse + at, mask=inside, other=float("-inf")) - m)
        here = inside[:, None] & (column < D)[None, :]
        rows = tl.load(out + at[:, None].to(tl.int64) * D + column[None, :], mask=here, other=0.0)
        total += weight
        acc += rows * weight[:, None]
    return total, tl.sum(acc, 0)


@triton.jit
def combine(
    out, lse, spans, back, result, result_lse, tail_slot,
    FORMS: tl.constexpr, ROTATED: tl.constexpr, G: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, STAGES: tl.constexpr, WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Join the partial results of one query head; what is rotated is rotated back once. Grid: query heads, PAD / WIDTH.

    `spans` (FORMS, H, 2): first slot and number of slots. Bit i of ROTATED: form i holds rotated values, and WIDTH is
    PAD. `back` (D, D): a rotated row @ back, in the fixed point of `codecs.rotate`, is the row. OVERLAP: launched
    before the partial results are there.
    """
    head = tl.program_id(0)
    kv_head, member = head // G, head % G
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    # All that does not wait for the partial results comes first.
    firsts, counts = (), ()
    for form in tl.static_range(FORMS):
        firsts = firsts + (tl.load(spans + (form * H + kv_head) * 2),)
        counts = counts + (tl.load(spans + (form * H + kv_head) * 2 + 1),)
    if ROTATED and PAD <= 128:
        matrix = _matrix(back, column, D, PAD)
    if OVERLAP:
        gdc_wait()
    at = (tail_slot + kv_head * SPLITS + tl.arange(0, SPLITS)) * G + member
    tail = tl.load(lse + at)
    tail_rows = tl.load(out + at[:, None].to(tl.int64) * D + column[None, :], mask=(column < D)[None, :], other=0.0)
    # The maximum of all comes first, so that sums need no factor on what was before and loads go ahead of their use.
    m = tl.max(tail, 0)
    for form in tl.static_range(FORMS):
        m = tl.maximum(m, _largest(lse, firsts[form], counts[form], member, G, MOST))
    weight = tl.exp2(tail - m)
    total = tl.sum(weight, 0)
    plain = tl.sum(tail_rows * weight[:, None], 0)
    rotated = tl.zeros((WIDTH,), tl.float32)
    for form in tl.static_range(FORMS):
        more, acc = _sums(out, lse, firsts[form], counts[form], member, m, column, G, D, SLOTS, STAGES)
        total += tl.sum(more, 0)
        if (ROTATED >> form) & 1:
            rotated += acc
        else:
            plain += acc
    if ROTATED:
        if PAD > 128:
            matrix = _matrix(back, column, D, PAD)
        plain += tl.sum(rotated[:, None] * matrix, 0)
    tl.store(result + head * D + column, (plain / total).to(result.dtype.element_ty), mask=column < D)
    tl.store(result_lse + head, (m + tl.log2(total)) / LOG2E, mask=tl.program_id(1) == 0)


@triton.jit
def _matrix(back, column, D: tl.constexpr, PAD: tl.constexpr):
    """`back`, padded."""
    row = tl.arange(0, PAD)
    here = (row < D)[:, None] & (column < D)[None, :]
    return tl.load(back + row[:, None] * D + column[None, :], mask=here, other=0.0)
