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

from kvchat.cache.coded import (
    CHUNK,
    FIRST,
    GROUP,
    HEAD,
    ROW_PLANES,
    ROWS,
    START,
    UNIT,
    UNIT_PLANES,
    CodedKV,
    Form,
    num_units,
)
from kvchat.cache.pack import split
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
_INTEGERS = {2: torch.int16, 4: torch.int32}


def coded_arrays(header: SegmentHeader, chunk: int, group: int, blob: bytes) -> Planes:
    """The planes of a frame by the names of `CodedKV`'s, in host memory, rows by layer, head and time; read-only.

    What has 8 or 4 bits stays encoded; the rest is decoded, and given as integers of as many bits. Left out is what
    serves the whole segment: the scales of 8-bit keys. Raises CorruptFrame.
    """
    codec, rows, planes, params = open_frame(header, chunk, group, blob)
    assert rows.positions is not None
    return {"positions": rows.positions} | _arrays(codec, rows, planes, params)


def coded_parts(header: SegmentHeader, chunk: int, group: int, blob: bytes) -> Planes:
    """`coded_arrays` without positions."""
    codec = header.method(chunk)
    return _arrays(*open_frame(header, chunk, group, blob, placed=16 in form_of(codec)))


def _arrays(codec: Codec, rows: FrameRows, planes: Planes, params: Planes) -> Planes:
    form, (num_rows, dim), found = form_of(codec), rows.shape, Planes()
    for side, method, bits in (("key", codec.keys, form.key_bits), ("value", codec.values, form.value_bits)):
        if bits == 16:
            found[f"{side}s"] = method.decode(planes, params, rows, _CPU).view(_INTEGERS[rows.dtype.itemsize]).numpy()
        else:
            found[f"{side}s"] = expect(planes, side, (num_rows, row_bytes(dim, bits)), "|u1")
    if form.key_bits == 4:
        shape = int(num_units(form, rows.counts).sum()), dim
        found |= {name: expect(planes, name, shape, "<f2", "<f4") for name in UNIT_PLANES}
    return found | {name: expect(planes, name, (num_rows, 1), "<f2", "<f4")[:, 0] for name in form.row_planes}


def coded_frame(header: SegmentHeader, chunk: int, group: int, blob: bytes) -> list[CodedKV]:
    """A CodedKV for each layer of a frame, in host memory, encoded as in `coded_arrays`. Raises CorruptFrame."""
    first, last = header.layers(group)
    # Copies, because planes are read-only views of the frame.
    arrays = {name: plane.copy() for name, plane in coded_arrays(header, chunk, group, blob).items()}
    counts = header.ranking.counts(chunk)[first:last]
    return split(coded_rows(header, chunk, first, counts, arrays), last - first)


def coded_rows(header: SegmentHeader, chunk: int, first: int, counts: npt.NDArray[np.int64], arrays: Planes) -> CodedKV:
    """Rows of a frame in host memory as those of one layer that has the heads of all: (layers, H) `counts` of them.

    first: the frame's first layer. arrays: planes as `coded_arrays` gives them.
    """
    form, last = form_of(header.method(chunk)), first + len(counts)
    rows = FrameRows(counts, header.head_dim, header.dtype)
    planes = {name: torch.from_numpy(plane) for name, plane in arrays.items()}
    if form.key_bits == 8:
        for name in UNIT_PLANES:
            planes[name] = to_tensor(header.params[name][first:last].reshape(-1, rows.head_dim), _CPU)
    keys, values = (
        planes[name].view(header.dtype) if bits == 16 else planes[name]
        for name, bits in (("keys", form.key_bits), ("values", form.value_bits))
    )
    scale, low = (planes.get(name, torch.zeros(0, rows.head_dim)) for name in UNIT_PLANES)
    v_scale, v_low = (planes.get(name, torch.zeros(0)) for name in ROW_PLANES)
    place = (header.ranking.start, chunk)
    return _rows(form, rows, place, (keys, scale, low), (values, v_scale, v_low), planes["positions"])


def coded_planes(reading: Reading, taken: Taken) -> list[CodedKV]:
    """The rows of a frame that is not packed yet, where its planes lie; equal in every bit to what `coded_frame` gives.

    Whatever does not stay encoded is decoded by way of the CPU.
    """
    header, rows, planes, device = reading.header, taken.rows, taken.planes, taken.index.device
    codec, (first, last) = header.method(taken.chunk), header.layers(taken.group)
    form, none = form_of(codec), torch.zeros(0, device=device)
    if form.key_bits == 16:
        packed, scale = _plain(codec.keys, taken), torch.zeros(0, rows.head_dim, device=device)
        keys = packed, scale, scale
    else:
        of_units = planes if form.key_bits == 4 else {name: reading.params[name][first:last] for name in UNIT_PLANES}
        scale, low = (of_units[name].reshape(-1, rows.head_dim) for name in UNIT_PLANES)
        keys = planes["key"], scale, low
    if form.value_bits == 16:
        values = _plain(codec.values, taken), none, none
    else:
        scale, low = (planes[name][:, 0] if name in planes else none for name in ROW_PLANES)
        values = planes["value"], scale, low
    start, tokens = header.ranking.start, header.ranking.chunk_of.shape[2]
    positions = (taken.index % tokens + start).int()
    return split(_rows(form, rows, (start, taken.chunk), keys, values, positions), last - first)


def _plain(method: Method, taken: Taken) -> Tensor:
    """Keys or values as numbers, computed from the planes as they would be read."""
    planes = {name: plane.cpu().numpy() for name, plane in taken.planes.items()}
    return method.decode(planes, {}, taken.rows, taken.index.device)


def _rows(form: Form, rows: FrameRows, place: tuple[int, int], keys: Side, values: Side, positions: Tensor) -> CodedKV:
    """A frame's rows as those of one layer; `place` is the start of the segment and the rank chunk."""
    counts = rows.counts.reshape(-1)
    units = num_units(form, counts)
    runs = np.empty((len(counts), 6), np.int64)
    runs[:, HEAD], runs[:, [START, CHUNK]] = np.arange(len(counts)), place
    runs[:, FIRST], runs[:, ROWS], runs[:, UNIT] = counts.cumsum() - counts, counts, units.cumsum() - units
    (k, k_scale, k_low), (v, v_scale, v_low) = keys, values
    return CodedKV(form, rows.dtype, len(runs), k, v, k_scale, k_low, v_scale, v_low, positions, runs)


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
    device, (first, rows, unit) = part.keys.device, part.places
    size = len(part.keys)
    of_rows = torch.repeat_interleave(unit, rows, output_size=size)
    if part.form.key_bits == 4:
        place = torch.arange(size, device=device) - torch.repeat_interleave(first, rows, output_size=size)
        of_rows += place // GROUP
    return of_rows


_KEYS: dict[int, Keys8 | ChannelKeys] = {8: Keys8(), 4: ChannelKeys(4)}
_VALUES8, _VALUES4 = Values8(), RotatedValues(4)
_ENCODED: dict[Method, int] = {_KEYS[8]: 8, _VALUES8: 8, _KEYS[4]: 4, _VALUES4: 4}


def form_of(codec: Codec) -> Form:
    """What stays encoded of a codec's rows."""
    return Form(_bits(codec.keys), _bits(codec.values))


def _bits(method: Method) -> int:
    """Bits of a side that can stay encoded, else 16."""
    return _ENCODED.get(method, 16)
