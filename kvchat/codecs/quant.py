"""8-bit codes: keys scaled per channel, values per row.

x is written as q = round((x - min) / scale) in 0..255 and read as q * scale + min in float32. Keys have strong fixed
channels (and some models a huge constant key bias), so one scale and min per (layer, head, channel) of the whole
segment lies in its header and serves every rank chunk. Values have no such structure: one scale and min per row, in
the frame.

A scale is rounded up to at most 16 significant bits. So q never passes 255, and q * scale is exact in float32: a fused
and a separate multiply-add give the same bits on every processor.

Letters: L layers, H KV heads, T tokens, N rows of a frame, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.codecs.codec import Exact, FrameRows, Take, Takes, Tensors
from kvchat.codecs.frame import Planes, expect
from kvchat.errors import CodecError

SURE_OF_HALF = 2.0**14
"""Of numbers up to this, ranges, scales and mins fit float16."""

_LEVELS = 255
# torch runs an operation on up to so many elements in one thread.
_SERIAL = 32768


@dataclass(frozen=True, slots=True)
class Keys8:
    """Plane key (N, D) uint8; in the header key_scale, key_min (L, H, D) float32."""

    @property
    def bars(self) -> Mapping[str, float]:
        """Decompressing 69 MB of codes costs more than reading the tenth that zstd may save."""
        return {"key": 0.9}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """Codes."""
        return rows.per_layer * rows.head_dim

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Scale and min of each key channel."""
        return dict.fromkeys(("key_scale", "key_min"), (layers, heads, head_dim))

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Scales of the whole segment; a group's codes are made at once, and rows picked of them."""
        low, extent = _bounds(exact, 1)
        _refuse_unless("keys", _fits(low, extent, exact.layers[0].dtype).flatten(1).all(1))
        scale = or_one(_round_up_16_bits(extent / _LEVELS))

        def takes(first: int, last: int) -> Take:
            return _picking({"key": _codes(exact, scale, low, first, last)})

        return {"key_scale": scale.squeeze(2), "key_min": low.squeeze(2)}, takes

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """Keys (N, D), computed in float32."""
        codes = to_tensor(expect(planes, "key", rows.shape, "|u1"), device)
        scale, low = (to_tensor(params[name].reshape(-1, rows.head_dim), device) for name in ("key_scale", "key_min"))
        head = torch.from_numpy(np.repeat(np.arange(rows.counts.size), rows.counts.reshape(-1))).to(device)
        return self.dequantise(codes, head, scale, low, rows.dtype)

    def dequantise(self, codes: Tensor, unit: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
        """As `by_unit`, of codes (N, D) uint8."""
        return by_unit(lambda part: codes[part].float(), unit, scale, low, dtype)


@dataclass(frozen=True, slots=True)
class Values8:
    """Planes value (N, D) uint8; value_scale, value_min (N, 1) float16, or float32 if float16 would overflow."""

    @property
    def bars(self) -> Mapping[str, float]:
        """As for keys."""
        return {"value": 0.9}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """Codes, and a scale and min a row."""
        return rows.per_layer * (rows.head_dim + 2 * scale_bytes)

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """None: every row stands for itself."""
        return {}

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Scales of all rows; a group's codes are made at once, and rows picked of them."""
        low, extent = _bounds(exact, 2)
        _refuse_unless("values", _fits(low, extent, exact.layers[0].dtype).flatten(1).all(1))
        scale, low = scale_and_min(low, extent, _LEVELS)

        def takes(first: int, last: int) -> Take:
            codes = _codes(exact, scale, low, first, last)
            return _picking({"value": codes, "value_scale": scale[first:last], "value_min": low[first:last]})

        return {}, takes

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """Values (N, D), computed in float32."""
        num_rows, _ = rows.shape
        codes = to_tensor(expect(planes, "value", rows.shape, "|u1"), device)
        scale, low = (
            to_tensor(expect(planes, name, (num_rows, 1), "<f2", "<f4"), device).float()
            for name in ("value_scale", "value_min")
        )
        return self.dequantise(codes, scale, low, rows.dtype)

    def dequantise(self, codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows (N, D) in `dtype` of codes (N, D) uint8, scales and mins (N, 1) float32."""
        values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for part in blocks(codes.shape, codes.device):
            values[part] = codes[part].float().mul_(scale[part]).add_(low[part])
        return values


def by_unit(codes: Callable[[slice], Tensor], unit: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows (N, D) in `dtype` of the float32 codes of some rows, which are used up, and the unit (N,) of each row.

    scale, low: (U, D) float32.
    """
    shape = len(unit), scale.shape[1]
    keys = torch.empty(shape, dtype=dtype, device=scale.device)
    for part in blocks(shape, scale.device):
        of = unit[part]
        keys[part] = codes(part).mul_(scale.index_select(0, of)).add_(low.index_select(0, of))
    return keys


def blocks(shape: Sequence[int], device: torch.device) -> Iterator[slice]:
    """The rows of (N, D) to decode at once.

    On a CPU blocks that stay in its cache, each too small for torch to spread over threads: with one more busy process
    on the machine, a barrier between threads costs more than the whole block.
    """
    num_rows, head_dim = shape
    block = max(1, _SERIAL // head_dim) if device.type == "cpu" else max(1, num_rows)
    return (slice(first, first + block) for first in range(0, num_rows, block))


def to_tensor(plane: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy, because planes are read-only views of the frame; numpy's, because it stays in this thread."""
    return torch.from_numpy(plane.copy()).to(device)


def _picking(planes: Tensors) -> Take:
    """Picks rows of planes (layers, H, T, ...)."""
    by_row = {name: plane.flatten(0, 2) for name, plane in planes.items()}
    return lambda rows, index: {name: plane.index_select(0, index) for name, plane in by_row.items()}


def _bounds(exact: Exact, dim: int) -> tuple[Tensor, Tensor]:
    """Least value and range over `dim` (kept) of each layer's (H, T, D), stacked, in float32."""
    low, high = [], []
    for layer in exact.layers:
        low.append(layer.amin(dim, keepdim=True))
        high.append(layer.amax(dim, keepdim=True))
    least = torch.stack(low).float()
    return least, torch.stack(high).float() - least


def _fits(low: Tensor, extent: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether ranges are finite and stay so when 8 bits are read: scale and min are then off by less than 1/256."""
    largest = torch.maximum(low.abs(), (low + extent).abs())
    return (extent * (1 + 2**-7)).isfinite() & (largest * (1 + 2**-7) <= torch.finfo(dtype).max)


def largest_fitting(what: str, exact: Exact) -> float:
    """The largest magnitude.

    Raises CodecError unless all numbers are finite, with room for the error of few bits: an eighth of the dtype's.
    """
    largest = torch.stack([layer.abs().amax() for layer in exact.layers]).float()
    _refuse_unless(what, largest * 8 <= torch.finfo(exact.layers[0].dtype).max)
    return float(largest.max())


def _refuse_unless(what: str, fits: Tensor) -> None:
    if not bool(fits.all()):
        layer = int((~fits).nonzero()[0])
        raise CodecError(f"{what} of layer {layer} are not finite or span too much to be quantised: use codec raw")


def scale_and_min(low: Tensor, extent: Tensor, levels: int, fits: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and min, for codes 0 .. levels, of ranges that begin at `low`: both float16 if all fit, else float32.

    `fits` says that they do, which else the device is asked.
    """
    low16 = round_down_half(low)
    # The range grows by what rounding took off the min; a min that overflowed makes it infinite.
    scale16 = -round_down_half(-(low + extent - low16.float()) / levels)
    if fits or bool(scale16.isfinite().all()):
        return or_one(scale16), low16
    return or_one(_round_up_16_bits(extent / levels)), low


def _codes(exact: Exact, scale: Tensor, low: Tensor, first: int, last: int) -> Tensor:
    """Of layers [first, last), (layers, H, T, D) uint8, given scale and min of all, (L, H, 1, D) or (L, H, T, 1)."""
    layers = exact.of_layers(first, last).layers
    codes = torch.empty(len(layers), *layers[0].shape, dtype=torch.uint8, device=layers[0].device)
    scale, low = scale[first:last].float(), low[first:last].float()
    parts = [(out, *of) for out, *of in zip(codes, layers, scale, low, strict=True)]
    if codes.device.type == "cpu":  # by head: small enough for one core's cache
        parts = [part for layer in parts for part in zip(*layer, strict=True)]
    for out, numbers, of_scale, of_low in parts:  # only one at a time is held in float32
        out.copy_((numbers.float() - of_low).div_(of_scale).round_())
    return codes


def or_one(scale: Tensor) -> Tensor:
    """1 for 0, to divide by."""
    return torch.where(scale == 0, 1, scale)


def _round_up_16_bits(scale: Tensor) -> Tensor:
    """The next float32, from 0 up, whose significand has 16 bits."""
    return ((scale.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)


def round_down_half(x: Tensor) -> Tensor:
    """A float16 at or just below x; minus infinity if there is none."""
    near = x.half()
    return torch.where(near.float() > x, (x - x.abs() * 2.0**-10 - 2.0**-24).half(), near)
