"""Joining and cutting sealed rows of a layer, whatever form they lie in.

Rows always stand in canonical order: head, then segment, then rank chunk, then time. A run is what one head holds of
one piece. Packing joins as few slices as can be, or, where these are many, takes rows by their numbers.

Letters: N rows, R runs, U units of key scales, H KV heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import CHUNK, FIRST, GROUP, HEAD, ROWS, START, UNIT, CodedKV, bounds_of
from kvchat.cache.segment import LayerKV

Runs = npt.NDArray[np.int64]
"""(R, 6): head, first row, rows, first unit, start of the segment, rank chunk."""
Spans = tuple[tuple[int, int], ...]
"""Places [low, high) of tokens."""
_SOURCE = 6

FEW = 512
"""With more slices than this a result is taken row by row: each slice costs as much time as many rows."""
FEW_ON_DEVICE = 16
"""The same on a device that copies a row in no time."""


def pack(sources: Sequence[CodedKV], chosen: Sequence[Runs], device: torch.device) -> CodedKV:
    """The chosen runs of sources of one form, in canonical order; a run may be given with fewer rows than it has.

    Sources may lie on `device` or in host memory; the result lies on `device`.
    """
    table = _sorted(chosen)
    num_units, given = _units(table, sources[0].form.key_bits)
    lengths = [one.keys.shape[0] for one in sources], [one.key_scale.shape[0] for one in sources]
    rows = _Places(table[:, _SOURCE], table[:, FIRST], table[:, ROWS], lengths[0], device)
    units = _Places(table[given, _SOURCE], table[given, UNIT], num_units[given], lengths[1], device)
    starts = np.cumsum(table[:, ROWS]) - table[:, ROWS]
    firsts = np.maximum(np.cumsum(np.where(given, num_units, 0)) - num_units, 0)
    runs = np.column_stack([table[:, HEAD], starts, table[:, ROWS], firsts, table[:, START], table[:, CHUNK]])
    first = sources[0]
    return CodedKV(
        form=first.form,
        dtype=first.dtype,
        num_heads=first.num_heads,
        keys=rows.take([one.keys for one in sources]),
        values=rows.take([one.values for one in sources]),
        key_scale=units.take([one.key_scale for one in sources]),
        key_min=units.take([one.key_min for one in sources]),
        value_scale=rows.take([one.value_scale for one in sources]),
        value_min=rows.take([one.value_min for one in sources]),
        positions=rows.take([one.positions for one in sources]),
        runs=runs,
    )


def before(rows: CodedKV, position: int) -> CodedKV:
    """The rows of tokens before `position`: of every run its beginning, for runs stand in time order."""
    runs = rows.runs[rows.runs[:, START] < position].copy()
    # Segments follow each other: only the last of these can go on beyond, and only its positions are looked at.
    last = np.flatnonzero(runs[:, START] == runs[:, START].max(initial=-1))
    first, length = runs[last, FIRST], runs[last, ROWS]
    at = _Places(np.zeros_like(last), first, length, [rows.num_rows], rows.positions.device)
    early = (at.take([rows.positions]) < position).cpu().numpy()
    counted, ends = np.concatenate([[0], np.cumsum(early)]), np.cumsum(length)
    runs[last, ROWS] = counted[ends] - counted[ends - length]
    return pack([rows], [runs], rows.keys.device)


def within(rows: CodedKV, spans: Spans) -> CodedKV:
    """The rows of tokens in these spans; of keys in 4 bits whole groups, which share a scale, so some rows more.

    Planes are shared with `rows`: only the runs are others, until these are packed. Runs without such rows stay, empty.
    """
    runs, grouped = rows.runs, rows.form.key_bits == 4
    run, offset = rows_of(runs[:, ROWS])
    positions = rows.positions.cpu().numpy()[runs[run, FIRST] + offset]
    inside = np.zeros(len(run), np.bool_)
    for low, high in spans:
        inside |= (positions >= low) & (positions < high)
    begins, ends = _stretches(inside_groups(inside, offset) if grouped else inside, run)
    chosen = runs[run[begins]].copy()
    chosen[:, FIRST] += offset[begins]
    chosen[:, ROWS] = ends - begins
    chosen[:, UNIT] += offset[begins] // GROUP if grouped else 0
    others = np.delete(runs, run[begins], axis=0)  # without rows: in every layer are the same pieces
    others[:, ROWS] = 0
    return replace(rows, runs=np.concatenate([chosen, others]))


def split(rows: CodedKV, layers: int) -> list[CodedKV]:
    """The rows of each layer, as views, given those of all as the rows of one: as many heads of each, layer by layer.

    All layers at once: a segment has many small ones, and each operation or copy costs more than its bytes.
    """
    heads, runs = rows.num_heads // layers, rows.runs
    ends = np.searchsorted(runs[:, HEAD], np.arange(layers + 1) * heads)
    firsts = [*runs[ends[:-1], UNIT], len(rows.key_scale)] if len(rows.key_scale) else [0] * (layers + 1)
    sizes, units = np.add.reduceat(runs[:, ROWS], ends[:-1]).tolist(), np.diff(firsts).tolist()
    by_row = (rows.keys, rows.values, rows.value_scale, rows.value_min, rows.positions)
    parts = [plane.split_with_sizes(sizes if len(plane) else [0] * layers) for plane in by_row]
    parts += [plane.split_with_sizes(units) for plane in (rows.key_scale, rows.key_min)]
    found = []
    for layer, (keys, values, scale, low, positions, k_scale, k_low) in enumerate(zip(*parts, strict=True)):
        own = runs[ends[layer] : ends[layer + 1]].copy()
        own[:, HEAD] -= layer * heads
        own[:, FIRST] -= own[0, FIRST]
        own[:, UNIT] -= own[0, UNIT]
        found.append(CodedKV(rows.form, rows.dtype, heads, keys, values, k_scale, k_low, scale, low, positions, own))
    return found


def stretch(rows: CodedKV, low: int, high: int) -> CodedKV:
    """`within` one span, as rows that stand by themselves: of pieces that begin with its first token."""
    found = within(rows, ((low, high),))
    found.runs[:, START] = low
    return found


def rows_of(lengths: Runs) -> tuple[Runs, Runs]:
    """Of every row of runs of these lengths, in their order: the index of its run, and its number in it."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def inside_groups(inside: npt.NDArray[np.bool_], offset: Runs) -> npt.NDArray[np.bool_]:
    """All rows of groups of which one is inside; `offset` is the number of each row in its run."""
    firsts = np.flatnonzero(offset % GROUP == 0)
    if not len(firsts):
        return inside
    return np.repeat(np.logical_or.reduceat(inside, firsts), np.diff([*firsts, len(inside)]))


def _stretches(inside: npt.NDArray[np.bool_], run: Runs) -> tuple[Runs, Runs]:
    """Where rows of one run that are inside follow each other: the first of each stretch, and one past its last."""
    same = run[1:] == run[:-1]
    begins = inside & ~np.append(False, inside[:-1] & same)[: len(inside)]
    ends = inside & ~np.append(inside[1:] & same, False)[: len(inside)]
    return np.flatnonzero(begins), np.flatnonzero(ends) + 1


def merged(forms: Sequence[CodedKV], parts: Sequence[LayerKV]) -> LayerKV:
    """All rows of a layer in canonical order, given those of each form as plain numbers."""
    if len(parts) == 1:
        return parts[0]
    table = _sorted([form.runs for form in forms])
    lengths = [len(part.keys) for part in parts]
    rows = _Places(table[:, _SOURCE], table[:, FIRST], table[:, ROWS], lengths, parts[0].keys.device)
    keys, values = rows.take([part.keys for part in parts]), rows.take([part.values for part in parts])
    positions = rows.take([part.positions for part in parts])
    return LayerKV(keys, values, positions, bounds_of(table, forms[0].num_heads))


def _sorted(chosen: Sequence[Runs]) -> Runs:
    """Runs of all sources in canonical order, the number of the source behind each."""
    runs = np.concatenate(chosen)
    source = np.repeat(np.arange(len(chosen)), [len(some) for some in chosen])
    # One number for head, segment and chunk: positions have fewer than 40 bits, chunks fewer than 8.
    place = (runs[:, HEAD] << 48) + (runs[:, START] << 8) + runs[:, CHUNK]
    order = np.argsort(place, kind="stable")
    return np.column_stack([runs[order], source[order]])


def _units(table: Runs, key_bits: int) -> tuple[Runs, npt.NDArray[np.bool_]]:
    """How many units of key scales each run needs, and which runs bring theirs: those of a segment may share one."""
    if key_bits == 8:
        same = np.zeros(len(table), np.bool_)
        same[1:] = (table[1:, [HEAD, START]] == table[:-1, [HEAD, START]]).all(1)
        return np.ones(len(table), np.int64), ~same
    needed = -(-table[:, ROWS] // GROUP) if key_bits == 4 else np.zeros(len(table), np.int64)
    return needed, np.ones(len(table), np.bool_)


class _Places:
    """Where the rows of a result lie in planes of several sources.

    source, first, length: of each run, in the order of the result; `sizes`: rows of each source.
    """

    def __init__(self, source: Runs, first: Runs, length: Runs, sizes: Sequence[int], device: torch.device) -> None:
        self._device = device
        some = length > 0
        source, first, length = source[some], first[some], length[some]
        follows = (source[1:] == source[:-1]) & (first[1:] == (first + length)[:-1])
        begins = np.append(True, ~follows)[: len(source)]
        self._slices: list[tuple[int, int, int]] = []
        self._index: Tensor | None = None
        if np.count_nonzero(begins) > (FEW_ON_DEVICE if device.type == "cuda" else FEW):
            self._index = numbers_of(first + (np.cumsum([0, *sizes])[:-1])[source], length, device)
        else:
            ends = np.append(~follows, True)[: len(source)]
            lows, highs = first[begins].tolist(), (first + length)[ends].tolist()
            self._slices = list(zip(source[begins].tolist(), lows, highs, strict=True))

    def take(self, planes: Sequence[Tensor]) -> Tensor:
        """The rows, on the device: slice by slice if these are few, else by their numbers in all planes joined."""
        if not any(plane.shape[0] for plane in planes):  # a form has no such plane
            return torch.empty_like(planes[0], device=self._device)
        if self._index is not None:
            return self._joined(planes).index_select(0, self._index)
        # `narrow` takes half the time of a slice, and there are as many as heads and segments, in every layer.
        parts = [planes[source].narrow(0, low, high - low) for source, low, high in self._slices]
        return torch.cat([part.to(self._device) for part in parts] or [planes[0][:0].to(self._device)])

    def _joined(self, planes: Sequence[Tensor]) -> Tensor:
        """All planes, one after the other, on the device; neighbours in host memory are copied there at once."""
        parts = []
        for device, some in groupby(planes, lambda plane: plane.device):
            given = list(some)
            if device != self._device:
                parts.append(_uploaded(given, self._device))
            else:
                parts.append(given[0] if len(given) == 1 else torch.cat(given))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def numbers_of(first: Runs, length: Runs, device: torch.device) -> Tensor:
    """The rows of all runs, one after the other: (N,) int64 on the device."""
    shift = torch.from_numpy(np.stack([first - (np.cumsum(length) - length), length])).to(device)
    index = torch.repeat_interleave(shift[0], shift[1], output_size=int(length.sum()))
    return index.add_(torch.arange(len(index), device=device))


def _uploaded(planes: Sequence[Tensor], device: torch.device) -> Tensor:
    """Planes in host memory, one after the other, on the device, which copies them while this thread goes on."""
    first, rows, pinned = planes[0], sum(plane.shape[0] for plane in planes), device.type == "cuda"
    # Scales are float16, or float32 in the rare frame where they overflow it.
    dtype = reduce(torch.promote_types, {plane.dtype for plane in planes})
    whole = torch.empty(rows, *first.shape[1:], dtype=dtype, pin_memory=pinned)
    torch.cat(list(planes), out=whole)
    return whole.to(device, non_blocking=True)
