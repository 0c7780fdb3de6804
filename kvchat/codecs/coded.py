"""Frames as rows that stay encoded, one `CodedKV` a layer; and the slow way from there to plain rows.

Letters: H KV heads, N rows, D head_dim.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import CodedKV, Form
from kvchat.cache.segment import LayerKV
from kvchat.codecs.bits import row_bytes
from kvchat.codecs.channel import GROUP, ChannelKeys, row_groups
from kvchat.codecs.codec import FrameRows, Method
from kvchat.codecs.encode import open_frame
from kvchat.codecs.frame import Planes, expect
from kvchat.codecs.header import SegmentHeader
from kvchat.codecs.quant import Keys8, Values8
from kvchat.codecs.rotate import RotatedValues, _fixed_point, rotation

_CPU = torch.device("cpu")


def coded_frame(header: SegmentHeader, chunk: int, group: int, blob: bytes) -> list[CodedKV]:
    """As `encode.decode_frame`, on the CPU, but what has 8 or 4 bits stays encoded: views of the frame's bytes.

    Keys and values of other methods are decoded. Raises CorruptFrame.
    """
    codec, rows, planes, params = open_frame(header, chunk, group, blob)
    form = Form(_bits(codec.keys), _bits(codec.values))
    keys, key_scale, key_min = _keys(codec.keys, form, rows, planes, params)
    values, value_scale, value_min = _values(codec.values, form, rows, planes, params)
    assert rows.positions is not None
    last = rows.per_layer.cumsum()
    units = _units(form, rows.counts)
    last_unit = units.sum(1).cumsum()
    layers = []
    for i, counts in enumerate(rows.counts):
        part = slice(int(last[i] - rows.per_layer[i]), int(last[i]))
        of = slice(int(last_unit[i] - units[i].sum()), int(last_unit[i]))
        runs = np.stack(
            [np.arange(len(counts)), counts.cumsum() - counts, counts, units[i].cumsum() - units[i]], axis=1
        )
        layers.append(
            CodedKV(
                form, rows.dtype, len(counts), keys[part], values[part], key_scale[of], key_min[of],
                value_scale[part], value_min[part], torch.from_numpy(rows.positions[part]), runs[counts > 0],
            )
        )  # fmt: skip
    return layers


def decoded(part: CodedKV) -> LayerKV:
    """Plain rows in the model's dtype, equal in every bit to what `decode_frame` gives for the same frame."""
    form, rows = part.form, FrameRows(part.runs[None, :, 2], part.head_dim, part.dtype)
    planes = {
        "key": part.keys, "value": part.values, "key_scale": part.key_scale, "key_min": part.key_min,
        "value_scale": part.value_scale[:, None], "value_min": part.value_min[:, None],
    }  # fmt: skip
    units = part.runs[:, 3]
    if form.key_bits == 4:
        # A run's groups stand together, but runs that `join` put in order may not.
        units = np.concatenate([run[3] + np.arange(-(-run[2] // GROUP)) for run in part.runs] or [units])
    of_units = torch.from_numpy(units).to(part.key_scale.device)
    planes |= {name: planes[name][of_units] for name in ("key_scale", "key_min") if form.key_bits < 16}
    found: Planes = {name: plane.cpu().numpy() for name, plane in planes.items() if plane.dtype != torch.bfloat16}
    device = part.keys.device
    keys = part.keys if form.key_bits == 16 else _KEYS[form.key_bits].decode(found, found, rows, device)
    values = part.values if form.value_bits == 16 else _VALUES[form.value_bits].decode(found, {}, rows, device)
    return LayerKV(keys, values, part.positions, torch.from_numpy(part.cu_seqlens).int())


def back_rotation(head_dim: int, device: torch.device) -> Tensor:
    """What takes rotated values, levels times 64 and the stored scale, back: rows @ it, (D, D) float32."""
    return rotation(head_dim, device).T.contiguous() * _fixed_point(head_dim)


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
    """The plane as a tensor that nobody writes to; torch warns of any that nobody could write to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(plane)
