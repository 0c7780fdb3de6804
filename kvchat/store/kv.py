"""The half of the store that holds KV: immutable segments, and their frames, one a rank chunk and layer group.

A segment is derived from its messages and may go at any time; who asks for it then makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import blake2b
from itertools import groupby, product
from pathlib import Path
from typing import Literal

from kvchat.cipher import Key, read_blob, row_class
from kvchat.errors import CorruptFrame, StoreDamaged, StoreError
from kvchat.store.migrations import explained, open_database, transaction
from kvchat.store.queries import CANDIDATES, DROP_REPLACED, REPOINT, SEGMENTS, Candidate, candidate_of
from kvchat.store.readers import Readers
from kvchat.store.records import Row, SegmentRecord, now, segment_of
from kvchat.store.salvage import remove_leftovers

AS_THEY_ARE = (
    *("id", "fingerprint", "kind", "codec", "scorer", "num_chunks", "num_groups", "stored_chunks", "seal_s"),
    *("header", "from_file"),
)
"""Columns of a segment that have the names of its record's fields."""


PLACE = "(segment_id, chunk, grp) = (?, ?, ?)"
"""Finds a frame."""


class KVStore:
    """Segments and frames in the database at `path`: the part of `LimitedStore` that knows no limit."""

    def __init__(self, path: Path, busy_timeout_s: float = 10.0, key: Key | None = None) -> None:
        self.file = path
        self._key = key
        self._db = open_database(path, busy_timeout_s, key)
        self._row = row_class(self._db.conn)
        remove_leftovers(path)  # who made a copy would have kept this connection out
        self._readers = Readers(path, busy_timeout_s)
        self._busy_timeout_s = busy_timeout_s
        self._patience = f"PRAGMA busy_timeout = {int(busy_timeout_s * 1000)}"

    def _reopen(self) -> None:
        """SQLCipher reads nothing more on a connection that has met a damaged page. Raises StoreError: it stays."""
        old, self._db = self._db, open_database(self.file, self._busy_timeout_s, self._key)
        old.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with explained(self.file):
                yield
        except StoreDamaged:
            if self._key is not None and not self._db.conn.in_transaction:
                with suppress(StoreError):  # the next read fails then, and tries again
                    self._reopen()
            raise

    def close(self) -> None:
        """End the connections; the last one to close folds the log into the file."""
        self._readers.close()
        self._db.close()

    def fold(self) -> None:
        """Fold the log into the file unless another process reads it: a log that is lost then takes little along."""
        with suppress(StoreError), explained(self.file), self.waiting(0):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    @contextmanager
    def waiting(self, ms: int) -> Iterator[None]:
        """What is written inside waits at most so long for another process that writes."""
        self._db.execute(f"PRAGMA busy_timeout = {ms}").fetchall()
        try:
            yield
        finally:
            self._db.execute(self._patience).fetchall()

    def segment(self, segment_id: str) -> SegmentRecord | None:
        """The record of a segment, None if it is not there."""
        return self._segments([segment_id]).get(segment_id)

    def cover(self, message_ids: Sequence[str], fingerprint: str) -> list[tuple[SegmentRecord, int]]:
        """Segments of that fingerprint for a path, in order and not overlapping; what they leave out is a miss.

        (record, n): the first n messages of the record lie on the path, all of them if it came from a file: so KV that
        someone else computed serves nobody who says anything else up to its end. From the beginning on, the segment
        with the most messages on the path wins, then one that ends on it, then sealed before open, then the shortest.
        """
        rows = self._rows(CANDIDATES, ids=json.dumps(list(message_ids)), fingerprint=fingerprint)
        candidates = [candidate_of(list(group)) for _, group in groupby(rows, key=lambda row: row["segment_id"])]
        chosen: list[Candidate] = []
        for candidate in sorted(filter(None, candidates), key=lambda candidate: candidate.order):
            if not chosen or candidate.place >= chosen[-1].place + chosen[-1].count:
                chosen.append(candidate)
        records = self._whole([candidate.id for candidate in chosen])
        return [(records[candidate.id], candidate.count) for candidate in chosen if candidate.id in records]

    def frames(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
        """(chunk, group, bytes) of the asked rank chunks, by chunk and group, each read when its turn comes.

        Raises:
            CorruptFrame: the segment or one of its frames is missing, or lies in a damaged page.
        """
        for place in self._places(segment_id, chunks):
            with self._damage_of(segment_id), self._explained():
                body = read_blob(self._db.conn, "frames", "body", PLACE, place)
            yield *place[1:], _found(body, *place)

    def readings(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[int, int, Callable[[], bytes]]]:
        """As `frames`, but each is read by whoever calls for it, in any thread; it raises CorruptFrame and StoreError.

        Those of an encrypted store are read at once.
        """
        if self._key is not None:
            yield from ((chunk, grp, partial(bytes, body)) for chunk, grp, body in self.frames(segment_id, chunks))
            return
        for place in self._places(segment_id, chunks):
            yield *place[1:], partial(self._body, *place)

    def _body(self, segment_id: str, chunk: int, grp: int) -> bytes:
        with self._damage_of(segment_id):
            body = self._readers.blob("frames", "body", PLACE, (segment_id, chunk, grp))
        return _found(body, segment_id, chunk, grp)

    def _places(self, segment_id: str, chunks: Sequence[int]) -> Iterator[tuple[str, int, int]]:
        """(whose it is, chunk, group) of each frame of the asked chunks. Raises CorruptFrame."""
        sql = "SELECT ifnull(frames_of, id) AS source, num_groups FROM segments WHERE id = :id"
        found = self._readable(sql, segment_id)
        if not found:
            raise CorruptFrame(f"segment {short(segment_id)} is not in the store")
        yield from product([found[0]["source"]], sorted(set(chunks)), range(found[0]["num_groups"]))

    def drop_segment(self, segment_id: str) -> None:
        """Remove a segment with its frames: a miss from now on."""
        with self._write("NORMAL"):
            self._db.execute("DELETE FROM segments WHERE id = ?", [segment_id])

    def replace_segment(self, old: str, record: SegmentRecord, frames: Iterable[tuple[int, int, bytes]]) -> bool:
        """Write a segment in place of another over the same messages; False, and nothing done, if that one is gone.

        Raises:
            StoreError: a message that it covers was deleted meanwhile.
        """
        assert record.id != old
        with self._write("NORMAL"):
            if not self._has(old):
                return False
            if not self._has(record.id):
                self._insert_segment(record, frames)
            row = [record.id, record.codec, record.num_chunks, record.num_groups, record.stored_chunks, old]
            self._db.execute(REPOINT, row)
            self._db.execute("DELETE FROM segments WHERE id = ?", [old])
        return True

    def _place(self, record: SegmentRecord, frames: Iterable[tuple[int, int, bytes]], replaces: Sequence[str]) -> None:
        """In a transaction: write a segment that is not there yet, and drop the open ones that it replaces."""
        assert record.id not in replaces
        if not self._has(record.id):
            self._insert_segment(record, frames)
        self._db.execute(
            DROP_REPLACED,
            {"ids": json.dumps(list(replaces)), "messages": json.dumps(list(record.messages))},
        )

    def _has(self, segment_id: str) -> bool:
        return self._db.execute("SELECT 1 FROM segments WHERE id = ?", [segment_id]).fetchone() is not None

    def _insert_segment(self, record: SegmentRecord, frames: Iterable[tuple[int, int, bytes]]) -> None:
        row = {
            **{name: getattr(record, name) for name in AS_THEY_ARE},
            "start_token": record.start,
            "end_token": record.end,
            "nbytes": 0,
            "created": now(),
            "basis": self._put_basis(record.basis),
        }
        self._db.table("segments").insert(row)
        self._db.conn.executemany(
            "INSERT INTO segment_messages VALUES (?, ?, ?)",
            [(record.id, ordinal, message) for ordinal, message in enumerate(record.messages)],
        )
        self._db.conn.executemany(
            "INSERT INTO frames VALUES (?, ?, ?, ?, ?)",
            ((record.id, chunk, grp, len(body), body) for chunk, grp, body in frames),
        )
        totals = "SELECT count(*), total(nbytes) FROM frames WHERE segment_id = ?"
        count, nbytes = self._db.execute(totals, [record.id]).fetchone()
        assert count == record.stored_chunks * record.num_groups, f"{count} frames"
        stored = [len(record.header) + int(nbytes), record.id]
        self._db.execute("UPDATE segments SET nbytes = ? WHERE id = ?", stored)

    def equals(self, record: SegmentRecord) -> list[str]:
        """Segments of that kind by that model that cover just these messages, whatever their method."""
        sql = (
            "SELECT id FROM segment_messages CROSS JOIN segments ON id = segment_id WHERE message_id = ? AND"
            " (fingerprint, kind, start_token, end_token) = (?, ?, ?, ?)"
        )
        values = [record.messages[-1], record.fingerprint, record.kind, record.start, record.end]
        return [row[0] for row in self._db.execute(sql, values).fetchall()]

    def _put_basis(self, body: bytes) -> str | None:
        """Store what segments share once; its id."""
        if not body:
            return None
        identity = "b2:" + blake2b(body, digest_size=16).hexdigest()
        self._db.execute("INSERT OR IGNORE INTO bases VALUES (?, ?)", [identity, body])
        return identity

    def _segments(self, ids: Collection[str]) -> dict[str, SegmentRecord]:
        wanted = json.dumps(list(ids))
        messages: dict[str, list[str]] = {}
        for row in self._rows(
            "SELECT segment_id, message_id FROM segment_messages"
            " WHERE segment_id IN (SELECT value FROM json_each(:ids)) ORDER BY segment_id, ordinal",
            ids=wanted,
        ):
            messages.setdefault(row["segment_id"], []).append(row["message_id"])
        rows = self._rows(SEGMENTS, ids=wanted)
        return {row["id"]: segment_of(row, messages.get(row["id"], [])) for row in rows}

    def _whole(self, ids: Sequence[str]) -> dict[str, SegmentRecord]:
        """Those of the segments whose records do not lie in a damaged page."""
        try:
            return self._segments(ids)
        except StoreDamaged:
            halves = (ids[: len(ids) // 2], ids[len(ids) // 2 :]) if len(ids) > 1 else ()
            return {key: record for half in halves for key, record in self._whole(half).items()}

    def _readable(self, sql: str, segment_id: str, **values: object) -> list[Row]:
        """Rows of one segment. Raises CorruptFrame."""
        with self._damage_of(segment_id):
            return self._rows(sql, id=segment_id, **values)

    @contextmanager
    def _damage_of(self, segment_id: str) -> Iterator[None]:
        """Inside, damage in the file is only this segment's: it raises CorruptFrame."""
        try:
            yield
        except StoreDamaged as error:
            raise CorruptFrame(f"segment {short(segment_id)} cannot be read: {error.__cause__}") from error

    def _rows(self, sql: str, **values: object) -> list[Row]:
        with self._explained():
            cursor = self._db.execute(sql, values)
            cursor.row_factory = self._row
            rows: list[Row] = cursor.fetchall()
        return rows

    @contextmanager
    def _write(self, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> Iterator[None]:
        with self._explained(), transaction(self._db, synchronous):
            yield

    def _shrink(self) -> None:
        """Give free pages back to the file system and empty the log."""
        with explained(self.file):
            # `execute` would take only the pragma's first step, a single page.
            self._db.executescript("PRAGMA incremental_vacuum")
            busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreError(f"{self.file} is busy: another kvchat reads it; try again when that is done")

    def _size(self) -> int:
        """Bytes of the file and its log."""
        files = [self.file, self.file.with_name(self.file.name + "-wal")]
        return sum(file.stat().st_size for file in files if file.exists())


def _found(body: bytes | None, segment_id: str, chunk: int, grp: int) -> bytes:
    if body is None:
        raise CorruptFrame(f"segment {short(segment_id)} chunk {chunk}: group {grp} is missing")
    return body


def short(identity: str) -> str:
    """Enough of an id to tell it from others."""
    return identity[:15]
