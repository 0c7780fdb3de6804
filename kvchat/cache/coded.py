"""Rows of one layer as they were encoded, so that a kernel can read them without a decoded copy.

Letters: H KV heads, N rows, D head_dim, U units of key scales, R runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.segment import LayerKV

GROUP = 32
"""Rows of a run that share a key scale in 4 bits."""
HEAD, FIRST, ROWS, UNIT, START, CHUNK = range(6)
"""Columns of runs."""


UNIT_PLANES, ROW_PLANES = ("key_scale", "key_min"), ("value_scale", "value_min")
"""Names of the scales of keys and of values."""


class Form(NamedTuple):
    """Bits of keys and values, each 16 (plain rows), 8 or 4."""

    key_bits: int
    value_bits: int

    @property
    def row_planes(self) -> tuple[str, ...]:
        """Those of ROW_PLANES that rows of this form have."""
        return {8: ROW_PLANES, 4: ROW_PLANES[:1]}.get(self.value_bits, ())


PLAIN = Form(16, 16)


@dataclass(frozen=True)
class CodedKV:
    """Rows of one layer in one form. Rows stand by head, segment, rank chunk and time; a run is one chunk of one head.

    keys, values            (N, W): 16 bits (N, D) in `dtype`; 8 bits (N, D) uint8; 4 bits (N, D / 2) uint8
    key_scale, key_min      (U, D): 8 bits float32, a unit for each segment and head; 4 bits float16 or float32, a unit
                            for each 32 rows of a run; 16 bits (0, D)
    value_scale, value_min  (N,) float16 or float32: 8 bits both, 4 bits the scale alone; else (0,)
    positions               (N,) int32, where each pair stood in the conversation
    runs                    (R, 6) int64 on the CPU: head, first row, rows, first unit, start of the segment, rank chunk

    Runs that were chosen from others may leave rows out, until they are packed.
    """

    form: Form
    dtype: torch.dtype
    num_heads: int
    keys: Tensor
    values: Tensor
    key_scale: Tensor
    key_min: Tensor
    value_scale: Tensor
    value_min: Tensor
    positions: Tensor
    runs: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.positions.shape[0], self.key_scale.shape[1]
        for rows, bits in ((self.keys, self.form.key_bits), (self.values, self.form.value_bits)):
            assert rows.shape == (shape if bits > 4 else (shape[0], shape[1] // 2))
            assert rows.dtype == (self.dtype if bits == 16 else torch.uint8)
        assert self.key_scale.shape == self.key_min.shape and int(self.runs[:, ROWS].sum()) <= shape[0]

    @classmethod
    def plain(cls, rows: LayerKV, start: int, chunk: int) -> CodedKV:
        """One rank chunk of rows that are numbers as they are."""
        bounds = np.array(rows.bounds)
        fixed = np.broadcast_to([0, start, chunk], (len(bounds) - 1, 3))
        return cls.numbers(rows, np.column_stack([np.arange(len(bounds) - 1), bounds[:-1], np.diff(bounds), fixed]))

    @classmethod
    def numbers(cls, rows: LayerKV, runs: npt.NDArray[np.int64]) -> CodedKV:
        """Rows that are numbers as they are, of these runs; their units are not looked at."""
        runs = runs.copy()
        runs[:, UNIT] = 0
        # Absent scales are of the dtype that they have elsewhere.
        unit, number = (rows.keys.new_empty(shape, dtype=torch.float32) for shape in ((0, rows.keys.shape[1]), (0,)))
        planes = (rows.keys, rows.values, unit, unit, number, number, rows.positions)
        return cls(PLAIN, rows.keys.dtype, len(rows.bounds) - 1, *planes, runs)

    @cached_property
    def places(self) -> Tensor:
        """First row, rows and first unit of each run, (3, R) int64 where the rows lie."""
        return torch.from_numpy(self.runs[:, [FIRST, ROWS, UNIT]].T.copy()).to(self.keys.device)

    @property
    def planes(self) -> tuple[Tensor, ...]:
        """All that takes memory, but for positions."""
        return self.keys, self.values, self.key_scale, self.key_min, self.value_scale, self.value_min

    @property
    def plane_bytes(self) -> int:
        """Bytes of these."""
        return sum(plane.nbytes for plane in self.planes)

    def nbytes(self, start: int) -> int:
        """Bytes that the rows of the segment at `start` take, with their scales, without their positions."""
        runs = self.runs[self.runs[:, START] == start]
        by_row = [part for part in (self.keys, self.values, self.value_scale, self.value_min) if len(part)]
        per_row = sum(math.prod(part.shape[1:]) * part.itemsize for part in by_row)
        units = {16: 0, 8: len(set(runs[:, HEAD])), 4: int((-(-runs[:, ROWS] // GROUP)).sum())}[self.form.key_bits]
        return int(runs[:, ROWS].sum()) * per_row + 2 * units * self.head_dim * self.key_scale.itemsize

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.positions)

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.key_scale.shape[1])

    @property
    def cu_seqlens(self) -> Tensor:
        """Head h owns rows cu_seqlens[h] : cu_seqlens[h + 1]; (H + 1,) int32 on the CPU."""
        return bounds_of(self.runs, self.num_heads)

    def rows(self) -> LayerKV:
        """Plain rows, as they lie."""
        assert self.form == PLAIN
        return LayerKV(self.keys, self.values, self.positions, self.cu_seqlens)


def bounds_of(runs: npt.NDArray[np.int64], num_heads: int) -> Tensor:
    """Where the rows of each head begin, and the last end, given runs in canonical order; (H + 1,) int32."""
    counts = np.bincount(runs[:, HEAD], weights=runs[:, ROWS], minlength=num_heads)
    return torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))


def num_units(form: Form, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Units of key scales that runs of so many rows have; in 8 bits those of a segment share one."""
    if form.key_bits == 4:
        groups: npt.NDArray[np.int64] = -(-counts // GROUP)
        return groups
    return np.full_like(counts, 1 if form.key_bits == 8 else 0)
