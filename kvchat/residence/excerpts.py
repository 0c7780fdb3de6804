"""Some tokens of several segments on their way into memory, all at once: what a question brings back.

Frames are read, checked and cut by the pool's threads. What is left of them is packed once, all layers as if they were
one that has the heads of all, for a layer has few such rows, and each operation costs more than its bytes. What comes
out is what `Loading` gives, segment by segment and frame by frame.

Letters: L layers, H KV heads, N rows of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from kvchat.cache.coded import GROUP, HEAD, UNIT_PLANES, CodedKV, Form, num_units
from kvchat.cache.layer import Piece
from kvchat.cache.pack import Spans, pack, split, within
from kvchat.codecs import decoded
from kvchat.codecs.coded import coded_parts, coded_rows, form_of
from kvchat.pool import submit
from kvchat.residence.loading import Fetch, Resident


def excerpts(
    residents: Sequence[Resident], fetch: Fetch, pool: Executor, device: torch.device, encoded: bool
) -> list[tuple[CodedKV, ...]]:
    """The rows of segments, in order of their positions, within their spans: of every layer those of each form.

    encoded: whether they stay so, on the device; else they are plain numbers.

    Raises CodecError if a frame is damaged.
    """
    cutting = [
        submit(pool, partial(_cut, one, chunk, group, read)).result
        for one in residents
        for chunk, group, read in fetch(one.id, range(one.chunks))
    ]
    forms: dict[Form, list[CodedKV]] = {}
    for cut in [done() for done in cutting]:
        forms.setdefault(cut.form, []).append(cut)
    joined = [pack(cuts, [cut.runs for cut in cuts], device) for _, cuts in sorted(forms.items(), reverse=True)]
    if not encoded:
        wanted = tuple(span for one in residents for span in one.part.spans or ((one.start, one.end),))
        joined = [_plain(rows, wanted) for rows in joined]
    layers = residents[0].header.num_layers
    return list(zip(*(split(rows, layers) for rows in joined), strict=True))


def _plain(rows: CodedKV, spans: Spans) -> CodedKV:
    """Rows as numbers; of keys in 4 bits what came along with a group is left out."""
    numbers = CodedKV.numbers(decoded(rows), rows.runs)
    if rows.form.key_bits != 4:
        return numbers
    inside = within(numbers, spans)
    return pack([inside], [inside.runs], rows.keys.device)


def _cut(resident: Resident, chunk: int, group: int, read: Callable[[], bytes]) -> CodedKV:
    """The rows of a frame that lie in the segment's spans and in use, as those of one layer. Raises CorruptFrame."""
    header, form = resident.header, form_of(resident.header.method(chunk))
    arrays, (first, last) = coded_parts(header, chunk, group, read()), header.layers(group)
    there = header.ranking.chunk_of[first:last].reshape(-1, resident.header.ranking.chunk_of.shape[2]) == chunk
    offset = there.cumsum(1, dtype=np.int32) - 1
    counts = offset[:, -1].astype(np.int64) + 1
    chosen = _chosen(resident, there, offset // GROUP if form.key_bits == 4 else None)
    run, time = np.divmod(np.flatnonzero(chosen), there.shape[1])  # numpy's `nonzero` is slow in two dimensions
    firsts, units, offset = counts.cumsum() - counts, num_units(form, counts), offset[run, time]
    begins = np.flatnonzero(offset % GROUP == 0)
    taken = {
        True: (units.cumsum() - units)[run[begins]] + offset[begins] // GROUP,
        False: firsts[run] + offset,
    }
    kept = {name: plane.take(taken[name in UNIT_PLANES], axis=0) for name, plane in arrays.items()}
    kept["positions"] = (time + resident.start).astype(np.int32)
    left = np.bincount(run, minlength=len(counts)).reshape(last - first, -1)
    cut = coded_rows(header, chunk, first, left, kept)
    cut.runs[:, HEAD] += first * header.num_kv_heads
    return replace(cut, num_heads=header.num_layers * header.num_kv_heads)


def _chosen(
    resident: Resident, there: npt.NDArray[np.bool_], groups: npt.NDArray[np.int32] | None
) -> npt.NDArray[np.bool_]:
    """Which tokens of the runs (R, T) that have those `there` are to come; given their groups, with these whole."""
    times = np.arange(there.shape[1]) + resident.start
    inside = np.full(times.shape, fill_value=not resident.part.spans)
    for low, high in resident.part.spans:
        inside |= (times >= low) & (times < high)
    chosen: npt.NDArray[np.bool_] = there & inside
    if groups is not None:
        runs = np.arange(len(there))[:, None]
        touched = np.zeros((len(there), int(groups.max(initial=0)) + 1), np.bool_)
        touched[(runs + 0 * groups)[chosen], groups[chosen]] = True
        chosen = there & touched[runs, groups]
    return chosen & (times < resident.end)


def by_layer(pieces: Mapping[Piece, Sequence[CodedKV]], layers: int) -> list[tuple[CodedKV, ...]]:
    """Pieces, of every layer, as `excerpts` gives them."""
    return [tuple(rows[layer] for rows in pieces.values()) for layer in range(layers)]
