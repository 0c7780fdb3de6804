"""Triton kernels of one decode step: numbers are float32 inside, and rounded where transformers rounds them.

Without `enable_fp_fusion=False` the compiler joins a product and a sum and leaves the rounding between them out.

Letters: n width of a row, H KV heads, Q query heads, D head_dim, R rotated channels of a head.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NONE = tl.constexpr(0)
WEIGHT = tl.constexpr(1)
"""weight * round(x): Llama and most others."""
ONE_PLUS = tl.constexpr(2)
"""round(x * (1 + weight)): Gemma."""


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _weighted(x, weight, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """A normalised float32 row times its weight."""
    if FORM == ONE_PLUS:
        return _rounded(x * (1.0 + weight), DTYPE)
    return _rounded(_rounded(x, DTYPE) * weight, DTYPE)


@triton.jit
def _rms_norm(
    states, added, weight, total, out, eps, N: tl.constexpr, PAD: tl.constexpr, FORM: tl.constexpr, ADD: tl.constexpr
):
    """One row a program."""
    DTYPE: tl.constexpr = states.dtype.element_ty
    column = tl.arange(0, PAD)
    inside = column < N
    at = tl.program_id(0).to(tl.int64) * N + column
    x = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x = _rounded(x + tl.load(added + at, mask=inside, other=0.0).to(tl.float32), DTYPE)
        tl.store(total + at, x, mask=inside)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, _weighted(x, scale, FORM, DTYPE), mask=inside)


@triton.jit
def _silu(x, DTYPE: tl.constexpr):
    """SiLU of float32, rounded. The plain division gives 0 where the denominator is near float32's largest."""
    return _rounded(tl.div_rn(x, 1.0 + tl.exp(-x)), DTYPE)


@triton.jit
def _silu_mul(gate, up, out, size, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = gate.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, _silu(x, DTYPE) * y, mask=inside)


@triton.jit
def _rotated(x, weight, cos, sin, eps, D: tl.constexpr, PAD: tl.constexpr, R: tl.constexpr, FORM: tl.constexpr):
    """One head after its norm, if there is one, and RoPE: (PAD,) float32, rounded."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    column = tl.arange(0, PAD)
    inside, turns = column < D, column < R
    partner = tl.where(column < R // 2, column + R // 2, column - R // 2)
    own = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=turns, other=0.0).to(tl.float32)
    if FORM != NONE:
        factor = tl.rsqrt(tl.sum(own * own, 0) / D + eps)
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        own = _weighted(own * factor, scale, FORM, DTYPE)
        scale = tl.load(weight + partner, mask=turns, other=0.0).to(tl.float32)
        other = _weighted(other * factor, scale, FORM, DTYPE)
    other = tl.where(column < R // 2, -other, other)
    c = tl.load(cos + column, mask=turns, other=0.0).to(tl.float32)
    s = tl.load(sin + column, mask=turns, other=0.0).to(tl.float32)
    return tl.where(turns, _rounded(own * c, DTYPE) + _rounded(other * s, DTYPE), own)


@triton.jit
def _rotate(
    query, key, value, query_weight, key_weight, cos, sin, row, out, keys, values, stride, query_eps, key_eps,
    Q: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, R: tl.constexpr,
    QUERY_FORM: tl.constexpr, KEY_FORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head a program: the queries, then the keys, then the values."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    column = tl.arange(0, PAD)
    inside = column < D
    if program < Q:
        x = _rotated(query + program * D, query_weight, cos, sin, query_eps, D, PAD, R, QUERY_FORM)
        tl.store(out + program * D + column, x, mask=inside)
    else:
        head = (program - Q) % H
        at = head.to(tl.int64) * stride + tl.load(row) * D + column
        if program < Q + H:
            x = _rotated(key + head * D, key_weight, cos, sin, key_eps, D, PAD, R, KEY_FORM)
            tl.store(keys + at, x, mask=inside)
        else:
            tl.store(values + at, tl.load(value + head * D + column, mask=inside), mask=inside)


def rms_norm(states: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
    """RMSNorm (https://arxiv.org/abs/1910.07467) of (..., n) in `form`."""
    out = torch.empty_like(states, memory_format=torch.contiguous_format)
    _norm(states.contiguous(), None, weight, None, out, eps, form)
    return out


def add_rms_norm(states: Tensor, added: Tensor, weight: Tensor, eps: float, form: int) -> tuple[Tensor, Tensor]:
    """`states + added`, (..., n), and its RMSNorm."""
    total, out = (torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(2))
    _norm(states.contiguous(), added.contiguous(), weight, total, out, eps, form)
    return total, out


def _norm(
    states: Tensor, added: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float, form: int
) -> None:
    width = states.shape[-1]
    pad = triton.next_power_of_2(width)
    _rms_norm[(states.numel() // width,)](
        states, added, weight, total, out, eps, N=width, PAD=pad, FORM=form, ADD=added is not None,
        num_warps=min(16, max(1, pad // 256)), enable_fp_fusion=False,
    )  # fmt: skip


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _silu_mul[(triton.cdiv(gate.numel(), 512),)](
        gate, up, out, gate.numel(), BLOCK=512, num_warps=2, enable_fp_fusion=False
    )
    return out


Weight = tuple[Tensor, float, int]
"""Of a norm: weight, eps, form."""


def rotate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norms: tuple[Weight, Weight] | None,
    rope: tuple[Tensor, Tensor],
    row: Tensor,
    tail: tuple[Tensor, Tensor],
    overlap: bool = False,
) -> Tensor:
    """Norm and RoPE (https://arxiv.org/abs/2104.09864) of one token; its key and value are written to the tail.

    query      Q * D numbers, contiguous; `key` and `value` H * D
    norms      of each head's query and key, or None
    rope       cos and sin, R numbers
    row        (1,) int64: where in the tail
    tail       keys and values, (H, room, D), rows contiguous
    overlap    launch while the kernel before is still running; compute capability 9 or newer

    Returns the queries (Q, 1, D).
    """
    keys, values = tail
    heads, _, dim = keys.shape
    assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
    assert keys.stride() == values.stride() and keys.stride()[1:] == (dim, 1)
    out = torch.empty(query.numel() // dim, 1, dim, dtype=query.dtype, device=query.device)
    cos, sin = (part.contiguous() for part in rope)
    ours, theirs = norms or ((query, 0.0, 0), (key, 0.0, 0))
    _rotate[(len(out) + 2 * heads,)](
        query, key, value, ours[0], theirs[0], cos, sin, row, out, keys, values, keys.stride(0), ours[1], theirs[1],
        Q=len(out), H=heads, D=dim, PAD=triton.next_power_of_2(dim), R=cos.numel(), QUERY_FORM=ours[2],
        KEY_FORM=theirs[2], OVERLAP=overlap, num_warps=1, enable_fp_fusion=False,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
