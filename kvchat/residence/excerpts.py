"""Some tokens of several segments on their way into memory, all at once: what a question brings back.

Frames are read, checked and cut by the pool's threads; what is left of them is joined as whole conversations are
(`assembly.py`). What comes out is what `Loading` gives, segment by segment and frame by frame.

Letters: G layers of a frame, H KV heads, P pieces, N rows of a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from kvchat.cache.assembly import Arrays, Batch, Counts
from kvchat.cache.assembly import Part as Frame
from kvchat.cache.coded import GROUP, UNIT_PLANES, CodedKV, Form, num_units
from kvchat.cache.layer import Piece
from kvchat.cache.pack import Spans, inside_groups, rows_of, within
from kvchat.codecs import decoded
from kvchat.codecs.coded import coded_arrays, form_of
from kvchat.errors import CorruptFrame
from kvchat.pool import submit
from kvchat.residence.loading import Fetch, Resident, assembly_of


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What is left of a frame.

    Attributes:
        resident, chunk, first, last: of which segment, rank chunk and layers.
        counts: (G, H) rows.
        arrays: its planes.
    """

    resident: Resident
    chunk: int
    first: int
    last: int
    counts: Counts
    arrays: Arrays


def excerpts(
    residents: Sequence[Resident], fetch: Fetch, pool: Executor, device: torch.device, encoded: bool
) -> list[tuple[CodedKV, ...]]:
    """The rows of segments, in order of their positions, within their spans: of every layer those of each form.

    encoded: whether they stay so, on the device; else they are plain numbers.

    Raises:
        CodecError: a frame is damaged; or has scales that float16 does not hold, and must be attached by itself.
    """
    cutting = [
        submit(pool, partial(_cut, one, chunk, group, read)).result
        for one in residents
        for chunk, group, read in fetch(one.id, range(one.chunks))
    ]
    forms: dict[Form, list[Cut]] = {}
    for cut in [done() for done in cutting]:
        forms.setdefault(form_of(cut.resident.header.method(cut.chunk)), []).append(cut)
    joined = [_joined(form, forms[form], device) for form in sorted(forms, reverse=True)]
    if not encoded:
        wanted = tuple(span for one in residents for span in one.part.spans or ((one.start, one.end),))
        joined = [[_plain(rows, wanted) for rows in layers] for layers in joined]
    return list(zip(*joined, strict=True))


def _plain(rows: CodedKV, spans: Spans) -> CodedKV:
    """Rows as numbers; of keys in 4 bits what came along with a group is left out."""
    numbers = CodedKV.numbers(decoded(rows), rows.runs)
    return within(numbers, spans) if rows.form.key_bits == 4 else numbers


def _cut(resident: Resident, chunk: int, group: int, read: Callable[[], bytes]) -> Cut:
    """The rows of a frame that lie in the segment's spans and in use. Raises CorruptFrame."""
    header = resident.header
    arrays, form = coded_arrays(header, chunk, group, read()), form_of(header.method(chunk))
    first, last = header.layers(group)
    counts = header.ranking.counts(chunk)[first:last]
    run, offset = rows_of(counts.reshape(-1))
    chosen = _in_spans(resident, arrays["positions"])
    if form.key_bits == 4:
        chosen = inside_groups(chosen, offset)
    chosen &= arrays["positions"] < resident.end
    left = np.bincount(run[chosen], minlength=counts.size).reshape(counts.shape)
    units = _units(form, counts, run, offset, chosen)
    kept = {name: plane[units if name in UNIT_PLANES else chosen] for name, plane in arrays.items()}
    return Cut(resident, chunk, first, last, left, kept)


def _in_spans(resident: Resident, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which rows are of tokens in the segment's spans; all if it has none."""
    inside = np.full(positions.shape, fill_value=not resident.part.spans)
    for low, high in resident.part.spans:
        inside |= (positions >= low) & (positions < high)
    return inside


def _units(
    form: Form, counts: Counts, run: Counts, offset: Counts, chosen: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """The numbers of the units of key scales that stay, of keys in 4 bits."""
    units = num_units(form, counts).reshape(-1)
    begins = np.flatnonzero(chosen & (offset % GROUP == 0))
    found: npt.NDArray[np.int64] = (np.cumsum(units) - units)[run[begins]] + offset[begins] // GROUP
    return found


def _joined(form: Form, cuts: Sequence[Cut], device: torch.device) -> list[CodedKV]:
    """All rows of one form, layer by layer, on the device."""
    pieces = [[*some] for _, some in groupby(cuts, lambda cut: (cut.resident.start, cut.chunk))]
    counts = np.stack([np.concatenate([cut.counts for cut in some]) for some in pieces])
    assembly = assembly_of(form, [(some[0].resident, some[0].chunk) for some in pieces], counts, device)
    parts = [Frame(index, cut.first, cut.last) for index, some in enumerate(pieces) for cut in some]
    batch = Batch(assembly, parts)
    for index, cut in enumerate(cuts):
        if not batch.fill(index, cut.arrays):
            raise CorruptFrame(f"chunk {cut.chunk} of layers {cut.first} on has scales beyond float16")
    batch.land()
    return assembly.finished()


def by_layer(pieces: Mapping[Piece, Sequence[CodedKV]], layers: int) -> list[tuple[CodedKV, ...]]:
    """Pieces, of every layer, as `excerpts` gives them."""
    return [tuple(rows[layer] for rows in pieces.values()) for layer in range(layers)]
