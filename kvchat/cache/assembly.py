"""Many sealed pieces into empty layers at once: each row is copied to where it will lie, and nothing is packed twice.

Rows lie as `pack` would have laid them, which is known before the first of them is there. Frames come in batches: one
copy to the device for a batch, then, in every layer, one operation a plane takes its rows to their places. So the
device holds no more than all rows and a batch.

Letters: L layers, H KV heads, P pieces, S segments, N rows of a layer, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import ROW_PLANES, UNIT_PLANES, CodedKV, Form, num_units
from kvchat.cache.layer import Piece
from kvchat.cache.pack import numbers_of

Counts = npt.NDArray[np.int64]
Arrays = Mapping[str, npt.NDArray[Any]]
"""Planes by the names of `CodedKV`'s, in host memory."""

_ALIGNED = 16


class Part(NamedTuple):
    """A frame: the rows of one piece, by its place among those of the assembly, in layers [first, last)."""

    piece: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Plane:
    name: str
    tail: tuple[int, ...]
    dtype: torch.dtype
    of_units: bool = False

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return prod(self.tail) * self.dtype.itemsize


class Assembly:
    """All rows of one form.

    Args:
        form: how they are encoded.
        dtype: of plain numbers; scales of rows, and of units in 4 bits, are float16.
        pieces: (P,) in canonical order.
        counts: (P, L, H) rows of each.
        unit_scales: for 8-bit keys scale and min of each segment and channel, (L, H, S, D) float32.
        head_dim, device: as they say.
    """

    def __init__(
        self,
        form: Form,
        dtype: torch.dtype,
        pieces: Sequence[Piece],
        counts: Counts,
        unit_scales: Sequence[npt.NDArray[np.float32]],
        head_dim: int,
        device: torch.device,
    ) -> None:
        self.form, self.dtype, self.device = form, dtype, device
        self.pieces, self.counts, self.head_dim = pieces, counts, head_dim
        self.units = num_units(form, counts)
        self.planes = _planes(form, dtype, head_dim)
        self.first_row = _firsts(counts)
        self.first_unit = self._first_units()
        self._scales = [torch.from_numpy(plane).flatten(1, 2) for plane in unit_scales]
        self.layers = [self._new_layer(layer) for layer in range(counts.shape[1])]

    def _first_units(self) -> Counts:
        """The first unit of each run, (L, H, P)."""
        if self.form.key_bits != 8:
            return _firsts(self.units)
        _, segment = np.unique([piece.start for piece in self.pieces], return_inverse=True)
        _, layers, heads = self.counts.shape
        firsts = np.arange(heads)[:, None] * (int(segment.max(initial=-1)) + 1) + segment
        return np.broadcast_to(firsts, (layers, *firsts.shape))

    def _new_layer(self, layer: int) -> dict[str, Tensor]:
        rows, units = int(self.counts[:, layer].sum()), int(self.units[:, layer].sum())
        planes = {
            plane.name: torch.empty((length, *plane.tail), dtype=plane.dtype, device=self.device)
            for plane in self.planes
            for length in (units if plane.of_units else rows,)
        }
        none = torch.zeros(0, self.head_dim, device=self.device)
        scales = [scale[layer].to(self.device, copy=True) for scale in self._scales] or [none, none]
        for name, scale in zip(UNIT_PLANES, scales, strict=True):
            planes.setdefault(name, scale)
        for name in ROW_PLANES:
            planes.setdefault(name, none[:, 0])
        return planes

    def sizes(self, part: Part) -> tuple[int, int]:
        """Rows and units that a part brings."""
        of_part = part.piece, slice(part.first, part.last)
        return int(self.counts[of_part].sum()), int(self.units[of_part].sum())

    def nbytes(self, part: Part) -> int:
        """What a part takes on its way, but for alignment."""
        rows, units = self.sizes(part)
        return sum((units if plane.of_units else rows) * plane.width for plane in self.planes)

    def finished(self) -> list[CodedKV]:
        """The rows of every layer, when all have come."""
        heads = self.counts.shape[2]
        head = np.broadcast_to(np.arange(heads)[:, None], (heads, len(self.pieces)))
        start, chunk = np.array(self.pieces).reshape(-1, 2).T
        columns = zip(self.first_row, self.counts.transpose(1, 2, 0), self.first_unit, strict=True)
        runs = [_columns(head, *of_layer, start, chunk) for of_layer in columns]
        return [
            CodedKV(self.form, self.dtype, heads, **planes, runs=of_layer)
            for planes, of_layer in zip(self.layers, runs, strict=True)
        ]


class Batch:
    """Parts that go to the device together, in a buffer in host memory: plane after plane, each with all parts' rows.

    Parts may be filled by several threads at once.
    """

    def __init__(self, assembly: Assembly, parts: Sequence[Part]) -> None:
        self._assembly, self._parts = assembly, parts
        ends = np.cumsum([(0, 0), *map(assembly.sizes, parts)], axis=0).T.tolist()
        self._ends = {plane.name: ends[plane.of_units] for plane in assembly.planes}
        """Of each plane where the rows of each part begin among those of all, and the last ones end."""
        taken = [_aligned(self._ends[plane.name][-1] * plane.width) for plane in assembly.planes]
        firsts = (np.cumsum(taken) - taken).tolist()
        self._regions = {plane.name: first for plane, first in zip(assembly.planes, firsts, strict=True)}
        self._buffer = torch.empty(sum(taken), dtype=torch.uint8, pin_memory=assembly.device.type == "cuda")
        self._bytes = self._buffer.numpy()

    def fill(self, index: int, arrays: Arrays) -> bool:
        """Copy the planes of one part to where they belong; False if one is not as was to be expected."""
        for plane in self._assembly.planes:
            array, (low, high) = arrays[plane.name], self._ends[plane.name][index : index + 2]
            if array.nbytes != (high - low) * plane.width:
                return False
            first = self._regions[plane.name] + low * plane.width
            self._bytes[first : first + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return True

    def land(self) -> None:
        """Copy all to the device, and every row to its place; a GPU may still be at it when this has returned."""
        assembly = self._assembly
        staged = self._buffer.to(assembly.device, non_blocking=True)
        places = {
            of_units: list(self._places(counts, firsts, self._ends[name][:-1]))
            for of_units, name, counts, firsts in (
                (False, "keys", assembly.counts, assembly.first_row),
                (True, "key_scale", assembly.units, assembly.first_unit),
            )
            if name in self._ends
        }
        for plane in assembly.planes:
            first, rows = self._regions[plane.name], self._ends[plane.name][-1]
            given = staged[first : first + rows * plane.width].view(plane.dtype).view(rows, *plane.tail)
            for layer, source, target in places[plane.of_units]:
                assembly.layers[layer][plane.name].index_copy_(0, target, given.index_select(0, source))

    def _places(self, counts: Counts, firsts: Counts, begins: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each layer the numbers of its rows among the batch's, and where they will lie, both on the device."""
        runs = []
        for (piece, first, last), begin in zip(self._parts, begins, strict=True):
            rows = counts[piece, first:last]
            source = begin + rows.cumsum().reshape(rows.shape) - rows
            layer = np.broadcast_to(np.arange(first, last)[:, None], rows.shape)
            runs.append(np.stack([layer, source, firsts[first:last, :, piece], rows]).reshape(4, -1))
        table = np.concatenate(runs, axis=1)
        layer, source, target, rows = table[:, np.argsort(table[0], kind="stable")]
        both = [numbers_of(first, rows, self._assembly.device) for first in (source, target)]
        of_layer = np.bincount(layer, weights=rows).astype(np.int64)
        present = np.flatnonzero(of_layer).tolist()
        split = (part.split_with_sizes(of_layer[present].tolist()) for part in both)
        for number, source, target in zip(present, *split, strict=True):
            yield number, source, target


def _planes(form: Form, dtype: torch.dtype, head_dim: int) -> list[_Plane]:
    """What parts bring."""
    widths = {16: ((head_dim,), dtype), 8: ((head_dim,), torch.uint8), 4: ((head_dim // 2,), torch.uint8)}
    of_units = UNIT_PLANES if form.key_bits == 4 else ()
    return [
        _Plane("keys", *widths[form.key_bits]),
        _Plane("values", *widths[form.value_bits]),
        _Plane("positions", (), torch.int32),
        *(_Plane(name, (), torch.float16) for name in form.row_planes),
        *(_Plane(name, (head_dim,), torch.float16, of_units=True) for name in of_units),
    ]


def _firsts(counts: Counts) -> Counts:
    """Where each run begins if runs of (P, L, H) rows lie, in every layer, by head and piece: (L, H, P)."""
    by_head = counts.transpose(1, 2, 0)
    flat = by_head.reshape(len(by_head), -1)
    return (flat.cumsum(axis=1) - flat).reshape(by_head.shape)


def _columns(head: Counts, *columns: Counts) -> Counts:
    """Runs (H * P, 6) of columns (H, P) or (P,)."""
    return np.stack([np.broadcast_to(column, head.shape) for column in (head, *columns)], axis=2).reshape(-1, 6)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
