"""Triton kernel of a decode step's projections: a matrix times one vector, with what stands before and after it.

Reading the weights is nearly all the time that a step takes. So each program asks for all its weights at once, before
it waits for the kernel that makes its vector: on compute capability 9 that one may still be running (programmatic
dependent launch). Sums are float32 in an order of their own, and rounded where transformers rounds.

Letters: K width of the vector, N rows of a matrix.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvchat.fused.kernels import NONE, Weight, _rounded, _silu, _weighted

PLAIN = tl.constexpr(0)
ADD = tl.constexpr(1)
"""The product is added to another vector."""
GATED = tl.constexpr(2)
"""SiLU of the first matrix's product times the second's."""

THREAD_WEIGHTS = 128
"""Weights that a thread holds: what hides the latency of memory without spilling registers."""
MOST_ROWS = 16
WARPS = 4


@triton.jit
def _weights(matrix, first, ROWS: tl.constexpr, K: tl.constexpr, PAD: tl.constexpr):
    """Rows `first` to `first + ROWS`, (ROWS, PAD)."""
    column = tl.arange(0, PAD)
    at = matrix + first.to(tl.int64) * K + (tl.arange(0, ROWS)[:, None] * K + column[None, :])
    return tl.load(at, mask=(column < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _product(weights, x, bias, first, ROWS: tl.constexpr, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """(ROWS,) float32, rounded."""
    total = tl.sum(weights.to(tl.float32) * x[None, :], 1)
    if BIAS:
        total += tl.load(bias + first + tl.arange(0, ROWS)).to(tl.float32)
    return _rounded(total, DTYPE)


@triton.jit
def _project(
    vector, norm, added, a, b, c, a_bias, b_bias, c_bias, out, eps, a_rows, b_rows,
    K: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS numbers of the result a program: of the matrices one after the other, or of the first two together."""
    DTYPE: tl.constexpr = vector.dtype.element_ty
    if OVERLAP:
        gdc_launch_dependents()
    place = tl.program_id(0) * ROWS
    first, matrix, bias = place, a, a_bias
    if KIND == PLAIN:
        if place >= a_rows + b_rows:
            first, matrix, bias = place - a_rows - b_rows, c, c_bias
        elif place >= a_rows:
            first, matrix, bias = place - a_rows, b, b_bias
    weights = _weights(matrix, first, ROWS, K, PAD)
    if KIND == GATED:
        others = _weights(b, first, ROWS, K, PAD)
    column = tl.arange(0, PAD)
    inside = column < K
    if FORM != NONE:
        scale = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    x = tl.load(vector + column, mask=inside, other=0.0).to(tl.float32)
    if FORM != NONE:
        x = _weighted(x * tl.rsqrt(tl.sum(x * x, 0) / K + eps), scale, FORM, DTYPE)
    result = _product(weights, x, bias, first, ROWS, BIAS, DTYPE)
    if KIND == GATED:
        other = _product(others, x, b_bias, first, ROWS, BIAS, DTYPE)
        result = _silu(result, DTYPE) * other
    at = place + tl.arange(0, ROWS)
    if KIND == ADD:
        result += tl.load(added + at).to(tl.float32)
    tl.store(out + at, result)


def rows_of(width: int, sizes: Sequence[int], matrices: int, warps: int) -> int:
    """Rows a program, a power of two that divides the rows of every matrix; `matrices` are read at once."""
    rows = THREAD_WEIGHTS * 32 * warps // (triton.next_power_of_2(width) * matrices)
    return gcd(max(1, min(MOST_ROWS, rows)), *sizes)


def project(
    vector: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Weight | None = None,
    added: Tensor | None = None,
    gated: bool = False,
    overlap: bool = False,
    warps: int = WARPS,
) -> Tensor:
    """Products of up to three matrices with one vector, one after the other.

    vector   K numbers, contiguous, of which the RMSNorm is taken first if `norm` is given
    weights  (N, K) each, contiguous
    biases   (N,) each, for all or none
    added    a vector to add to the one product
    gated    SiLU of the first product times the second
    overlap  every program waits for the kernel before itself, and lets the next begin; compute capability 9 or newer
    """
    count, width, pad = len(weights), vector.numel(), triton.next_power_of_2(vector.numel())
    assert vector.is_contiguous() and all(weight.is_contiguous() and weight.shape[1] == width for weight in weights)
    assert count == 2 if gated else added is None or count == 1
    sizes = [len(weight) for weight in weights]
    rows = rows_of(width, sizes, 2 if gated else 1, warps)
    total = sizes[0] if gated else sum(sizes)
    out = torch.empty(total, dtype=vector.dtype, device=vector.device)
    a, b, c = (weights[min(index, count - 1)] for index in range(3))
    a_bias, b_bias, c_bias = (biases[min(index, count - 1)] for index in range(3))
    kind = GATED if gated else PLAIN if added is None else ADD
    scale, eps, form = norm or (vector, 0.0, NONE.value)
    _project[(total // rows,)](
        vector, scale, out if added is None else added, a, b, c, a_bias, b_bias, c_bias, out, eps,
        sizes[0], sizes[1] if count > 1 else total,
        K=width, PAD=pad, ROWS=rows, KIND=kind.value, FORM=form, BIAS=a_bias is not None, OVERLAP=overlap,
        num_warps=warps, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
