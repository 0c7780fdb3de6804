"""Where each rank chunk lies: memory holds a prefix of every segment's ranking, the store all of it or a longer one.

Shrinking drops the last chunks, growing fetches them back; both give the same rows as if the segment had been
attached so. Tiers do not import the store: they are given a `fetch`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from kvchat.cache.coded import CHUNK, START, CodedKV
from kvchat.cache.layer import Piece
from kvchat.cache.ragged import SegmentedCache
from kvchat.codecs import SegmentHeader, decoded
from kvchat.compress.allocate import chunks_held
from kvchat.errors import CodecError
from kvchat.residence.excerpts import by_layer, excerpts
from kvchat.residence.loading import WHOLE, Fetch, Loading, Part, Resident, assembled
from kvchat.sections import CompressConfig
from kvchat.store.records import SegmentRecord


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

    def bring(self, residents: Sequence[Resident]) -> int:
        """Attach the leading segments, all at once, as far as they are whole; how many those are."""
        brought, loading, ready = self._assemble(residents), [], {}
        with suppress(CodecError):
            for resident in residents[brought:]:
                loading.append(self.load(resident))
        with suppress(CodecError):
            for one in loading:
                ready[one.resident] = one.pieces()
        self.add(ready)
        return brought + len(ready)

    def _assemble(self, residents: Sequence[Resident]) -> int:
        """Attach leading segments to an empty cache in which rows stay encoded; how many, none if one is damaged.

        Of a segment that is used in part, what is beyond goes after it has come.
        """
        whole = [*takewhile(lambda one: one.end == one.header.ranking.end, residents)]
        chosen = residents[: len(whole) + 1]
        if not (self.cache.encoded and any(one.chunks for one in chosen)) or self.cache.num_seen:
            return 0
        with suppress(CodecError):  # which it is comes out when they are attached one by one
            rows = assembled(chosen, self._fetch, self._pool, self.cache.layers[0].device)
            self.cache.place(rows, chosen[-1].header.ranking.end)
            self.cache.crop(chosen[-1].end)
            self.residents = list(chosen)
            return len(chosen)
        return 0

    def load(self, resident: Resident, first: int = 0) -> Loading:
        """Read the resident's chunks from `first` on, and begin to decode them. Raises CorruptFrame."""
        # What stays encoded is joined in host memory, and copied to the device once a layer.
        plain = None if self.cache.encoded else self.cache.layers[0].device
        return Loading(resident, first, self._fetch, self._pool, plain)

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

    def know(self, resident: Resident) -> None:
        """A segment nothing of which is in memory yet, but will be (`hold`)."""
        self.residents = sorted([*self.residents, resident], key=lambda one: one.start)

    def forget(self, start: int) -> None:
        """Let go the segment at `start`."""
        self.residents = [one for one in self.residents if one.start != start]
        self.cache.keep([piece for one in self.residents for piece in one.pieces])

    def hold(self, wanted: Mapping[str, int], parts: Mapping[str, Part] | None = None) -> list[Resident]:
        """Shrink or grow segments to so many chunks: in one go, for every time all rows are packed anew.

        Where memory ran out when that was tried before, shrinks come first, so that the peak is lower.

        parts: which tokens of some segments, of the others all; None: of each those that are there.
        Returns the segments of which chunks that were to come are damaged; they stay as small as they were.
        """
        asked = {one.id: one.part for one in self.residents} if parts is None else parts
        shrunk = [self._shrunk(one, wanted, asked.get(one.id, WHOLE)) for one in self.residents]
        larger = [replace(one, chunks=max(one.chunks, wanted.get(one.id, 0))) for one in shrunk]
        others = {one.start for one, old in zip(shrunk, self.residents, strict=True) if one.part != old.part}
        held = {piece for one in shrunk for piece in one.pieces}
        tidy, self.residents = self.is_tidy, shrunk
        if not tidy:
            self.cache.keep(held)
        rows, came = self._grown(shrunk, larger, others)
        if came:
            self.cache.exchange(held, rows)
            self.residents = [after if after.start in came else one for one, after in zip(shrunk, larger, strict=True)]
        else:
            self.cache.keep(held)
        damaged = [one for one, after in zip(shrunk, larger, strict=True) if after.chunks > one.chunks]
        self.residents = [one for one in self.residents if one.chunks]
        return [one for one in damaged if one.start not in came]

    @property
    def is_tidy(self) -> bool:
        """Whether all that is in memory is of residents, as it is unless memory ran out before some of it had gone."""
        held = {piece for one in self.residents for piece in one.pieces}
        return held.issuperset(self.cache.pieces)

    def _grown(
        self, shrunk: Sequence[Resident], larger: Sequence[Resident], others: Collection[int]
    ) -> tuple[list[tuple[CodedKV, ...]], set[int]]:
        """Rows that are to come, layer by layer, and the starts of segments that are not damaged.

        others: segments of which other tokens come than were there; those, of which nothing is there, come together.
        """
        grown = [(one, after) for one, after in zip(shrunk, larger, strict=True) if after.chunks > one.chunks]
        together = [after for _, after in grown if after.start in others]
        layers, device = self.cache.layers, self.cache.layers[0].device
        joined: list[tuple[CodedKV, ...]] = []
        if together:
            with suppress(CodecError):  # which it is comes out when they are read one by one
                joined = excerpts(together, self._fetch, self._pool, device, self.cache.encoded)
        came = {one.start for one in together} if joined else set[int]()
        pieces: dict[Piece, list[CodedKV]] = {}
        for one, after in grown:
            with suppress(CodecError):
                if after.start not in came:
                    pieces |= self.load(after, first=one.chunks).pieces()
                    came.add(after.start)
        single = by_layer(pieces, len(layers))
        return [(*some, *rest) for some, rest in zip(joined or [()] * len(layers), single, strict=True)], came

    @staticmethod
    def _shrunk(one: Resident, wanted: Mapping[str, int], part: Part) -> Resident:
        """A segment without what is not to be held; where other tokens are wanted of it, nothing is."""
        most = one.chunks if part == one.part else 0
        return replace(one, chunks=min(most, wanted.get(one.id, one.chunks)), part=part)

    def crop(self, position: int) -> None:
        """Forget every token from `position` on."""
        self.cache.crop(position)
        kept = [one for one in self.residents if one.start < position]
        self.residents = [replace(one, end=min(one.end, position)) for one in kept]

    def rows(self, resident: Resident) -> int:
        """Pairs in memory."""
        return sum(self.cache.rows(piece) for piece in resident.pieces)

    def nbytes(self, resident: Resident) -> int:
        """Bytes in memory, as its rows lie."""
        return sum(self.cache.nbytes(low) for low, _ in resident.stretches)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of a ranking what counts: a byte for each pair is too much to keep of all segments at once."""

    sizes: npt.NDArray[np.int64]
    scores: tuple[float, ...] | None
    method: str


def would_hold(config: CompressConfig, records: Sequence[SegmentRecord], end: int) -> list[int]:
    """Chunks that memory would hold of a session's sealed segments, if it were restored up to `end`.

    All that are stored of a segment whose header cannot be read, or is that of another.
    """
    known: dict[int, _Sizes] = {}
    for index, record in enumerate(records):
        with suppress(CodecError):
            ranking = SegmentHeader.of(record).ranking
            known[index] = _Sizes(ranking.sizes, ranking.scores, ranking.method)
    segments = [(sizes, records[index].end) for index, sizes in known.items()]
    stored = [records[index].stored_chunks for index in known]
    held = dict(zip(known, chunks_held(config, segments, stored, end), strict=True))
    return [held.get(index, record.stored_chunks) for index, record in enumerate(records)]
