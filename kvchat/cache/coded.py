"""Rows of one layer as they were encoded, so that a kernel can read them without a decoded copy.

Letters: H KV heads, N rows, D head_dim, U units of key scales, R runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GROUP = 32
"""Rows of a run that share a key scale in 4 bits."""


class Form(NamedTuple):
    """Bits of keys and values, each 16 (plain rows), 8 or 4."""

    key_bits: int
    value_bits: int


@dataclass(frozen=True)
class CodedKV:
    """Rows of one layer in one form. Rows stand by head, segment, rank chunk and time; a run is one chunk of one head.

    keys, values            (N, W): 16 bits (N, D) in `dtype`; 8 bits (N, D) uint8; 4 bits (N, D / 2) uint8
    key_scale, key_min      (U, D): 8 bits float32, a unit for each segment and head; 4 bits float16 or float32, a unit
                            for each 32 rows of a run; 16 bits (0, D)
    value_scale, value_min  (N,) float16 or float32: 8 bits both, 4 bits the scale alone; else (0,)
    positions               (N,) int32, where each pair stood in the conversation
    runs                    (R, 4) int64 on the CPU: head, first row, rows, first unit
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
        for rows, bits in ((self.keys, self.form.key_bits), (self.values, self.form.value_bits)):
            width = self.head_dim // 2 if bits == 4 else self.head_dim
            assert rows.shape == (self.num_rows, width) and rows.dtype == (self.dtype if bits == 16 else torch.uint8)
            assert rows.is_contiguous()
        assert self.key_scale.shape == self.key_min.shape and self.key_scale.dtype == self.key_min.dtype
        assert int(self.runs[:, 2].sum()) == self.num_rows

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.positions)

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.key_scale.shape[1])

    @property
    def cu_seqlens(self) -> npt.NDArray[np.int64]:
        """Head h owns rows cu_seqlens[h] : cu_seqlens[h + 1]; (H + 1,)."""
        counts = np.bincount(self.runs[:, 0], weights=self.runs[:, 2], minlength=self.num_heads)
        return np.concatenate([[0], counts.cumsum()]).astype(np.int64)

    def to(self, device: torch.device) -> CodedKV:
        """The same rows on a device."""
        names = ("keys", "values", "key_scale", "key_min", "value_scale", "value_min", "positions")
        moved = {name: getattr(self, name).to(device) for name in names}
        return CodedKV(self.form, self.dtype, self.num_heads, **moved, runs=self.runs)


def join(pieces: Sequence[CodedKV]) -> CodedKV:
    """Pieces of one form, in canonical order, as one: by head, then by piece. Equal key scales are kept once."""
    first = pieces[0]
    assert all(piece.form == first.form and piece.num_heads == first.num_heads for piece in pieces)
    row_base = np.cumsum([0] + [piece.num_rows for piece in pieces])[:-1]
    unit_base, kept = _unit_bases(pieces)
    moved = np.zeros((len(pieces), 4), np.int64)
    moved[:, 1], moved[:, 3] = row_base, unit_base
    runs = np.concatenate([piece.runs + by for piece, by in zip(pieces, moved, strict=True)])
    runs = runs[np.argsort(runs[:, 0], kind="stable")]
    ends = runs[:, 2].cumsum()
    index = torch.from_numpy(np.repeat(runs[:, 1] - (ends - runs[:, 2]), runs[:, 2]) + np.arange(ends[-1:].sum()))
    runs[:, 1] = ends - runs[:, 2]

    def rows(name: str) -> Tensor:
        whole = torch.cat([getattr(piece, name) for piece in pieces])
        return whole[index.to(whole.device)] if len(whole) else whole

    scale, low = (torch.cat([getattr(piece, name) for piece in kept]) for name in ("key_scale", "key_min"))
    by_row = {name: rows(name) for name in ("keys", "values", "value_scale", "value_min", "positions")}
    return CodedKV(first.form, first.dtype, first.num_heads, key_scale=scale, key_min=low, **by_row, runs=runs)


def _unit_bases(pieces: Sequence[CodedKV]) -> tuple[list[int], list[CodedKV]]:
    """Where the units of each piece begin, and the pieces whose units are kept: chunks of a segment share theirs."""
    seen: dict[tuple[int, int], int] = {}
    bases: list[int] = []
    kept: list[CodedKV] = []
    total = 0
    for piece in pieces:
        key = (piece.key_scale.data_ptr(), len(piece.key_scale))
        if key not in seen or key[1] == 0:
            seen[key] = total
            total += len(piece.key_scale)
            kept.append(piece)
        bases.append(seen[key])
    return bases, kept
