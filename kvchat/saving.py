"""How segments are named and put into the store, and what is said when it has no room for them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from kvchat.codecs import SegmentHeader
from kvchat.config import Config
from kvchat.events import Notice
from kvchat.records import segment_id
from kvchat.store import Message, SegmentRecord, Store

Frames = Iterable[tuple[int, int, bytes]]
Kind = Literal["sealed", "open"]

FULL = "the disk is as full as {limit} allows: {kept}; raise it, or delete sessions"
NOTHING_KEPT = "new KV of this session stays in memory only, and is computed again when it is resumed"
BEST_KEPT = "of this session's KV only the better part is kept, on disk and in memory"


class Saver:
    """Puts segments of one conversation into the store.

    Args:
        store, config: as for `Residence`.
        fingerprint: of the model.
        session_id: the session that gives way last when the disk is full; None: it is as any other.
    """

    def __init__(self, store: Store, config: Config, fingerprint: str, session_id: int | None) -> None:
        self._store = store
        self._config = config
        self._fingerprint = fingerprint
        self._session_id = session_id
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

    def record(self, kind: Kind, codec: str, messages: Sequence[Message], start: int) -> SegmentRecord:
        """A segment of these messages still without header; the first of its tokens stands at `start`."""
        scorer = self._config.compress.scorer if kind == "sealed" else ""
        identity = segment_id(self._fingerprint, kind, scorer, codec, messages[0].id, messages[-1].id)
        end = start + sum(len(message.token_ids) for message in messages)
        ids = tuple(message.id for message in messages)
        from_file = start < self._taken_up_to
        return SegmentRecord(
            identity, self._fingerprint, start, end, kind, codec, scorer, ids, b"", 0, 0, 0, from_file=from_file
        )

    def put(
        self, record: SegmentRecord, header: SegmentHeader, frames: Frames, replaces: Sequence[str], tail_length: int
    ) -> Generator[Notice, None, bool]:
        """Store a segment, or the leading chunks that have room; False if none has. Each is said once.

        `tail_length` is how many tokens wait in memory: at twice as many it is worth trying again.
        """
        chunks, groups = header.ranking.num_chunks, header.num_groups
        record = replace(record, header=header.to_bytes(), num_chunks=chunks, num_groups=groups, stored_chunks=chunks)
        if not self._store.put_segment(record, frames, replaces, self._session_id):
            refused_before, self._retry_at = self._retry_at, 2 * tail_length
            if not refused_before:
                yield Notice(FULL.format(limit=self._store.room().limit, kept=NOTHING_KEPT))
            return False
        self._retry_at = 0
        if self._store.stored_chunks([record.id]).get(record.id, chunks) < chunks and not self._told_part:
            self._told_part = True
            yield Notice(FULL.format(limit=self._store.room().limit, kept=BEST_KEPT))
        return True
