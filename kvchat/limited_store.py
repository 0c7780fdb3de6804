"""The half of the store that holds KV, kept within a disk budget and above a floor of free space.

What is too much is found in the transaction that writes, and taken from the coldest sessions in the order of `shed.py`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from kvchat.errors import CodecError, StoreError
from kvchat.kv_store import KVStore
from kvchat.queries import EDGES, ENDS, HOLDINGS, KV_BYTES, PAGES, THINNED
from kvchat.records import SegmentRecord
from kvchat.shed import RUNGS, WRITTEN, Allowance, Room, Sacrifice, Session, grouped, sacrifices

Frames = Iterable[tuple[int, int, bytes]]


class LimitedStore(KVStore):
    """Segments and frames that keep to an allowance. Use it as part of `kvchat.store.Store`."""

    def __init__(self, path: Path, busy_timeout_s: float = 10.0, allowance: Allowance | None = None) -> None:
        super().__init__(path, busy_timeout_s)
        self.allowance = allowance or Allowance()

    def put_segment(
        self, record: SegmentRecord, frames: Frames, replaces: Sequence[str] = (), owner: int | None = None
    ) -> bool:
        """Write a segment with its frames (chunk, group, bytes) and drop the open segments that it replaces.

        Other sessions give way to it, then the others of `owner`, the session that it is written for, as far as they
        would lose a worse chunk. Of the segment itself so many leading chunks are written as have room; if none has,
        nothing changes for it, and False is given. A segment that is there already stays as it is. KV can be made
        again, so a power cut may lose the newest.

        Raises:
            StoreError: a message that it covers was deleted meanwhile.
        """
        if not self.allowance.limited:
            with self._write("NORMAL"):
                self._place(record, frames, replaces)
            return True
        frames, room = list(frames), self.room()
        needed = _bytes_of(record, frames) - sum(one.nbytes for one in self._segments(replaces).values())
        if room.in_use + needed > room.allowed and self._could_fit(record, frames, room.allowed):
            self._shed_until(room.allowed - needed, owner, self._plan(owner)[:WRITTEN])
        with self._write("NORMAL"):
            written = self._place_within(room.allowed, record, frames, replaces, owner)
        if room.in_use + needed > room.allowed and room.limit == "store.min_free":
            self._return_pages()
        return written

    def shed(self) -> int:
        """Bring the store within its allowance; bytes given up, and returned to the disk."""
        if not self.allowance.limited:
            return 0
        before = self.room()
        if before.in_use <= before.allowed:
            return 0
        self._shed_until(before.allowed, None, self._plan(None))
        self._return_pages()
        return before.in_use - self._in_use()

    def room(self) -> Room:
        """What the store takes of its disk, and what it may take."""
        pages, allowance = self._rows(PAGES)[0], self.allowance
        free = allowance.disk_free(self.file)
        return Room(pages["in_use"], pages["reusable"], free, allowance.disk_budget, allowance.min_free)

    def stored_chunks(self, ids: Collection[str]) -> dict[str, int]:
        """How many leading chunks of each segment are stored; those that are gone are left out."""
        sql = "SELECT id, stored_chunks FROM segments WHERE id IN (SELECT value FROM json_each(:ids))"
        return {row["id"]: row["stored_chunks"] for row in self._rows(sql, ids=json.dumps(list(ids)))}

    def _could_fit(self, record: SegmentRecord, frames: Frames, allowed: float) -> bool:
        """Whether the first chunk has room if all other KV goes; if not, none goes for it."""
        first = [frame for frame in frames if frame[0] == 0]
        return self._in_use() - int(self._rows(KV_BYTES)[0]["nbytes"]) + _bytes_of(record, first) <= allowed

    def _place_within(
        self, allowed: float, record: SegmentRecord, frames: Frames, replaces: Sequence[str], owner: int | None
    ) -> bool:
        """In a transaction: write what fits; whether the segment is there afterwards."""
        self._db.execute("SAVEPOINT placing")
        self._place(record, frames, replaces)
        if not self._fit(allowed, owner, record.id):
            self._db.execute("ROLLBACK TO placing")  # what gave way for it comes back
            self._fit(allowed, owner)
        self._db.execute("RELEASE placing")
        return bool(self.stored_chunks([record.id]))

    def _fit(self, allowed: float, owner: int | None, placing: str = "") -> bool:
        """In a transaction: shed until the limit holds; False, with work half done, if `placing` itself must go."""
        if self._in_use() <= allowed:
            return True
        for sacrifice in sacrifices(self._plan(owner, placing), self._held, placing=placing):
            if self._in_use() <= allowed:
                break
            if sacrifice == Sacrifice((placing,)):
                return False
            self._give(sacrifice)
        return True

    def _shed_until(self, allowed: float, owner: int | None, groups: Sequence[Sequence[Session]]) -> None:
        """Shed a piece at a time: a wiped page is written to the log, and the log is cut back between transactions."""
        rungs = RUNGS if self.allowance.recode else ()
        renamed: dict[str, str] = {}  # what is written anew has another id
        for sacrifice in sacrifices(groups, self._held, rungs):
            if self._in_use() <= allowed:
                return
            ids = [renamed.get(identity, identity) for identity in sacrifice.ids]
            if sacrifice.codec:
                found = self._recode(ids, sacrifice.codec)
                renamed |= {old: found.get(one, one) for old, one in zip(sacrifice.ids, ids, strict=True)}
                continue
            for identity in ids:
                with self._write("NORMAL"):
                    self._give(Sacrifice((identity,), sacrifice.chunks))

    def _give(self, sacrifice: Sacrifice) -> None:
        """In a transaction: delete chunks, or all."""
        for identity in sacrifice.ids:
            if not sacrifice.chunks:
                self._db.execute("DELETE FROM segments WHERE id = ?", [identity])
                continue
            values = {"id": identity, "chunks": sacrifice.chunks}
            self._db.execute("DELETE FROM frames WHERE segment_id = :id AND chunk >= :chunks", values)
            self._db.execute(THINNED, values)

    def _recode(self, ids: Sequence[str], codec: str) -> dict[str, str]:
        """Have segments written anew; the new id of each that was."""
        assert self.allowance.recode is not None
        before = self._segments(ids)
        with suppress(CodecError):  # damaged, or written by a newer version: `verify` says so, and it stays
            self.allowance.recode([before[one] for one in ids if one in before], codec)
        kept = self.stored_chunks(ids)
        found = {one.id: self._equals(one) for one in before.values() if one.id not in kept}
        return {old: others[0] for old, others in found.items() if others}

    def _plan(self, owner: int | None, placing: str = "") -> list[list[Session]]:
        """Who has what, by group. A thousand sessions of a hundred messages are read in a fraction of a second."""
        ends, parents = self._rows(ENDS), {row["child"]: row["parent"] for row in self._rows(EDGES)}
        spared = self.allowance.spared({row["session_id"] for row in ends} - {owner})
        return grouped(ends, parents, self._rows(HOLDINGS), spared, owner, placing)

    def _held(self, session: Session) -> Mapping[str, int]:
        """The chunks of a session's sealed segments that memory would hold."""
        if self.allowance.held is None:
            return {}
        records = self._segments([one.id for one in session])
        end = max((record.end for record in records.values()), default=0)
        sealed = [records[one.id] for one in session if one.sealed and one.id in records]
        return dict(zip((record.id for record in sealed), self.allowance.held(sealed, end), strict=True))

    def _in_use(self) -> int:
        return int(self._rows(PAGES)[0]["in_use"])

    def _return_pages(self) -> None:
        with suppress(StoreError):  # another process reads: the pages go back later
            self._shrink()


def _bytes_of(record: SegmentRecord, frames: Frames) -> int:
    """About what a segment takes in pages, rather more than less: a large body fills pages of its own."""
    return sum(_paged(len(body)) for body in _bodies(record, frames))


def _bodies(record: SegmentRecord, frames: Frames) -> Iterator[bytes]:
    yield record.header
    yield from (body for _, _, body in frames)


def _paged(size: int, page: int = 16_380) -> int:
    """Bytes of the pages that a row of so many bytes fills, with its index entry."""
    size += 256
    return size if size < page // 4 else -(-size // page) * (page + 4)
