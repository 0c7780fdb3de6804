"""Values in 4, 3 or 2 bits: each row rotated, then every number set to the nearest of fixed levels.

This is the mean-squared-error form of TurboQuant (arXiv 2504.19874). Random signs and a Hadamard transform make the
numbers of any row nearly Gaussian; the levels are Lloyd and Max's for a Gaussian; a row stores one scale.

    rotated = (x * signs) @ H / sqrt(B)     H: Hadamard matrix on the diagonal, in blocks of B, the largest power of two
    x       = (level @ H) * signs * scale      that divides D

The levels are integers of at most 8 bits, over 64. So every sum in level @ H is exact in float32, in any order and
even in TF32 or bfloat16 with float32 sums; each number is rounded once, when it is scaled: decoding gives the same
bits on every device and thread count.

Planes: value (N, W) uint8, packed as `bits` says; value_scale (N, 1) float16, or float32 if float16 would overflow.

Letters: L layers, H KV heads, T tokens, N rows of a frame, D head_dim, W bytes of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.codecs.bits import expand, level_table, pack_codes, row_bytes
from kvchat.codecs.codec import Exact, FrameRows, Take, Takes, Tensors
from kvchat.codecs.frame import Planes, expect
from kvchat.codecs.quant import SURE_OF_HALF, blocks, largest_fitting, or_one, to_tensor

_UNIT = 64
# Beyond the last bound between two levels, 153.5.
_REACH = 160
# The positive half of Lloyd and Max's levels for a Gaussian of standard deviation 64.
_POSITIVE = {2: (29, 97), 3: (16, 48, 86, 138), 4: (8, 25, 42, 60, 80, 104, 132, 175)}


@dataclass(frozen=True, slots=True)
class RotatedValues:
    """Values in `bits` bits."""

    bits: int

    @property
    def bars(self) -> Mapping[str, float]:
        """Codes cannot be shrunk."""
        return {"value": 0}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """Codes, and a scale a row."""
        return rows.per_layer * (row_bytes(rows.head_dim, self.bits) + scale_bytes)

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """None: every row stands for itself."""
        return {}

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Nothing yet: rows are quantised when they are taken."""
        largest = largest_fitting("values", exact)

        def takes(first: int, last: int) -> Take:
            group = exact.of_layers(first, last)

            def take(rows: FrameRows, index: Tensor) -> Tensors:
                codes, scale = self._quantise(group.pick(rows, index).float(), largest)
                return {"value": pack_codes(codes, self.bits), "value_scale": scale}

            return take

        return {}, takes

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """Values (N, D), computed in float32."""
        num_rows, head_dim = rows.shape
        packed = to_tensor(expect(planes, "value", (num_rows, row_bytes(head_dim, self.bits)), "|u1"), device)
        scale = to_tensor(expect(planes, "value_scale", (num_rows, 1), "<f2", "<f4"), device).float()
        return self.dequantise(packed, scale, head_dim, rows.dtype)

    def dequantise(self, packed: Tensor, scale: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Rows (N, D) in `dtype` of codes (N, W) and the scales (N, 1) float32 that are stored with them."""
        device = packed.device
        scale = scale * _fixed_point(head_dim)
        table, back = level_table(_levels(self.bits, device), self.bits), rotation(head_dim, device).T.contiguous()
        values = torch.empty(len(packed), head_dim, dtype=dtype, device=device)
        for part in blocks(values.shape, device):
            values[part] = (expand(packed[part], table, self.bits, head_dim) @ back).mul_(scale[part])
        return values

    def _quantise(self, values: Tensor, most: float) -> tuple[Tensor, Tensor]:
        """Codes (N, D) uint8 and scale (N, 1) of values (N, D), no magnitude above `most`.

        A level is on average shorter than what it stands for. The scale makes up for it: the decoded row's projection
        on the exact one is the exact one, so that a weighted sum of rows is not biased towards zero. On real KV that is
        closer than keeping the norm, and much closer than the least error of each row (KL .014, .016, .024 in 2 bits).
        """
        head_dim, device = values.shape[1], values.device
        rotate, unit = rotation(head_dim, device), _block(head_dim) ** 0.5
        code_of, level_of = _nearest(self.bits, device)
        codes = torch.empty(values.shape, dtype=torch.uint8, device=device)
        scale = torch.empty(len(values), 1, device=device)
        for part in blocks(values.shape, device):
            # First by the largest number, so that no square overflows or vanishes.
            largest = or_one(values[part].abs().amax(1, keepdim=True))
            rows = values[part] / largest
            rms = or_one(rows.square().mean(1, keepdim=True).sqrt_())
            rotated = (rows / rms) @ rotate * (_UNIT / unit)
            cell = (2 * rotated).add_(2 * _REACH).clamp_(0, len(code_of) - 1).int().flatten()
            codes[part] = code_of.index_select(0, cell).view(rotated.shape)
            near = level_of.index_select(0, cell).view(rotated.shape)
            along = (rotated * near).sum(1, keepdim=True)
            scale[part] = rotated.square().sum(1, keepdim=True) / or_one(along) * (largest * rms)
        scale /= unit * _UNIT * _fixed_point(head_dim)
        half = scale.half()
        # A scale is at most the magnitude times sqrt(D): few rows are so large that the device must be asked.
        sure = most * head_dim**0.5 <= SURE_OF_HALF
        return codes, half if sure or bool(half.isfinite().all()) else scale


def rotation(head_dim: int, device: torch.device) -> Tensor:
    """Signs and Hadamard blocks as one matrix (D, D) of 1, -1 and 0: rotated rows are rows @ it, over sqrt(B)."""
    channel, block = torch.arange(head_dim, device=device), _block(head_dim)
    both = channel.unsqueeze(1) & channel & block - 1
    odd = torch.zeros_like(both)
    for bit in range(block.bit_length()):
        odd ^= both >> bit & 1
    same_block = channel.unsqueeze(1) // block == channel // block
    signs = 1 - 2 * _sign_bits(channel)
    return ((1 - 2 * odd) * same_block * signs.unsqueeze(1)).float()


def back_rotation(head_dim: int, device: torch.device) -> Tensor:
    """What takes rotated values, levels times 64 and the stored scale, back: rows @ it, (D, D) float32."""
    return rotation(head_dim, device).T.contiguous() * _fixed_point(head_dim)


def _sign_bits(channel: Tensor) -> Tensor:
    """Fixed random bits: the top bit of the finaliser of MurmurHash3, in 32 bits, of channel + 1."""
    mixed = channel + 1
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ mixed >> shift) * factor & 0xFFFFFFFF
    return (mixed ^ mixed >> 16) >> 31


def _block(head_dim: int) -> int:
    """B."""
    return head_dim & -head_dim


def _fixed_point(head_dim: int) -> float:
    """A power of two near 1 / (64 sqrt(B)), so that scales lie near the size of the values."""
    return 2.0 ** -(_block(head_dim).bit_length() // 2) / _UNIT


def _levels(bits: int, device: torch.device) -> Tensor:
    """The 2 ** bits levels times 64, rising, float32."""
    positive = _POSITIVE[bits]
    return torch.tensor([*(-level for level in reversed(positive)), *positive], dtype=torch.float32, device=device)


def _nearest(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Code and level that are nearest to any number of each half from -_REACH to _REACH, both (4 * _REACH,).

    Exact, because levels are integers and the bounds between them thus multiples of a half; and ten times as fast as
    `torch.bucketize`.
    """
    levels = _levels(bits, device)
    middle = torch.arange(0.25 - _REACH, _REACH, 0.5, device=device)
    code = torch.bucketize(middle, (levels[1:] + levels[:-1]) / 2)
    return code.byte(), levels[code]
