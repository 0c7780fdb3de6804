"""Where each rank chunk lies: memory holds a prefix of every segment's ranking, the store all of it or a longer one.

Shrinking drops the last chunks, growing fetches them back; both give the same rows as if the segment had been
attached so. Tiers do not import the store: they are given a `fetch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from kvchat.cache.coded import CHUNK, START, CodedKV
from kvchat.cache.layer import Piece
from kvchat.cache.pack import before
from kvchat.cache.ragged import SegmentedCache
from kvchat.codecs import SegmentHeader, coded_frame, decode_frame, decoded
from kvchat.compress.allocate import chunks_held
from kvchat.config import CompressConfig
from kvchat.errors import CodecError
from kvchat.pool import submit
from kvchat.records import SegmentRecord

Fetch = Callable[[str, Sequence[int]], Iterable[tuple[int, int, bytes]]]
"""Segment id and chunks to (chunk, group, blob), ordered by chunk and group; raises CorruptFrame."""


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A sealed segment whose first `chunks` chunks are in memory."""

    id: str
    header: SegmentHeader
    end: int
    """One past the last position in use: the segment's own end, or less after a rewind into it."""
    chunks: int
    from_file: bool = False

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.header.ranking.start


class Loading:
    """Rank chunks of a segment on their way into memory, decoded on the pool's threads."""

    def __init__(self, resident: Resident, decoding: Sequence[tuple[int, Callable[[], list[CodedKV]]]]) -> None:
        self.resident = resident
        self._decoding = decoding

    def pieces(self) -> dict[Piece, list[CodedKV]]:
        """Rows before the resident's end, a CodedKV a layer; waits for them. Raises CodecError."""
        resident, pieces = self.resident, dict[Piece, list[CodedKV]]()
        for chunk, rows in self._decoding:
            pieces.setdefault(Piece(resident.start, chunk), []).extend(rows())
        if resident.end < resident.header.ranking.end:
            return {piece: [before(rows, resident.end) for rows in layers] for piece, layers in pieces.items()}
        return pieces


class Tiers:
    """The sealed segments of one conversation, and how much of each is in its cache.

    Args:
        cache: where rows go.
        fetch: where they come from.
        pool: threads that decode.
    """

    def __init__(self, cache: SegmentedCache, fetch: Fetch, pool: Executor) -> None:
        self.cache = cache
        self.residents: list[Resident] = []
        self._fetch = fetch
        self._pool = pool

    def load(self, resident: Resident, first: int = 0) -> Loading:
        """Read the resident's chunks from `first` on, and begin to decode them. Raises CorruptFrame."""
        header = resident.header
        return Loading(
            resident,
            [
                (chunk, self._decoding(header, chunk, group, blob))
                for chunk, group, blob in self._fetch(resident.id, range(first, resident.chunks))
            ],
        )

    def _decoding(self, header: SegmentHeader, chunk: int, group: int, blob: bytes) -> Callable[[], list[CodedKV]]:
        # What stays encoded is joined in host memory, and copied to the device once a layer.
        plain = None if self.cache.encoded else self.cache.layers[0].device
        return submit(self._pool, partial(_read, header, chunk, group, blob, plain)).result

    def add(self, loaded: Mapping[Resident, Mapping[Piece, Sequence[CodedKV]]], tail: int = 0) -> None:
        """Attach loaded segments, all at once, in place of the first `tail` tokens of the tail."""
        if not loaded:
            return
        pieces = {piece: rows for one in loaded.values() for piece, rows in one.items()}
        self.cache.attach(pieces, max(resident.end for resident in loaded), tail)
        self.residents = sorted([*self.residents, *loaded], key=lambda one: one.start)

    def seal(self, resident: Resident, groups: Iterable[tuple[int, Sequence[Sequence[CodedKV]]]], tokens: int) -> None:
        """Attach a new segment in place of the first `tokens` of the tail, a group of layers at a time as they come.

        groups: the first layer of each, and the pieces of each of its layers. If one does not come, none is attached.
        """
        with self.cache.attaching(tokens):
            for first, layers in groups:
                for layer, pieces in zip(self.cache.layers[first:], layers, strict=False):
                    layer.attach([self._as_held(part) for part in pieces])
                del layers  # or they would be in memory beside the next
        self.residents = sorted([*self.residents, resident], key=lambda one: one.start)

    def _as_held(self, part: CodedKV) -> CodedKV:
        """A piece as rows lie in this cache."""
        return part if self.cache.encoded else CodedKV.plain(decoded(part), *part.runs[0, [START, CHUNK]].tolist())

    def hold(self, wanted: Mapping[str, int]) -> list[Resident]:
        """Shrink or grow segments to so many chunks, shrinks first so that the peak stays low.

        Returns the segments of which chunks that were to come are damaged; they stay as small as they were.
        """
        shrunk = [replace(one, chunks=min(one.chunks, wanted.get(one.id, one.chunks))) for one in self.residents]
        held = {Piece(one.start, chunk) for one in shrunk for chunk in range(one.chunks)}
        self.residents, damaged, pieces = shrunk, list[Resident](), dict[Piece, list[CodedKV]]()
        if held != set(self.cache.pieces):  # this time, or when memory ran out before
            self.cache.keep(held)
        grown = list(shrunk)
        for index, one in enumerate(shrunk):
            if (chunks := wanted.get(one.id, one.chunks)) > one.chunks:
                larger = replace(one, chunks=chunks)
                try:
                    pieces |= self.load(larger, first=one.chunks).pieces()
                    grown[index] = larger
                except CodecError:
                    damaged.append(one)
        if pieces:  # all at once: every attaching packs all rows anew
            self.cache.attach(pieces, self.cache.tail_start)
            self.residents = grown
        return damaged

    def crop(self, position: int) -> None:
        """Forget every token from `position` on."""
        self.cache.crop(position)
        kept = [one for one in self.residents if one.start < position]
        self.residents = [replace(one, end=min(one.end, position)) for one in kept]

    def rows(self, resident: Resident) -> int:
        """Pairs in memory."""
        held = (Piece(resident.start, chunk) for chunk in range(resident.chunks))
        return sum(self.cache.rows(piece) for piece in held)


def _read(header: SegmentHeader, chunk: int, group: int, blob: bytes, plain: torch.device | None) -> list[CodedKV]:
    """The rows of a frame, a CodedKV a layer: encoded in host memory, or plain on a device. Raises CorruptFrame."""
    if plain is None:
        return coded_frame(header, chunk, group, blob)
    start = header.ranking.start
    return [CodedKV.plain(rows, start, chunk) for rows in decode_frame(header, chunk, group, blob, plain)]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of a ranking what counts: a byte for each pair is too much to keep of all segments at once."""

    sizes: npt.NDArray[np.int64]
    scores: tuple[float, ...] | None


def would_hold(config: CompressConfig, records: Sequence[SegmentRecord], end: int) -> list[int]:
    """Chunks that memory would hold of a session's sealed segments, if it were restored up to `end`.

    All that are stored of a segment whose header cannot be read, or is that of another.
    """
    known: dict[int, _Sizes] = {}
    for index, record in enumerate(records):
        with suppress(CodecError):
            ranking = SegmentHeader.of(record).ranking
            known[index] = _Sizes(ranking.sizes, ranking.scores)
    segments = [(sizes, records[index].end) for index, sizes in known.items()]
    stored = [records[index].stored_chunks for index in known]
    held = dict(zip(known, chunks_held(config, segments, stored, end), strict=True))
    return [held.get(index, record.stored_chunks) for index, record in enumerate(records)]
