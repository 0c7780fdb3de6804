"""Frames as rows that stay encoded, one `CodedKV` a layer; and the slow way from there to plain rows.

A frame that was read and one that is still to be written give the same rows: what stands in a frame's planes lies in
memory as it is.

Letters: H KV heads, N rows, D head_dim.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import CHUNK, FIRST, GROUP, HEAD, ROWS, START, UNIT, CodedKV, Form
from kvchat.cache.segment import LayerKV
from kvchat.codecs.bits import row_bytes
from kvchat.codecs.channel import ChannelKeys
from kvchat.codecs.codec import Codec, FrameRows, Method
from kvchat.codecs.encode import Reading, Taken, open_frame
from kvchat.codecs.frame import Planes, expect
from kvchat.codecs.header import SegmentHeader
from kvchat.codecs.quant import Keys8, Values8, to_tensor
from kvchat.codecs.rotate import RotatedValues

Side = tuple[Tensor, Tensor, Tensor]
"""Keys or values as they lie, their scales and mins, of all layers of a frame."""

_CPU = torch.device("cpu")
_UNIT_PLANES, _ROW_PLANES = ("key_scale", "key_min"), ("value_scale", "value_min")


def coded_frame(header: SegmentHeader, chunk: int, group: int, blob: bytes) -> list[CodedKV]:
    """As `encode.decode_frame`, but what has 8 or 4 bits stays encoded, and all lies in host memory.

    Keys and values of other methods are decoded. Raises CorruptFrame.
    """
    codec, rows, planes, params = open_frame(header, chunk, group, blob)
    form, units = _form(codec), _units(_form(codec), rows.counts)
    keys = _keys(codec.keys, form, rows, planes, params, int(units.sum()))
    values = _values(codec.values, form, rows, planes, params)
    assert rows.positions is not None
    positions = torch.from_numpy(rows.positions)
    return _layers(form, rows, units, (header.ranking.start, chunk), keys, values, positions)


def coded_planes(reading: Reading, taken: Taken) -> list[CodedKV]:
    """The rows of a frame that is not packed yet, where its planes lie; equal in every bit to what `coded_frame` gives.

    Whatever does not stay encoded is decoded by way of the CPU.
    """
    header, rows, planes, device = reading.header, taken.rows, taken.planes, taken.index.device
    codec, (first, last) = header.method(taken.chunk), header.layers(taken.group)
    form, units = _form(codec), _units(_form(codec), rows.counts)
    none = torch.zeros(0, device=device)
    if form.key_bits == 16:
        packed, scale = _plain(codec.keys, taken), torch.zeros(0, rows.head_dim, device=device)
        keys = packed, scale, scale
    else:
        of_units = planes if form.key_bits == 4 else {name: reading.params[name][first:last] for name in _UNIT_PLANES}
        scale, low = (of_units[name].reshape(-1, rows.head_dim) for name in _UNIT_PLANES)
        keys = planes["key"], scale, low
    if form.value_bits == 16:
        values = _plain(codec.values, taken), none, none
    else:
        scale, low = (planes[name][:, 0] if name in planes else none for name in _ROW_PLANES)
        values = planes["value"], scale, low
    start, tokens = header.ranking.start, header.ranking.chunk_of.shape[2]
    return _layers(form, rows, units, (start, taken.chunk), keys, values, (taken.index % tokens + start).int())


def _plain(method: Method, taken: Taken) -> Tensor:
    """Keys or values as numbers, computed from the planes as they would be read."""
    planes = {name: plane.cpu().numpy() for name, plane in taken.planes.items()}
    return method.decode(planes, {}, taken.rows, taken.index.device)


def _layers(
    form: Form,
    rows: FrameRows,
    units: npt.NDArray[np.int64],
    place: tuple[int, int],
    keys: Side,
    values: Side,
    positions: Tensor,
) -> list[CodedKV]:
    """The layers of a frame, given all their rows; `place` is the start of the segment and the rank chunk."""
    by_row, of_units, sizes = (keys[0], *values, positions), keys[1:], rows.per_layer.tolist()
    # All layers at once: a segment has many small layers, and each operation or copy costs more than its bytes.
    parts = [plane.split_with_sizes(sizes if len(plane) else [0] * len(sizes)) for plane in by_row]
    parts += [plane.split_with_sizes(units.sum(1).tolist()) for plane in of_units]
    runs = np.empty((*rows.counts.shape, 6), np.int64)
    runs[..., HEAD], runs[..., [START, CHUNK]] = np.arange(runs.shape[1]), place
    runs[..., FIRST], runs[..., ROWS] = rows.counts.cumsum(1) - rows.counts, rows.counts
    runs[..., UNIT] = units.cumsum(1) - units
    return [
        CodedKV(form, rows.dtype, runs.shape[1], k, v, scale, low, v_scale, v_low, at, of_layer)
        for k, v, v_scale, v_low, at, scale, low, of_layer in zip(*parts, runs, strict=True)
    ]


def decoded(part: CodedKV) -> LayerKV:
    """Plain rows in the model's dtype, where the part lies; equal in every bit to what `decode_frame` gives."""
    keys, values, (key_bits, value_bits) = part.keys, part.values, part.form
    if key_bits < 16:
        unit, scale, low = _unit_of_rows(part), part.key_scale.float(), part.key_min.float()
        keys = _KEYS[key_bits].dequantise(keys, unit, scale, low, part.dtype)
    scale = part.value_scale.float().unsqueeze(1)
    if value_bits == 8:
        values = _VALUES8.dequantise(values, scale, part.value_min.float().unsqueeze(1), part.dtype)
    elif value_bits == 4:
        values = _VALUES4.dequantise(values, scale, part.head_dim, part.dtype)
    return LayerKV(keys, values, part.positions, part.cu_seqlens)


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


_KEYS: dict[int, Keys8 | ChannelKeys] = {8: Keys8(), 4: ChannelKeys(4)}
_VALUES8, _VALUES4 = Values8(), RotatedValues(4)


def _form(codec: Codec) -> Form:
    """What stays encoded of a codec's rows."""
    return Form(_bits(codec.keys), _bits(codec.values))


def _bits(method: Method) -> int:
    """Bits of a side that can stay encoded, else 16."""
    known: dict[Method, int] = {_KEYS[8]: 8, _VALUES8: 8, _KEYS[4]: 4, _VALUES4: 4}
    return known.get(method, 16)


def _units(form: Form, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Units of key scales of each layer and head."""
    if form.key_bits == 4:
        groups: npt.NDArray[np.int64] = -(-counts // GROUP)
        return groups
    return np.full_like(counts, 1 if form.key_bits == 8 else 0)


def _keys(
    method: Method,
    form: Form,
    rows: FrameRows,
    planes: Planes,
    params: Planes,
    num_units: int,
) -> Side:
    """Keys as they lie, and their scales and mins, of all layers of a frame."""
    dim = rows.head_dim
    if form.key_bits == 16:
        none = torch.zeros(0, dim)
        return method.decode(planes, params, rows, _CPU), none, none
    packed = to_tensor(expect(planes, "key", (rows.shape[0], row_bytes(dim, form.key_bits)), "|u1"), _CPU)
    if form.key_bits == 8:
        of_units = [params[name].reshape(-1, dim) for name in _UNIT_PLANES]
    else:
        of_units = [expect(planes, name, (num_units, dim), "<f2", "<f4") for name in _UNIT_PLANES]
    scale, low = (to_tensor(plane, _CPU) for plane in of_units)
    return packed, scale, low


def _values(method: Method, form: Form, rows: FrameRows, planes: Planes, params: Planes) -> Side:
    """Values as they lie, and their scales and mins, of all layers of a frame."""
    num_rows, none = rows.shape[0], torch.zeros(0)
    if form.value_bits == 16:
        return method.decode(planes, params, rows, _CPU), none, none
    packed = to_tensor(expect(planes, "value", (num_rows, row_bytes(rows.head_dim, form.value_bits)), "|u1"), _CPU)
    scale = to_tensor(expect(planes, "value_scale", (num_rows, 1), "<f2", "<f4")[:, 0], _CPU)
    if form.value_bits == 4:
        return packed, scale, none
    return packed, scale, to_tensor(expect(planes, "value_min", (num_rows, 1), "<f2", "<f4")[:, 0], _CPU)
