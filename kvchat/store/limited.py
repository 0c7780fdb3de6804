"""The half of the store that holds KV, kept within a disk budget and above a floor of free space.

What is too much is measured in the transaction that writes, and taken in the order of `shed.py`, the coldest sessions
first.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from kvchat.cipher import Key
from kvchat.errors import CodecError, StoreError
from kvchat.store.kv import KVStore
from kvchat.store.queries import EDGES, ENDS, FRAME_SIZES, HOLDINGS, KV_BYTES, PAGES, REACHING, THINNED
from kvchat.store.records import Row, SegmentRecord
from kvchat.store.shed import (
    RUNGS,
    WRITTEN,
    Allowance,
    Held,
    Recode,
    Room,
    Sacrifice,
    Session,
    Step,
    foreseen,
    grouped,
    sacrifices,
)

Frames = Iterable[tuple[int, int, bytes]]


class LimitedStore(KVStore):
    """Segments and frames that keep to an allowance. Use it as part of `kvchat.store.store.Store`."""

    def __init__(
        self,
        path: Path,
        busy_timeout_s: float = 10.0,
        allowance: Allowance | None = None,
        *,
        key: Key | None = None,
    ) -> None:
        super().__init__(path, busy_timeout_s, key)
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
        short, written = room.in_use + needed > room.allowed, False
        if not short:
            written = self._place_within(room.allowed, record, frames, replaces, ())
        if not written:  # or another process has written meanwhile
            wanted = needed if self._could_fit(record, frames, room.allowed) else 0
            self._shed_until(room.allowed - wanted, owner, self._plan(owner)[:WRITTEN])
            written = self._place_within(room.allowed, record, frames, replaces, self._own(owner, record))
        if short and room.limit == "store.min_free":
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

    def would_shed(self, allowance: Allowance) -> list[Step]:
        """What `shed` would take away now with these limits, in its order; how far that goes is estimated."""
        room, groups = self.room(allowance), self._plan(None)
        planned = sacrifices(groups, partial(self._held, held=allowance.held), RUNGS if allowance.recode else ())
        sizes: dict[str, list[int]] = {}
        for row in self._rows(FRAME_SIZES):
            some = sizes.setdefault(row["segment_id"], [])
            some += [0] * (row["chunk"] + 1 - len(some))
            some[row["chunk"]] += row["nbytes"]
        return foreseen(planned, groups, sizes, room.in_use - room.allowed)

    def room(self, allowance: Allowance | None = None) -> Room:
        """What the store takes of its disk, and what it may take, or might with other limits."""
        pages, allowance = self._rows(PAGES)[0], allowance or self.allowance
        free = allowance.disk_free(self.file)
        return Room(pages["in_use"], pages["reusable"], free, allowance.disk_budget, allowance.min_free)

    def stored_chunks(self, ids: Collection[str]) -> dict[str, int]:
        """How many leading chunks of each segment are stored; those that are gone are left out."""
        sql = "SELECT id, stored_chunks FROM segments WHERE id IN (SELECT value FROM json_each(:ids))"
        return {row["id"]: row["stored_chunks"] for row in self._rows(sql, ids=json.dumps(list(ids)))}

    def reaching(self, ids: Collection[str]) -> set[int]:
        """The sessions whose paths, or those of their branches, hold the first message of one of these segments."""
        return {row["session_id"] for row in self._rows(REACHING, ids=json.dumps(list(ids)))}

    def _could_fit(self, record: SegmentRecord, frames: Frames, allowed: float) -> bool:
        """Whether the first chunk has room if all other KV goes; if not, none goes for it."""
        first = [frame for frame in frames if frame[0] == 0]
        return self._in_use() - int(self._rows(KV_BYTES)[0]["nbytes"]) + _bytes_of(record, first) <= allowed

    def _own(self, owner: int | None, record: SegmentRecord) -> list[Sacrifice]:
        """What the session that is written to gives for a segment of its own, which is not there yet."""
        sessions = self._plan(owner, record)[WRITTEN]
        return list(sacrifices([[], [], sessions], partial(self._held, placing=record), placing=record.id))

    def _place_within(
        self,
        allowed: float,
        record: SegmentRecord,
        frames: Frames,
        replaces: Sequence[str],
        planned: Sequence[Sacrifice],
    ) -> bool:
        """Write what fits, giving up what is `planned`; whether the segment is there afterwards.

        Other processes wait on it: what is planned was found out before, and here it is only deleted and measured.
        """
        with self._write("NORMAL"):
            self._db.execute("SAVEPOINT placing")
            self._place(record, frames, replaces)
            if not self._fit(allowed, planned, record.id):
                self._db.execute("ROLLBACK TO placing")  # what gave way for it comes back
                self._fit(allowed, planned)
            self._db.execute("RELEASE placing")
            return bool(self.stored_chunks([record.id]))

    def _fit(self, allowed: float, planned: Iterable[Sacrifice], placing: str = "") -> bool:
        """In a transaction: give until the limit holds; False, with work half done, if `placing` itself must go."""
        for sacrifice in planned:
            if self._in_use() <= allowed:
                return True
            if sacrifice == Sacrifice((placing,)):
                return False
            self._give(sacrifice)
        return self._in_use() <= allowed

    def _shed_until(
        self, allowed: float, owner: int | None, groups: Sequence[Sequence[Session]], rungs: Sequence[str] = RUNGS
    ) -> None:
        """Shed a piece at a time: a wiped page is written to the log, and the log is cut back between transactions."""
        renamed: dict[str, str] = {}  # what is written anew has another id
        opened: set[str] = set()  # since the groups were made
        for sacrifice in sacrifices(groups, self._held, rungs if self.allowance.recode else ()):
            if self._in_use() <= allowed:
                return
            if not opened.isdisjoint(sacrifice.ids):
                continue
            ids = [renamed.get(identity, identity) for identity in sacrifice.ids]
            if sacrifice.codec:
                found = self._recode(ids, sacrifice.codec)
                opened.update(sacrifice.ids if found is None else ())
                renamed |= {old: (found or {}).get(one, one) for old, one in zip(sacrifice.ids, ids, strict=True)}
                continue
            for identity in ids:
                with self._write("NORMAL"):
                    self._give(Sacrifice((identity,), sacrifice.chunks))
        if opened:
            self._shed_until(allowed, owner, self._plan(owner)[: len(groups)], ())

    def _give(self, sacrifice: Sacrifice) -> None:
        """In a transaction: delete chunks, or all."""
        for identity in sacrifice.ids:
            if not sacrifice.chunks:
                self._db.execute("DELETE FROM segments WHERE id = ?", [identity])
                continue
            values = {"id": identity, "chunks": sacrifice.chunks}
            self._db.execute("DELETE FROM frames WHERE segment_id = :id AND chunk >= :chunks", values)
            self._db.execute(THINNED, values)

    def _recode(self, ids: Sequence[str], codec: str) -> dict[str, str] | None:
        """Have segments written anew; the new id of each that was. None if a session that reaches one is open by now.

        It would hold other values in memory than the store has; so until that is done nobody opens one.
        """
        assert self.allowance.recode is not None
        with self.allowance.closed(self.reaching(ids)) as closed:
            return self._recode_closed(ids, codec, self.allowance.recode) if closed else None

    def _recode_closed(self, ids: Sequence[str], codec: str, recode: Recode) -> dict[str, str]:
        before = self._segments(ids)
        with suppress(CodecError):  # damaged, or written by a newer version: `verify` says so, and it stays
            recode([before[one] for one in ids if one in before], codec)
        kept = self.stored_chunks(ids)
        found = {one.id: self.equals(one) for one in before.values() if one.id not in kept}
        return {old: others[0] for old, others in found.items() if others}

    def _plan(self, owner: int | None, placing: SegmentRecord | None = None) -> list[list[Session]]:
        """Who has what, by group. A thousand sessions of a hundred messages are read in a fraction of a second."""
        ends, parents = self._rows(ENDS), {row["child"]: row["parent"] for row in self._rows(EDGES)}
        spared = self.allowance.spared({row["session_id"] for row in ends} - {owner})
        holdings: list[Row | Mapping[str, Any]] = [*self._rows(HOLDINGS)]
        if placing and all(row["id"] != placing.id for row in holdings):
            row = {"id": placing.id, "start_token": placing.start, "kind": placing.kind, "codec": placing.codec}
            holdings.append({**row, "stored_chunks": placing.stored_chunks, "number": None})
        return grouped(ends, parents, holdings, spared, owner, placing.id if placing else "")

    def _held(
        self, session: Session, placing: SegmentRecord | None = None, held: Held | None = None
    ) -> Mapping[str, int]:
        """The chunks of a session's sealed segments that memory would hold."""
        held = held or self.allowance.held
        if held is None:
            return {}
        new = {placing.id: placing} if placing else {}
        records = new | self._segments([one.id for one in session])
        end = max((record.end for record in records.values()), default=0)
        sealed = [records[one.id] for one in session if one.sealed and one.id in records]
        return dict(zip((record.id for record in sealed), held(sealed, end), strict=True))

    def _in_use(self) -> int:
        return int(self._rows(PAGES)[0]["in_use"])

    def _return_pages(self) -> None:
        with suppress(StoreError):  # another process reads: the pages go back later
            self._shrink()


def _bytes_of(record: SegmentRecord, frames: Frames) -> int:
    """About what a segment takes in pages, rather more than less: a large body fills pages of its own."""
    return _paged(len(record.header)) + sum(_paged(len(body)) for _, _, body in frames)


def _paged(size: int, page: int = 16_380) -> int:
    """Bytes of the pages that a row of so many bytes fills, with its index entry."""
    size += 256
    return size if size < page // 4 else -(-size // page) * (page + 4)
