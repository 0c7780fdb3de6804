"""How segments are named and put into the store, and what is said when it has no room for them.

A sealed segment is in memory before it is in the store: its planes are copied to host memory and packed on the pool's
threads, and written when the thread that owns the store has nothing else to do. Until then a crash loses them, and no
more: KV is computed again from token ids.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Literal

import torch

from kvchat import memory
from kvchat.cache.coded import CodedKV
from kvchat.codecs import SegmentHeader
from kvchat.codecs.codec import Tensors
from kvchat.codecs.coded import coded_planes
from kvchat.codecs.encode import Reading, Taken, pack_frame
from kvchat.engine import Stop
from kvchat.errors import OutOfMemory, StoreError
from kvchat.events import Notice
from kvchat.pool import submit
from kvchat.store.records import segment_id
from kvchat.store.store import Message, SegmentRecord, Store

Kind = Literal["sealed", "open"]

FULL = "the disk is as full as {limit} allows: {kept}; raise it, or delete sessions"
NOTHING_KEPT = "new KV of this session stays in memory only, and is computed again when it is resumed"
BEST_KEPT = "of this session's KV only the better part is kept, on disk and in memory"
LOST = "a segment could not be saved; its KV stays in memory, and is computed again when it is resumed: {error}"

MOST_WAITING = 512 * 1024 * 1024
"""Bytes that segments waiting to be written may have; then the oldest is written at once."""
MOST_HELD = 64 * 1024 * 1024
"""Bytes of planes that may lie where the exact KV does before they are packed, which takes them to host memory."""
MOST_TRIES = 3
"""After so many errors of the store a segment is given up: what waits behind it, and the conversation, go on."""
LOOK_S = 0.01
"""Seconds between two looks whether something else is to be done than wait."""


@dataclass(slots=True)
class Saving:
    """A segment on its way to the store: its frames are packed on the pool's threads, many at a time.

    Not as they are added: who adds them does many small things, and would wait for the interpreter at each.
    """

    record: SegmentRecord
    header: SegmentHeader
    replaces: Sequence[str]
    """Open segments that go when it is there."""
    tail_length: int
    """Tokens that waited in memory when it was made."""
    pool: Executor
    nbytes: int = 0
    """Of the planes, before they are packed."""
    tries: int = 0
    """How often it was to be written."""
    held: int = 0
    """Of those that are not given to the pool yet."""
    works: list[tuple[int, int, Callable[[], bytes]]] = field(default_factory=list)
    frames: list[tuple[int, int, Future[bytes]]] = field(default_factory=list)

    def add(self, taken: Taken) -> None:
        """Take over a frame's planes; the thread that packs them copies them to host memory."""
        work = partial(_packed, self.header, taken.chunk, taken.group, taken.planes)
        nbytes = sum(plane.nbytes for plane in taken.planes.values())
        self.works.append((taken.chunk, taken.group, work))
        self.nbytes, self.held = self.nbytes + nbytes, self.held + nbytes
        if self.held > MOST_HELD:
            self.begin()

    def begin(self) -> None:
        """Have what was added packed."""
        self.frames += [(chunk, group, submit(self.pool, work)) for chunk, group, work in self.works]
        self.works, self.held = [], 0

    def is_packed(self, stop: Stop) -> bool:
        """Wait until all frames are packed, or until `stop`."""
        self.begin()
        left = {packed for *_, packed in self.frames}
        while left and not stop():
            left = wait(left, timeout=LOOK_S).not_done
        return not left

    def packed(self) -> list[tuple[int, int, bytes]]:
        """All frames, by chunk and group; waits for them."""
        self.begin()
        return sorted((chunk, group, blob.result()) for chunk, group, blob in self.frames)


class Saver:
    """Puts segments of one conversation into the store, in the order in which they were made.

    Args:
        store, pool: as for `Residence`.
        fingerprint: of the model.
        session_id: the session that gives way last when the disk is full; None: it is as any other.
    """

    def __init__(self, store: Store, fingerprint: str, session_id: int | None, pool: Executor) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._session_id = session_id
        self._pool = pool
        self._waiting: deque[Saving] = deque()
        self.superseded: set[str] = set()
        """Segments of which the store has another version than memory, ranked or quantised otherwise."""
        self.failed = False
        """Whether what waits could not be written when that was last tried."""
        self._retry_at = 0
        self._told_part = False
        self._taken_up_to = 0
        """One past the last position of which the tail has KV from a file."""

    def taken(self, record: SegmentRecord) -> None:
        """The tail holds the KV of that segment now: what is made of KV from a file is from a file too."""
        if record.from_file:
            self._taken_up_to = record.end

    def worth_trying(self, tail_length: int) -> bool:
        """Whether to ask again if there is room. Scoring and encoding the whole tail at every turn would be in vain."""
        return tail_length >= self._retry_at

    def record(
        self, kind: Kind, codec: str, messages: Sequence[Message], start: int, scorer: str = ""
    ) -> SegmentRecord:
        """A segment of these messages still without header; the first of its tokens stands at `start`.

        `scorer` says how a sealed one is ranked.
        """
        identity = segment_id(self._fingerprint, kind, scorer, codec, messages[0].id, messages[-1].id)
        end = start + sum(len(message.token_ids) for message in messages)
        ids = tuple(message.id for message in messages)
        from_file = start < self._taken_up_to
        return SegmentRecord(
            identity, self._fingerprint, start, end, kind, codec, scorer, ids, b"", 0, 0, 0, from_file=from_file
        )

    # -- one segment -------------------------------------------------------------------------------------------------

    def begin(self, record: SegmentRecord, header: SegmentHeader, replaces: Sequence[str], tail_length: int) -> Saving:
        """A segment whose frames are to come. `tail_length`: at twice as many it is worth trying again."""
        chunks, groups = header.ranking.num_chunks, header.num_groups
        record = replace(record, header=header.to_bytes(), num_chunks=chunks, num_groups=groups, stored_chunks=chunks)
        return Saving(record, header, replaces, tail_length, self._pool)

    def surely_fits(self, nbytes: int) -> bool:
        """Whether the store will have room for a segment of so many bytes of exact KV, beside those that wait."""
        room = self._store.room()
        return room.in_use + sum(one.nbytes for one in self._waiting) + 2 * nbytes <= room.allowed

    def put(self, saving: Saving, frames: Iterable[Taken]) -> Generator[Notice, None, bool]:
        """Store a segment now, or the leading chunks that have room; False if none has. Each is said once.

        Raises StoreDamaged, and StoreError of this one or of those that are written before it.
        """
        for taken in frames:
            saving.add(taken)
        saving.begin()
        yield from self.flush()
        return (yield from self._write(saving, saving.packed()))

    # -- segments that wait ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Segments that wait to be written."""
        return len(self._waiting)

    def has(self, segment_id: str) -> bool:
        """Whether that one waits."""
        return any(one.record.id == segment_id for one in self._waiting)

    def put_off(self, saving: Saving) -> Generator[Notice, None, None]:
        """Have a segment written later; now only what is too much for host memory. Raises StoreError."""
        saving.begin()
        self._waiting.append(saving)
        self._retry_at, self.failed = 0, False
        while sum(one.nbytes for one in self._waiting) > MOST_WAITING:
            yield from self.flush(len(self._waiting) - 1)

    def flush(self, most: int = 0, stop: Stop = lambda: False) -> Generator[Notice, None, None]:
        """Write until at most so many wait, or until `stop`; said is what `put` says.

        What the store raises is raised: the oldest cannot be written now, and waits on, MOST_TRIES times in all.
        """
        while len(self._waiting) > most and self._waiting[0].is_packed(stop) and not stop():
            oldest = self._waiting[0]
            try:
                frames, self.failed, oldest.tries = oldest.packed(), True, oldest.tries + 1
                yield from self._write(oldest, frames)
            except (StoreError, OutOfMemory) as error:
                if type(error) is StoreError and oldest.tries < MOST_TRIES:
                    raise
                yield Notice(LOST.format(error=error))
            self._waiting.popleft()
            self.failed = False

    def _write(self, saving: Saving, frames: Sequence[tuple[int, int, bytes]]) -> Generator[Notice, None, bool]:
        record, chunks = saving.record, saving.record.num_chunks
        if not self._store.put_segment(record, frames, saving.replaces, self._session_id):
            refused_before, self._retry_at = self._retry_at, 2 * saving.tail_length
            if not refused_before:
                yield Notice(FULL.format(limit=self._store.room().limit, kept=NOTHING_KEPT))
            return False
        self._retry_at = 0
        stored = self._store.segment(record.id)
        if stored is not None and stored.header != record.header:  # another session's, of the same messages
            self.superseded.add(record.id)
        elif self._store.stored_chunks([record.id]).get(record.id, chunks) < chunks and not self._told_part:
            self._told_part = True
            yield Notice(FULL.format(limit=self._store.room().limit, kept=BEST_KEPT))
        return True


def sealed_layers(reading: Reading, saving: Saving, chunks: int) -> Iterator[tuple[int, list[tuple[CodedKV, ...]]]]:
    """The pieces of a segment's first `chunks`, as `Tiers.seal` takes them; every frame goes to `saving`, too."""
    for group, frames in groupby(reading.frames, lambda taken: taken.group):
        pieces = []
        for taken in frames:
            saving.add(taken)
            if taken.chunk < chunks:
                pieces.append(coded_planes(reading, taken))
        of_layer, pieces = list(zip(*pieces, strict=True)), []
        yield reading.header.layers(group)[0], of_layer


def _packed(header: SegmentHeader, chunk: int, group: int, planes: Tensors) -> bytes:
    cpu = torch.device("cpu")
    work, free = partial(pack_frame, header, chunk, group, planes), partial(memory.release, cpu)
    return memory.again(work, free, "packing KV", cpu)
