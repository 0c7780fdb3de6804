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
from kvchat.cache.pack import Spans, inside_groups, pack, rows_of, split, within
from kvchat.codecs import decoded
from kvchat.codecs.coded import coded_arrays, coded_rows, form_of
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
    header = resident.header
    arrays, form = coded_arrays(header, chunk, group, read()), form_of(header.method(chunk))
    first, last = header.layers(group)
    counts = header.ranking.counts(chunk)[first:last]
    run, offset = rows_of(counts.reshape(-1))
    chosen = _in_spans(resident, arrays["positions"])
    if form.key_bits == 4:
        chosen = inside_groups(chosen, offset)
    rows = np.flatnonzero(chosen & (arrays["positions"] < resident.end))
    units, begins = num_units(form, counts.reshape(-1)), rows[offset[rows] % GROUP == 0]
    of_units = (np.cumsum(units) - units)[run[begins]] + offset[begins] // GROUP
    left = np.bincount(run[rows], minlength=counts.size).reshape(counts.shape)
    kept = {name: plane[of_units if name in UNIT_PLANES else rows] for name, plane in arrays.items()}
    cut = coded_rows(header, chunk, first, left, kept)
    cut.runs[:, HEAD] += first * header.num_kv_heads
    return replace(cut, num_heads=header.num_layers * header.num_kv_heads)


def _in_spans(resident: Resident, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which rows are of tokens in the segment's spans; all if it has none."""
    inside = np.full(positions.shape, fill_value=not resident.part.spans)
    for low, high in resident.part.spans:
        inside |= (positions >= low) & (positions < high)
    return inside


def by_layer(pieces: Mapping[Piece, Sequence[CodedKV]], layers: int) -> list[tuple[CodedKV, ...]]:
    """Pieces, of every layer, as `excerpts` gives them."""
    return [tuple(rows[layer] for rows in pieces.values()) for layer in range(layers)]
