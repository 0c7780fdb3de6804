"""Joining and cutting sealed rows of a layer, whatever form they lie in.

Rows always stand in canonical order: head, then segment, then rank chunk, then time. A run is what one head holds of
one piece; packing is one concatenation of as few slices as can be.

Letters: N rows, R runs, U units of key scales, H KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import CHUNK, FIRST, GROUP, HEAD, ROWS, START, UNIT, CodedKV, bounds_of
from kvchat.cache.segment import LayerKV

Runs = npt.NDArray[np.int64]
"""(R, 6): head, first row, rows, first unit, start of the segment, rank chunk."""
_SOURCE = 6


def pack(sources: Sequence[CodedKV], chosen: Sequence[Runs]) -> CodedKV:
    """The chosen runs of sources of one form, in canonical order; a run may be given with fewer rows than it has."""
    table = _sorted(chosen)
    rows = _slices(table[:, _SOURCE], table[:, FIRST], table[:, ROWS])
    num_units, given = _units(table, sources[0].form.key_bits)
    units = _slices(table[given, _SOURCE], table[given, UNIT], num_units[given])
    starts = np.cumsum(table[:, ROWS]) - table[:, ROWS]
    firsts = np.maximum(np.cumsum(np.where(given, num_units, 0)) - num_units, 0)
    runs = np.column_stack([table[:, HEAD], starts, table[:, ROWS], firsts, table[:, START], table[:, CHUNK]])
    first = sources[0]
    return CodedKV(
        form=first.form,
        dtype=first.dtype,
        num_heads=first.num_heads,
        keys=_cat(sources, "keys", rows),
        values=_cat(sources, "values", rows),
        key_scale=_cat(sources, "key_scale", units),
        key_min=_cat(sources, "key_min", units),
        value_scale=_cat(sources, "value_scale", rows),
        value_min=_cat(sources, "value_min", rows),
        positions=_cat(sources, "positions", rows),
        runs=runs,
    )


def before(rows: CodedKV, position: int) -> CodedKV:
    """The rows of tokens before `position`: of every run its beginning, for runs stand in time order."""
    counted = np.concatenate([[0], np.cumsum((rows.positions < position).cpu().numpy())])
    runs = rows.runs[rows.runs[:, START] < position].copy()
    runs[:, ROWS] = counted[runs[:, FIRST] + runs[:, ROWS]] - counted[runs[:, FIRST]]
    return pack([rows], [runs])


def merged(forms: Sequence[CodedKV], parts: Sequence[LayerKV]) -> LayerKV:
    """All rows of a layer in canonical order, given those of each form as plain numbers."""
    if len(parts) == 1:
        return parts[0]
    table = _sorted([form.runs for form in forms])
    slices = _slices(table[:, _SOURCE], table[:, FIRST], table[:, ROWS])
    keys, values, positions = (_cat(parts, name, slices) for name in ("keys", "values", "positions"))
    return LayerKV(keys, values, positions, bounds_of(table, forms[0].num_heads))


def _sorted(chosen: Sequence[Runs]) -> Runs:
    """Runs of all sources in canonical order, the number of the source behind each."""
    table = np.concatenate([np.column_stack([runs, np.full(len(runs), index)]) for index, runs in enumerate(chosen)])
    order = np.lexsort((table[:, CHUNK], table[:, START], table[:, HEAD]))
    found: Runs = table[order]
    return found


def _units(table: Runs, key_bits: int) -> tuple[Runs, npt.NDArray[np.bool_]]:
    """How many units of key scales each run needs, and which runs bring theirs: those of a segment may share one."""
    if key_bits == 8:
        same = np.zeros(len(table), np.bool_)
        same[1:] = (table[1:, [HEAD, START]] == table[:-1, [HEAD, START]]).all(1)
        return np.ones(len(table), np.int64), ~same
    needed = -(-table[:, ROWS] // GROUP) if key_bits == 4 else np.zeros(len(table), np.int64)
    return needed, np.ones(len(table), np.bool_)


def _slices(source: Runs, first: Runs, length: Runs) -> list[tuple[int, int, int]]:
    """Source, beginning and end of each slice, neighbours joined."""
    some = length > 0
    source, first, last = source[some], first[some], (first + length)[some]
    follows = (source[1:] == source[:-1]) & (first[1:] == last[:-1])
    begins, ends = np.append(True, ~follows)[: len(source)], np.append(~follows, True)[: len(source)]
    return list(zip(source[begins].tolist(), first[begins].tolist(), last[ends].tolist(), strict=True))


def _cat(sources: Sequence[CodedKV | LayerKV], name: str, slices: Sequence[tuple[int, int, int]]) -> Tensor:
    planes: list[Tensor] = [getattr(one, name) for one in sources]
    return torch.cat([planes[source][low:high] for source, low, high in slices] or [planes[0][:0]])
