"""Sealed segments on their way from the store into memory: some rank chunks of one, or a whole conversation's at once.

The pool's threads read frames, check and decode them. Where rows stay encoded, `assembled` has them copy all planes of
a conversation into batches, which go to the device as a whole; what comes out is what attaching the segments one after
the other gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product, zip_longest

import numpy as np
import torch

from kvchat.cache.assembly import Assembly, Batch, Counts
from kvchat.cache.assembly import Part as Frame
from kvchat.cache.coded import UNIT_PLANES, CodedKV, Form
from kvchat.cache.layer import Piece
from kvchat.cache.pack import Spans, before, stretch
from kvchat.codecs import SegmentHeader, coded_frame, decode_frame
from kvchat.codecs.coded import coded_arrays, form_of
from kvchat.errors import CorruptFrame
from kvchat.pool import submit

BATCH_BYTES = 128 * 1024 * 1024
"""Of a batch, unless a single frame is larger."""

Fetch = Callable[[str, Sequence[int]], Iterable[tuple[int, int, Callable[[], bytes]]]]
"""Segment id and chunks to (chunk, group, what reads the blob), ordered by chunk and group; both raise CorruptFrame."""


@dataclass(frozen=True, slots=True)
class Part:
    """Only the tokens at places [low, high) of each span are in memory; without spans all.

    Each is a stretch by itself, which can stand anywhere: its rows bear the place of its own first token.
    """

    spans: Spans = ()


WHOLE = Part()
"""All tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A sealed segment whose first `chunks` chunks are in memory."""

    id: str
    header: SegmentHeader
    end: int
    """One past the last position in use: the segment's own end, or less after a rewind into it."""
    chunks: int
    from_file: bool = False
    part: Part = WHOLE

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.header.ranking.start

    @property
    def stretches(self) -> Spans:
        """The tokens that are in memory."""
        spans = self.part.spans or ((self.start, self.end),)
        return tuple((low, min(high, self.end)) for low, high in spans if low < self.end)

    @property
    def pieces(self) -> list[Piece]:
        """What lies in the cache of it."""
        return [Piece(low, chunk) for low, _ in self.stretches for chunk in range(self.chunks)]


Chunks = Sequence[tuple[Resident, int]]
"""Rank chunks of segments, in canonical order."""
Place = tuple[SegmentHeader, int, int]
"""A frame's segment, chunk and group."""


class Loading:
    """Rank chunks of a segment, from `first` on, on their way into memory, decoded on the pool's threads.

    plain: the device on which rows become plain numbers; None: they stay encoded, in host memory.
    """

    def __init__(
        self, resident: Resident, first: int, fetch: Fetch, pool: Executor, plain: torch.device | None
    ) -> None:
        self.resident = resident
        self._decoding = [
            (chunk, submit(pool, partial(_read, resident.header, chunk, group, read, plain)).result)
            for chunk, group, read in fetch(resident.id, range(first, resident.chunks))
        ]

    def pieces(self) -> dict[Piece, list[CodedKV]]:
        """Rows before the resident's end, a CodedKV a layer; waits for them. Raises CodecError."""
        resident, pieces = self.resident, dict[Piece, list[CodedKV]]()
        for chunk, rows in self._decoding:
            layers = rows()
            for low, high in resident.stretches:
                some = [stretch(one, low, high) for one in layers] if resident.part.spans else layers
                pieces.setdefault(Piece(low, chunk), []).extend(some)
        if resident.end < resident.header.ranking.end:
            return {piece: [before(rows, resident.end) for rows in layers] for piece, layers in pieces.items()}
        return pieces


def _read(
    header: SegmentHeader, chunk: int, group: int, read: Callable[[], bytes], plain: torch.device | None
) -> list[CodedKV]:
    """The rows of a frame, a CodedKV a layer: encoded in host memory, or plain on a device. Raises CorruptFrame."""
    blob = read()
    if plain is None:
        return coded_frame(header, chunk, group, blob)
    start = header.ranking.start
    return [CodedKV.plain(rows, start, chunk) for rows in decode_frame(header, chunk, group, blob, plain)]


def assembled(
    residents: Sequence[Resident], fetch: Fetch, pool: Executor, device: torch.device
) -> list[tuple[CodedKV, ...]]:
    """All rows of segments, at least one, in order of their positions: of every layer those of each form.

    Raises:
        CodecError: a frame is damaged; or has scales that float16 does not hold, and must be attached by itself.
    """
    forms: dict[Form, list[tuple[Resident, int]]] = {}
    for resident in residents:
        for chunk in range(resident.chunks):
            forms.setdefault(form_of(resident.header.method(chunk)), []).append((resident, chunk))
    of_forms = []
    for form in sorted(forms, reverse=True):
        counts = np.stack([one.header.ranking.counts(chunk) for one, chunk in forms[form]])
        assembly = assembly_of(form, forms[form], counts, device)
        _bring(assembly, forms[form], fetch, pool)
        of_forms.append(assembly.finished())
    return list(zip(*of_forms, strict=True))


def assembly_of(form: Form, chunks: Chunks, counts: Counts, device: torch.device) -> Assembly:
    """Room for the rows of these chunks, of which there are (P, L, H) `counts`."""
    header = chunks[0][0].header
    # The scales of 8-bit keys serve a whole segment, and stand in its header.
    scaled = [one.header for one, _ in groupby(one for one, _ in chunks)] if form.key_bits == 8 else []
    return Assembly(
        form,
        header.dtype,
        [Piece(one.start, chunk) for one, chunk in chunks],
        counts,
        [np.stack([each.params[name] for each in scaled], axis=2) for name in UNIT_PLANES if scaled],
        header.head_dim,
        device,
    )


def _bring(assembly: Assembly, chunks: Chunks, fetch: Fetch, pool: Executor) -> None:
    """Bring all rows to their places."""
    readings = _readings(chunks, fetch)
    for parts, places in _batches(assembly, chunks):
        batch = Batch(assembly, parts)
        filling = [submit(pool, partial(_fill, batch, i, *place, next(readings))) for i, place in enumerate(places)]
        for filled in filling:
            filled.result()
        # Not beside the next batch: with many threads at work each small operation waits for the interpreter.
        batch.land()
        del batch, filling, filled  # or they would be in memory beside the next


def _readings(chunks: Chunks, fetch: Fetch) -> Iterator[Callable[[], bytes]]:
    """What reads each frame, by segment, chunk and group. Raises CorruptFrame if the store has others."""
    for one, places in groupby(chunks, lambda place: place[0]):
        asked = [chunk for _, chunk in places]
        wanted = product(asked, range(one.header.num_groups))
        for place, (chunk, group, read) in zip_longest(wanted, fetch(one.id, asked), fillvalue=(-1, -1, bytes)):
            if place != (chunk, group):
                raise CorruptFrame(f"a segment has other frames than its header says: chunk {chunk}, group {group}")
            yield read


def _batches(assembly: Assembly, chunks: Chunks) -> Iterator[tuple[list[Frame], list[Place]]]:
    """The frames of all chunks, as many together as a batch takes."""
    parts: list[Frame] = []
    places: list[Place] = []
    filled = 0
    for index, (resident, chunk) in enumerate(chunks):
        for group in range(resident.header.num_groups):
            part = Frame(index, *resident.header.layers(group))
            size = assembly.nbytes(part)
            if parts and filled + size > BATCH_BYTES:
                yield parts, places
                parts, places, filled = [], [], 0
            parts.append(part)
            places.append((resident.header, chunk, group))
            filled += size
    yield parts, places


def _fill(batch: Batch, index: int, header: SegmentHeader, chunk: int, group: int, read: Callable[[], bytes]) -> None:
    if not batch.fill(index, coded_arrays(header, chunk, group, read())):
        raise CorruptFrame(f"chunk {chunk} of layer group {group} has scales beyond float16")
