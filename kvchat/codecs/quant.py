"""Codec `k8v8`: 8-bit codes, keys scaled per channel, values per row.

x is written as q = round((x - min) / scale) in 0..255 and read as q * scale + min in float32. Keys have strong fixed
channels (and some models a huge constant key bias), so one scale and min per (layer, head, channel) of the whole
segment lies in its header and serves every rank chunk. Values have no such structure: one scale and min per row, in
the frame.

A scale is rounded up to at most 16 significant bits. So q never passes 255, and q * scale is exact in float32: a fused
and a separate multiply-add give the same bits on every processor.

Letters: L layers, H KV heads, T tokens, N rows of a frame, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.codecs.codec import FrameRows, Take
from kvchat.codecs.frame import Planes, expect
from kvchat.errors import CodecError

_LEVELS = 255
# torch runs an operation on up to so many elements in one thread.
_SERIAL = 32768


class K8V8:
    """Planes key, value (N, D) uint8; value_scale, value_min (N, 1) float16, or float32 if float16 would overflow."""

    # Decompressing 69 MB of codes costs more than reading the tenth that zstd may save.
    bars: Mapping[str, float] = {"key": 0.9, "value": 0.9}

    def row_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Codes, scale and min of one pair."""
        return 2 * head_dim + 8

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Scale and min of each key channel."""
        return dict.fromkeys(("key_scale", "key_min"), (layers, heads, head_dim))

    def read(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Planes, Take]:
        """The whole segment's codes, of which `take` only picks rows."""
        # By head: small enough for one core's cache, and only one head at a time is held in float32.
        key_heads, value_heads = ([head for layer in side for head in layer] for side in (keys, values))
        key_min, key_range = _bounds(key_heads, 0)
        value_min, value_range = _bounds(value_heads, 1)
        for what, extent in (("keys", key_range), ("values", value_range)):
            _refuse_what_does_not_fit(what, extent.reshape(len(keys), -1))
        key_scale = _or_one(_round_up_16_bits(key_range / _LEVELS))
        value_scale, value_min = _row_scales(value_min, value_range)
        planes = {
            "key": _codes(key_heads, key_scale, key_min),
            "value": _codes(value_heads, value_scale.float(), value_min.float()),
            "value_scale": value_scale,
            "value_min": value_min,
        }
        by_row = {name: plane.flatten(0, 1).cpu() for name, plane in planes.items()}

        def take(rows: npt.NDArray[np.int64]) -> Planes:
            index = torch.from_numpy(rows)
            return {name: plane.index_select(0, index).numpy() for name, plane in by_row.items()}

        params = {"key_scale": key_scale, "key_min": key_min}
        shape = (len(keys), len(keys[0]), -1)
        return {name: param.reshape(shape).cpu().numpy() for name, param in params.items()}, take

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values (N, D), computed in float32."""
        num_rows, head_dim = rows.shape
        key, value = (_tensor(expect(planes, name, (num_rows, head_dim), "|u1"), device) for name in ("key", "value"))
        value_scale, value_min = (
            _tensor(expect(planes, name, (num_rows, 1), "<f2", "<f4"), device).float()
            for name in ("value_scale", "value_min")
        )
        key_scale, key_min = (_tensor(params[name].reshape(-1, head_dim), device) for name in ("key_scale", "key_min"))
        head = torch.from_numpy(np.repeat(np.arange(rows.counts.size), rows.counts.reshape(-1))).to(device)
        keys, values = torch.empty((2, num_rows, head_dim), dtype=rows.dtype, device=device)
        # On a CPU in blocks that stay in its cache, each too small for torch to spread over threads: with one more
        # busy process on the machine, a barrier between threads costs more than the whole block.
        block = max(1, _SERIAL // head_dim) if device.type == "cpu" else max(1, num_rows)
        for part in (slice(first, first + block) for first in range(0, num_rows, block)):
            scale, low = key_scale.index_select(0, head[part]), key_min.index_select(0, head[part])
            keys[part] = key[part].float().mul_(scale).add_(low)
            values[part] = value[part].float().mul_(value_scale[part]).add_(value_min[part])
        return keys, values


def _tensor(plane: npt.NDArray[Any], device: torch.device) -> Tensor:
    # A copy, because planes are read-only views of the frame; numpy's, because it stays in this thread.
    return torch.from_numpy(plane.copy()).to(device)


def _bounds(heads: Sequence[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Least value and range over `dim` (kept) of each (T, D) head, stacked, in float32."""
    low = torch.stack([head.amin(dim, keepdim=True) for head in heads]).float()
    high = torch.stack([head.amax(dim, keepdim=True) for head in heads]).float()
    return low, high - low


def _refuse_what_does_not_fit(what: str, extent: Tensor) -> None:
    fits = extent.isfinite().all(1)
    if not bool(fits.all()):
        layer = int((~fits).nonzero()[0])
        raise CodecError(f"{what} of layer {layer} are not finite or span too much for 8 bits: use codec raw")


def _row_scales(low: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and min of each row, both float16 if they fit."""
    low16 = _round_down_half(low)
    # The range grows by what rounding took off the min; a min that overflowed makes it infinite.
    scale16 = -_round_down_half(-(low + extent - low16.float()) / _LEVELS)
    if bool(scale16.isfinite().all()):
        return _or_one(scale16), low16
    return _or_one(_round_up_16_bits(extent / _LEVELS)), low


def _codes(heads: Sequence[Tensor], scale: Tensor, low: Tensor) -> Tensor:
    """(L*H, T, D) uint8."""
    return torch.stack([(head.float() - low[i]).div_(scale[i]).round_().byte() for i, head in enumerate(heads)])


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


def _round_up_16_bits(scale: Tensor) -> Tensor:
    """The next float32, from 0 up, whose significand has 16 bits."""
    return ((scale.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)


def _round_down_half(x: Tensor) -> Tensor:
    """A float16 at or just below x; minus infinity if there is none."""
    near = x.half()
    return torch.where(near.float() > x, (x - x.abs() * 2.0**-10 - 2.0**-24).half(), near)
