"""All sealed segments of a conversation, in memory or not, and where those in memory stand for the network.

Nothing here touches rows.

Letters: C rank chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvchat.cache.pack import Spans
from kvchat.codecs import SegmentHeader
from kvchat.codecs.encode import packed_bytes, param_bytes
from kvchat.store.records import SegmentRecord


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a sealed segment without its header, which is too large to keep of hundreds.

    start, end   places of its tokens, up to one past the last in use
    offset       as of its `Ranking`, and so sizes (C,), scores and method
    nbytes       what each chunk takes in memory, (C,)
    stored       chunks that the store had when it was looked at
    from_file    as of its record
    lost         no KV of it is to be had: it is text only
    onward       that of the conversation when this was its newest segment
    """

    id: str
    start: int
    end: int
    offset: int
    sizes: npt.NDArray[np.int64]
    scores: tuple[float, ...] | None
    method: str
    nbytes: tuple[int, ...]
    stored: int
    from_file: bool = False
    lost: bool = False
    onward: int = 0

    @classmethod
    def of(cls, record: SegmentRecord, header: SegmentHeader, end: int, plain: int | None) -> Entry:
        """From a stored segment used up to `end`; plain: bytes of a pair in memory, or None where it stays encoded."""
        ranking = header.ranking
        if plain is None:
            each = [packed_bytes(header, chunk) for chunk in range(ranking.num_chunks)]
            each[0] += param_bytes(header)
        else:
            each = [plain * size for size in ranking.sizes.tolist()]
        return cls(
            record.id,
            record.start,
            end,
            ranking.offset,
            ranking.sizes,
            ranking.scores,
            ranking.method,
            tuple(each),
            record.stored_chunks,
            record.from_file,
            onward=ranking.next_offset,
        )

    @classmethod
    def missing(cls, start: int, end: int) -> Entry:
        """Tokens of which no segment is there any more."""
        return cls("", start, end, 0, np.zeros(1, np.int64), None, "", (0,), 0, lost=True)

    def stretch(self, low: int, high: int) -> Entry:
        """Only its tokens at places [low, high), as they stand by themselves; what they take is not counted anew."""
        return replace(self, start=low, end=min(high, self.end))

    def counted(self, header: SegmentHeader, spans: Spans) -> Entry:
        """With the pairs and bytes of these tokens alone."""
        ranking = header.ranking
        inside = np.zeros(ranking.chunk_of.shape[2], bool)
        for low, high in spans:
            inside[low - ranking.start : high - ranking.start] = True
        some = ranking.chunk_of[:, :, inside]
        sizes = np.array([np.count_nonzero(some == chunk) for chunk in range(ranking.num_chunks)], np.int64)
        nbytes = -(-np.array(self.nbytes) * sizes // np.maximum(1, self.sizes))
        return replace(self, sizes=sizes, nbytes=tuple(nbytes.tolist()))

    @property
    def num_chunks(self) -> int:
        """C."""
        return len(self.sizes)

    @property
    def length(self) -> int:
        """Positions that it needs."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Recalled:
    """What comes back of a segment for a question.

    entry  with the pairs that come, which may be fewer than it has
    spans  which tokens these are
    """

    entry: Entry
    spans: Spans

    @classmethod
    def whole(cls, entry: Entry) -> Recalled:
        """All of it."""
        return cls(entry, ((entry.start, entry.end),))

    @property
    def length(self) -> int:
        """Positions that it needs."""
        return sum(high - low for low, high in self.spans)


def positions(entries: Sequence[Entry], offset: int) -> list[int]:
    """Where each of these segments is to stand for a tail whose positions are so much smaller than its places.

    As far from the tail as it is where there is room, else right behind the segment before it: order is kept, and gaps
    of what is not in memory are closed as far as they must.
    """
    found, low = list[int](), 0
    for entry in entries:
        found.append(max(low, entry.start - offset))
        low = found[-1] + entry.length
    return found


def shifts(entries: Sequence[Entry], offset: int) -> dict[int, int]:
    """By how much the positions of these segments differ from those that they were computed at, by start."""
    places = zip(entries, positions(entries, offset), strict=True)
    return {entry.start: position - (entry.start - entry.offset) for entry, position in places}


def quoted(stretches: Sequence[Entry], position: int) -> dict[int, int]:
    """`shifts` of what stands one after the other from a position on, as if it were said again."""
    found: dict[int, int] = {}
    for one in stretches:
        found[one.start] = position - (one.start - one.offset)
        position += one.length
    return found
