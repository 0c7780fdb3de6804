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
import torch

from kvchat.cache.coded import GROUP, HEAD, START, UNIT_PLANES, CodedKV, Form, num_units
from kvchat.cache.layer import Piece
from kvchat.cache.pack import inside_groups, pack, split, stretch
from kvchat.codecs import decoded
from kvchat.codecs.coded import coded_parts, coded_rows, form_of
from kvchat.pool import submit
from kvchat.residence.loading import Fetch, Resident


def excerpts(
    residents: Sequence[Resident], fetch: Fetch, pool: Executor, device: torch.device, encoded: bool
) -> list[tuple[CodedKV, ...]]:
    """The rows of segments, in order of their positions, stretch by stretch: of every layer those of each form.

    encoded: whether they stay so, on the device; else they are plain numbers.

    Raises CodecError if a frame is damaged.
    """
    cutting = [
        submit(pool, partial(_cut, one, chunk, group, read)).result
        for one in residents
        for chunk, group, read in fetch(one.id, range(one.chunks))
    ]
    forms: dict[Form, list[CodedKV]] = {}
    while cutting:  # what is read is not held longer than until it is packed
        for cut in cutting.pop(0)():
            forms.setdefault(cut.form, []).append(cut)
    joined = list[CodedKV]()
    for form in sorted(forms, reverse=True):
        cuts = forms.pop(form)
        joined.append(pack(cuts, [cut.runs for cut in cuts], device))
    del cut, cuts
    if not encoded:
        ends = {low: high for one in residents for low, high in one.stretches}
        joined = [_plain(rows, ends) for rows in joined]
    layers = residents[0].header.num_layers
    return list(zip(*(split(rows, layers) for rows in joined), strict=True))


def _plain(rows: CodedKV, ends: Mapping[int, int]) -> CodedKV:
    """Rows as numbers; of keys in 4 bits what came along with a group is left out. `ends`: of stretches, by start."""
    numbers = CodedKV.numbers(decoded(rows), rows.runs)
    if rows.form.key_bits != 4:
        return numbers
    starts = np.unique(rows.runs[:, START]).tolist()
    single = [replace(numbers, runs=numbers.runs[numbers.runs[:, START] == low]) for low in starts]
    runs = [stretch(some, low, ends[low]).runs for low, some in zip(starts, single, strict=True)]
    return pack([numbers], [np.concatenate(runs)], rows.keys.device)


def _cut(resident: Resident, chunk: int, group: int, read: Callable[[], bytes]) -> list[CodedKV]:
    """The rows of a frame that lie in each of the segment's stretches, as those of one layer. Raises CorruptFrame."""
    header, form = resident.header, form_of(resident.header.method(chunk))
    arrays, (first, last) = coded_parts(header, chunk, group, read()), header.layers(group)
    times = np.arange(resident.start, header.ranking.end)
    there = header.ranking.chunk_of[first:last].reshape(-1, len(times)) == chunk
    offset = there.cumsum(1, dtype=np.int32) - 1
    counts = offset[:, -1].astype(np.int64) + 1
    firsts, units, cuts = counts.cumsum() - counts, num_units(form, counts), list[CodedKV]()
    for low, high in resident.stretches:
        chosen = there & (times >= low) & (times < high)
        if form.key_bits == 4:
            chosen[there] = inside_groups(chosen[there], offset[there])
        chosen &= times < resident.end
        run, time = np.divmod(np.flatnonzero(chosen), len(times))  # numpy's `nonzero` is slow in two dimensions
        number = offset[run, time]
        begins = np.flatnonzero(number % GROUP == 0)
        taken = {
            True: (units.cumsum() - units)[run[begins]] + number[begins] // GROUP,
            False: firsts[run] + number,
        }
        kept = {name: plane.take(taken[name in UNIT_PLANES], axis=0) for name, plane in arrays.items()}
        kept["positions"] = (time + resident.start).astype(np.int32)
        left = np.bincount(run, minlength=len(counts)).reshape(last - first, -1)
        cut = coded_rows(header, chunk, first, left, kept)
        cut.runs[:, HEAD] += first * header.num_kv_heads
        cut.runs[:, START] = low
        cuts.append(replace(cut, num_heads=header.num_layers * header.num_kv_heads))
    return cuts


def by_layer(pieces: Mapping[Piece, Sequence[CodedKV]], layers: int) -> list[tuple[CodedKV, ...]]:
    """Pieces, of every layer, as `excerpts` gives them."""
    return [tuple(rows[layer] for rows in pieces.values()) for layer in range(layers)]
