"""The part of the store that finds damage, and mends what can be made again: all but the text.

KV and the search index are derived from the text. What is damaged among them is removed; the index is made anew at
once, KV when its session is opened the next time.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from kvchat.cipher import Key, database_errors, error_code
from kvchat.codecs import frame
from kvchat.errors import CodecError, StoreDamaged, StoreError
from kvchat.store.kv import KVStore, short
from kvchat.store.migrations import explained
from kvchat.store.queries import ORPHANS, PATH
from kvchat.store.records import SegmentRecord, message_id, now, pack_ids, place_below, unpack_ids
from kvchat.store.recrypt import salvage_encrypted
from kvchat.store.salvage import DERIVED, salvage

MEND = "`kvchat verify --repair` mends it"
RESTORE = "restore a copy of the database"
LOST_ALIASES = "DELETE FROM segments WHERE frames_of NOT NULL AND frames_of NOT IN (SELECT id FROM segments)"
REBUILT = "its KV is made again when the session is opened"
Ends = Mapping[str, Sequence[str]]
"""The name of each session to the ends of its path and branches."""


class Damaged(NamedTuple):
    """A segment, whose it is, and what is wrong with it."""

    id: str
    label: str
    problems: list[str]


class Checks(KVStore):
    """Use it as part of `kvchat.store.store.Store`."""

    def page_problems(self) -> list[str]:
        """What SQLite finds wrong with the file as such; nothing else can be relied on then."""
        problems = self._integrity("")
        if not problems:
            return []
        tables = self._rows("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        text = [
            row["name"] for row in tables if not row["name"].startswith(("messages_fts", *DERIVED, "probes", "vectors"))
        ]
        cure = RESTORE if any(self._integrity(f"('{name}')") for name in text) else MEND
        return [f"{self.file}: {problem}; {cure}" for problem in problems]

    def require_sound(self, name: str, tip: str | None) -> None:
        """Raise StoreDamaged unless the messages of a session up to `tip` are all there, as they were written."""
        for problem in self._path_problems({name: [tip] if tip else []}, defaultdict(set)):
            raise StoreDamaged(problem)

    def problems(self, ends: Ends, everything: bool) -> list[str]:
        """What is wrong with these sessions, or with all there is, one line a problem."""
        owners: defaultdict[str, set[str]] = defaultdict(set)
        problems = [*self._index_problems(), *self._reference_problems(), *self._path_problems(ends, owners)]
        damaged = self._damaged_segments(owners, everything)
        return problems + [f"{one.label}: {problem}; {REBUILT}" for one in damaged for problem in one.problems]

    def mend(self, ends: Ends, everything: bool) -> list[str]:
        """Remove damaged KV, and make the index anew; what was done, one line each. Text is never touched."""
        done, owners = [], defaultdict[str, set[str]](set)
        if self._index_problems():
            with self._write():
                self._db.execute("INSERT INTO messages_fts(messages_fts) VALUES ('rebuild')")
            done.append("the search index was made anew")
        with self._write():
            if count := self._db.execute(LOST_ALIASES).rowcount:
                done.append(f"{count} segments that had their frames from one that is missing were removed; {REBUILT}")
            for table in ("frames", "segment_messages"):
                if count := self._db.execute(ORPHANS.format(table=table)).rowcount:
                    done.append(f"{count} rows of {table} without a segment were removed")
        self._path_problems(ends, owners)
        for one in self._damaged_segments(owners, everything):
            self.drop_segment(one.id)
            done.append(f"{one.label} was removed; {REBUILT}")
        return done

    def mend_pages(self) -> list[str]:
        """Write the file anew without its damaged pages.

        Raises:
            StoreDamaged: text lay in them; nothing was changed.
            StoreError: another process has the file open.
        """
        if self._key is None:
            with explained(self.file):
                salvage(self._db, self.file, self._busy_timeout_s, _require_whole)
        else:
            self._db.close()
            try:
                salvage_encrypted(self.file, self._key, partial(_require_whole, key=self._key))
            finally:
                self._open_again()
        return [f"{self.file} was written anew without its damaged pages; KV that lay in them is made again"]

    def _open_again(self) -> None:
        try:
            self._reopen()
        except StoreError as error:
            raise StoreError(f"{self.file} was closed to be mended, and cannot be opened again: {error}") from error

    def probe(self, session_id: int) -> tuple[str, tuple[int, ...]] | None:
        """State and tokens of the answer that was recorded last."""
        rows = self._rows("SELECT state, token_ids FROM probes WHERE session_id = :id", id=session_id)
        return (rows[0]["state"], unpack_ids(rows[0]["token_ids"])) if rows else None

    def put_probe(self, session_id: int, state: str, token_ids: Sequence[int]) -> None:
        """Record an answer in place of the last one. Raises StoreError: another process deleted the session."""
        with self._write("NORMAL"):
            row = [session_id, state, pack_ids(token_ids), now()]
            self._db.execute("INSERT OR REPLACE INTO probes VALUES (?, ?, ?, ?)", row)

    def written(self, segment_ids: Sequence[str]) -> list[tuple[str, str, str]]:
        """Id, time and codec of these segments as they were written, in the order of their ids."""
        sql = "SELECT id, created, codec FROM segments WHERE id IN (SELECT value FROM json_each(:ids)) ORDER BY 1"
        return [(row["id"], row["created"], row["codec"]) for row in self._rows(sql, ids=json.dumps(list(segment_ids)))]

    def _integrity(self, table: str) -> list[str]:
        try:
            found = [row[0] for row in self._rows(f"PRAGMA integrity_check{table}")]
        except StoreDamaged as error:
            return [str(error.__cause__)]
        problems = [" ".join(problem.split()) for problem in found if problem != "ok"][:20]
        if problems and self._key is not None:
            self._reopen()
        return problems

    def _index_problems(self) -> list[str]:
        with self._write():
            try:
                self._db.execute("INSERT INTO messages_fts(messages_fts, rank) VALUES ('integrity-check', 1)")
            except database_errors() as error:
                if error_code(error) & 0xFF != sqlite3.SQLITE_CORRUPT:
                    raise
                return [f"the search index does not agree with the text; {MEND}"]
        return []

    def _reference_problems(self) -> list[str]:
        rows = self._rows('SELECT "table", parent, count(*) AS number FROM pragma_foreign_key_check GROUP BY 1, 2')
        return [
            f"{row['number']} rows of {row['table']} refer to {row['parent']} that are missing;"
            f" {MEND if row['parent'] == 'segments' else RESTORE}"
            for row in rows
        ]

    def _path_problems(self, ends: Ends, owners: defaultdict[str, set[str]]) -> list[str]:
        """Check all messages, and note in `owners` which sessions hold them."""
        return [problem for name in ends for tip in ends[name] for problem in self._check_path(name, tip, owners)]

    def _check_path(self, name: str, tip: str, owners: defaultdict[str, set[str]]) -> Iterable[str]:
        rows = self._rows(PATH, tip=tip)
        if not rows or rows[0]["parent"] is not None:
            missing = rows[0]["parent"] if rows else tip
            yield f"session {name!r}: message {short(missing)} is missing, with all before it; {RESTORE}"
            return
        place = None
        for row in rows:
            ids = unpack_ids(row["token_ids"])
            place = place_below(place, row["role"], len(ids))
            sound = row["id"] in owners or (
                row["id"] == message_id(row["parent"], row["role"], row["content"], ids)
                and place == (row["depth"], row["turn"], row["start_token"], row["end_token"])
            )
            if not sound:
                yield f"session {name!r}: message {short(row['id'])} was altered; {RESTORE}"
            owners[row["id"]].add(name)

    def _damaged_segments(self, owners: Mapping[str, set[str]], everything: bool) -> Iterable[Damaged]:
        """Of the sessions in `owners`, or of all."""
        for row in self._rows("SELECT id FROM segments ORDER BY start_token, id"):
            if (record := self.segment(row["id"])) is None:
                continue  # it had the frames of one that was damaged, and went with it
            names = sorted({name for message in record.messages for name in owners.get(message, ())})
            problems = list(self._segment_problems(record)) if names or everything else []
            if problems:
                label = f"session {', '.join(map(repr, names))}: segment {short(record.id)}"
                yield Damaged(record.id, label, problems)

    def _segment_problems(self, record: SegmentRecord) -> Iterator[str]:
        """What is wrong with a segment, its messages and every frame."""
        rows = self._rows(
            "SELECT ordinal, messages.* FROM segment_messages LEFT JOIN messages ON id = message_id"
            " WHERE segment_id = :id ORDER BY ordinal",
            id=record.id,
        )
        chained = all(after["parent"] == before["id"] for before, after in pairwise(rows))
        if not chained or [row["ordinal"] for row in rows] != list(range(len(rows))) or not rows:
            yield "its messages do not follow each other"
        elif (rows[0]["start_token"], rows[-1]["end_token"]) != (record.start, record.end):
            yield f"its tokens [{record.start}, {record.end}) are not those of its messages"
        if record.frames_of:
            yield from self._alias_problems(record)
            return
        count, nbytes = self._rows(
            "SELECT count(*), total(length(body)) FROM frames WHERE segment_id = :id", id=record.id
        )[0]
        expected, stored = record.stored_chunks * record.num_groups, int(nbytes) + len(record.header)
        if not 1 <= record.stored_chunks <= record.num_chunks:
            yield f"it says that {record.stored_chunks} of its {record.num_chunks} rank chunks are stored"
        if count > expected or (count == expected and stored != record.nbytes):
            yield f"it has {stored} bytes in {count} frames, and should have {record.nbytes} in {expected}"
        for place, bodies in [("header", iter([record.header])), *self._bodies(record)]:
            try:
                for body in bodies:
                    frame.check(body)
            except CodecError as error:
                yield f"{place}: {error}"

    def _alias_problems(self, record: SegmentRecord) -> Iterator[str]:
        """What is wrong with a segment that has the frames of another one, which is checked by itself."""
        source = self._segments([record.frames_of]).get(record.frames_of)
        if source is None:
            yield f"segment {short(record.frames_of)}, whose frames it has, is missing"
        elif source.frames_of or self._token_ids(source) != self._token_ids(record):
            yield f"segment {short(source.id)}, whose frames it has, is not of the same tokens"
        elif (source.num_chunks, source.num_groups, source.stored_chunks) != (
            *(record.num_chunks, record.num_groups, record.stored_chunks),
        ):
            yield f"it does not have as many frames as segment {short(source.id)}, whose they are"

    def _token_ids(self, record: SegmentRecord) -> bytes:
        """Of its messages, one after the other."""
        sql = "SELECT token_ids FROM json_each(:ids) JOIN messages ON messages.id = value ORDER BY key"
        return b"".join(row["token_ids"] for row in self._rows(sql, ids=json.dumps(record.messages)))

    def _bodies(self, record: SegmentRecord) -> Iterator[tuple[str, Iterator[bytes]]]:
        for chunk in range(record.stored_chunks):
            yield f"chunk {chunk}", (body for _, _, body in self.frames(record.id, [chunk]))


def _require_whole(copy: Path, key: Key | None = None) -> None:
    """Raise StoreDamaged unless all messages of all sessions in a copy are there, as they were written."""
    branches = "SELECT name, branches.tip FROM branches JOIN sessions ON id = session_id"
    with closing(Checks(copy, key=key)) as checks:
        for row in checks._rows(f"SELECT name, tip FROM sessions UNION ALL {branches}"):
            checks.require_sound(row["name"], row["tip"])
