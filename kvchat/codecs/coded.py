"""Frames as rows that stay encoded, one `CodedKV` a layer; and the slow way from there to plain rows.

Letters: H KV heads, N rows, D head_dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import CHUNK, FIRST, HEAD, ROWS, START, UNIT, CodedKV, Form
from kvchat.cache.segment import LayerKV
from kvchat.codecs.bits import expand, level_table, row_bytes
from kvchat.codecs.channel import GROUP, ChannelKeys, row_groups
from kvchat.codecs.codec import FrameRows, Method
from kvchat.codecs.encode import open_frame
from kvchat.codecs.frame import Planes, expect
from kvchat.codecs.header import SegmentHeader
from kvchat.codecs.quant import Keys8, Values8, blocks
from kvchat.codecs.rotate import RotatedValues

_CPU = torch.device("cpu")


def coded_frame(
    header: SegmentHeader, chunk: int, group: int, blob: bytes, device: torch.device = _CPU
) -> list[CodedKV]:
    """As `encode.decode_frame`, but what has 8 or 4 bits stays encoded.

    Keys and values of other methods are decoded. Raises CorruptFrame.
    """
    codec, rows, planes, params = open_frame(header, chunk, group, blob)
    form = Form(_bits(codec.keys), _bits(codec.values))
    keys, key_scale, key_min = _keys(codec.keys, form, rows, planes, params)
    values, value_scale, value_min = _values(codec.values, form, rows, planes, params)
    assert rows.positions is not None
    units = _units(form, rows.counts)
    by_row = (keys, values, value_scale, value_min, torch.from_numpy(rows.positions))
    sizes = rows.per_layer.tolist()
    # All layers at once: a segment has many small layers, and each operation or copy costs more than its bytes.
    parts = [plane.to(device).split_with_sizes(sizes if len(plane) else [0] * len(sizes)) for plane in by_row]
    parts += [plane.to(device).split_with_sizes(units.sum(1).tolist()) for plane in (key_scale, key_min)]
    runs = np.empty((*rows.counts.shape, 6), np.int64)
    runs[..., HEAD], runs[..., START], runs[..., CHUNK] = np.arange(runs.shape[1]), header.ranking.start, chunk
    runs[..., FIRST], runs[..., ROWS] = rows.counts.cumsum(1) - rows.counts, rows.counts
    runs[..., UNIT] = units.cumsum(1) - units
    return [
        CodedKV(form, rows.dtype, runs.shape[1], k, v, scale, low, v_scale, v_low, at, of_layer)
        for k, v, v_scale, v_low, at, scale, low, of_layer in zip(*parts, runs, strict=True)
    ]


def decoded(part: CodedKV) -> LayerKV:
    """Plain rows in the model's dtype, where the part lies; equal in every bit to what `decode_frame` gives."""
    keys = part.keys if part.form.key_bits == 16 else _plain_keys(part)
    values = part.values if part.form.value_bits == 16 else _plain_values(part)
    return LayerKV(keys, values, part.positions, torch.from_numpy(part.cu_seqlens).int())


def _plain_keys(part: CodedKV) -> Tensor:
    device, dim, bits = part.keys.device, part.head_dim, part.form.key_bits
    unit = _unit_of_rows(part)
    levels = torch.arange(1 << bits, dtype=torch.float32, device=device)
    table = level_table(levels, bits) if bits == 4 else levels
    keys = torch.empty(len(part.keys), dim, dtype=part.dtype, device=device)
    for some in blocks(keys.shape, device):
        codes = expand(part.keys[some], table, bits, dim) if bits == 4 else part.keys[some].float()
        of = unit[some]
        codes.mul_(part.key_scale.index_select(0, of).float()).add_(part.key_min.index_select(0, of).float())
        keys[some] = codes
    return keys


def _plain_values(part: CodedKV) -> Tensor:
    device, dim = part.values.device, part.head_dim
    values = torch.empty(len(part.values), dim, dtype=part.dtype, device=device)
    scale = part.value_scale.float().unsqueeze(1)
    if part.form.value_bits == 8:
        low = part.value_min.float().unsqueeze(1)
        for some in blocks(values.shape, device):
            values[some] = part.values[some].float().mul_(scale[some]).add_(low[some])
        return values
    return RotatedValues(part.form.value_bits).unrotate(part.values, scale, dim, part.dtype)


def _unit_of_rows(part: CodedKV) -> Tensor:
    """The unit of key scales of every row, (N,)."""
    device = part.keys.device
    first, rows, unit = torch.from_numpy(part.runs[:, [FIRST, ROWS, UNIT]].T.copy()).to(device)
    size = len(part.keys)
    of_rows = torch.repeat_interleave(unit, rows, output_size=size)
    if part.form.key_bits == 4:
        place = torch.arange(size, device=device) - torch.repeat_interleave(first, rows, output_size=size)
        of_rows += place // GROUP
    return of_rows


_KEYS: dict[int, Method] = {8: Keys8(), 4: ChannelKeys(4)}
_VALUES: dict[int, Method] = {8: Values8(), 4: RotatedValues(4)}


def _bits(method: Method) -> int:
    """Bits of a side that can stay encoded, else 16."""
    return next((bits for table in (_KEYS, _VALUES) for bits, known in table.items() if known == method), 16)


def _units(form: Form, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Units of key scales of each layer and head."""
    if form.key_bits == 4:
        groups: npt.NDArray[np.int64] = -(-counts // GROUP)
        return groups
    return np.full_like(counts, 1 if form.key_bits == 8 else 0)


def _keys(method: Method, form: Form, rows: FrameRows, planes: Planes, params: Planes) -> tuple[Tensor, Tensor, Tensor]:
    """Keys as they lie, and their scales and mins, of all layers of a frame."""
    none, dim = torch.zeros(0, rows.head_dim), rows.head_dim
    if form.key_bits == 16:
        return method.decode(planes, params, rows, _CPU), none, none
    packed = _view(expect(planes, "key", (rows.shape[0], row_bytes(dim, form.key_bits)), "|u1"))
    if form.key_bits == 8:
        scale, low = (_view(params[name].reshape(-1, dim)) for name in ("key_scale", "key_min"))
        return packed, scale, low
    groups = row_groups(rows.counts.reshape(-1))[-1:].sum() + 1 if rows.shape[0] else 0
    scale, low = (_view(expect(planes, name, (int(groups), dim), "<f2", "<f4")) for name in ("key_scale", "key_min"))
    return packed, scale, low


def _values(
    method: Method, form: Form, rows: FrameRows, planes: Planes, params: Planes
) -> tuple[Tensor, Tensor, Tensor]:
    """Values as they lie, and their scales and mins, of all layers of a frame."""
    num_rows, none = rows.shape[0], torch.zeros(0)
    if form.value_bits == 16:
        return method.decode(planes, params, rows, _CPU), none, none
    packed = _view(expect(planes, "value", (num_rows, row_bytes(rows.head_dim, form.value_bits)), "|u1"))
    scale = _view(expect(planes, "value_scale", (num_rows, 1), "<f2", "<f4"))[:, 0]
    if form.value_bits == 4:
        return packed, scale, none
    return packed, scale, _view(expect(planes, "value_min", (num_rows, 1), "<f2", "<f4"))[:, 0]


def _view(plane: npt.NDArray[Any]) -> Tensor:
    """A copy, because planes are read-only views of the frame."""
    return torch.from_numpy(plane.copy())
