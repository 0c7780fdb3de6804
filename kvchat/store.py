"""The SQLite store: conversations as trees of messages, and the frames of their sealed KV.

Text and token ids are the truth and are committed before any KV; a segment is derived from them, immutable, and may be
dropped at any time. One thread uses a Store; other processes may read and write the same file meanwhile.
"""

from __future__ import annotations

import difflib
import json
import sqlite3
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from kvchat.errors import InputError, SessionExists, SessionNotFound, StoreError
from kvchat.kv_store import KVStore, short
from kvchat.migrations import explained
from kvchat.queries import INFOS, PATH, PRUNE_BRANCHES, REACHABLE, SEARCH, TOTALS
from kvchat.records import (
    COLUMNS,
    Kind,
    Message,
    Role,
    SearchHit,
    SegmentRecord,
    SessionInfo,
    message_id,
    message_of,
    message_row,
    now,
    place_below,
    session_of,
    unpack_ids,
)

__all__ = ["Kind", "Message", "Role", "SearchHit", "SegmentRecord", "SessionInfo", "Store"]

# Control characters, lone surrogates and line ends: a name is one line of a listing.
NOT_IN_NAMES = ("Cc", "Cs", "Zl", "Zp")
RESTORE = "restore a copy of the database"
REBUILT = "its KV is made again when the session is opened"


class Store(KVStore):
    """One database file of sessions, messages, segments and frames.

    Every method may raise StoreError: the file is damaged, cannot be written, or another process writes to it for
    longer than `busy_timeout_s`. A failed call changes nothing.
    """

    # sessions

    def create_session(self, name: str, model: str, fingerprint: dict[str, str]) -> SessionInfo:
        """A session without messages.

        Raises:
            SessionExists, InputError: the name is taken, or is no name.
        """
        return self._create(name, model, fingerprint, None)

    def session(self, name: str) -> SessionInfo:
        """The session of that name.

        Raises:
            SessionNotFound: with the closest names.
        """
        found = self._infos("name = :name", name=name)
        if found:
            return found[0]
        names = [row["name"] for row in self._rows("SELECT name FROM sessions")]
        close = ", ".join(repr(other) for other in difflib.get_close_matches(name, names))
        hint = f"; did you mean {close}?" if close else ";"
        raise SessionNotFound(f"there is no session {name!r}{hint} `kvchat ls` lists all")

    def last_session(self) -> SessionInfo | None:
        """The most recently updated session."""
        found = self._infos("id = (SELECT id FROM sessions ORDER BY updated DESC, id DESC LIMIT 1)")
        return found[0] if found else None

    def sessions(self) -> list[SessionInfo]:
        """All sessions, most recently updated first."""
        return self._infos("TRUE")

    def rename(self, name: str, new: str) -> None:
        """Give a session another name.

        Raises:
            SessionNotFound, SessionExists, InputError
        """
        session_id = self.session(name).id
        with self._write():
            if new != name:
                self._check_free(new)
            self._db.execute("UPDATE sessions SET name = ? WHERE id = ?", [new, session_id])

    def fork(self, name: str, new: str, tip: str | None) -> SessionInfo:
        """A new session that shares everything up to `tip`, a message on any branch; None = before the first message.

        Raises:
            SessionNotFound, SessionExists, InputError
            StoreError: the session does not hold `tip`.
        """
        source = self.session(name)
        tips = [source.tip, *self.branches(source.id)]
        if tip is not None and not any(message.id == tip for end in tips for message in self.path(end)):
            raise StoreError(f"session {name!r} has no message {tip!r}; fork it at one of its own")
        return self._create(new, source.model, source.fingerprint, tip)

    def set_model(self, name: str, model: str, fingerprint: dict[str, str]) -> None:
        """Say that another model continues the session.

        Raises:
            SessionNotFound
        """
        session_id = self.session(name).id
        with self._write():
            values = [model, json.dumps(fingerprint, sort_keys=True), now(), session_id]
            self._db.execute("UPDATE sessions SET model = ?, fingerprint = ?, updated = ? WHERE id = ?", values)

    def delete(self, name: str) -> None:
        """Remove a session for good: every message no other session reaches, its index entries, all KV made from it.

        KV can be turned back into text, so a segment that covers any removed message goes whole; a fork that shared it
        makes it again. On return the bytes are in neither the file nor its log.

        Raises:
            SessionNotFound
            StoreError: also when the session is gone, but another process kept the bytes from being wiped.
        """
        session_id = self.session(name).id
        with self._write():
            self._db.execute("DELETE FROM sessions WHERE id = ?", [session_id])
            self._db.execute(
                f"{REACHABLE} DELETE FROM segments WHERE id IN (SELECT segment_id FROM segment_messages"
                " WHERE message_id NOT IN (SELECT id FROM reachable))"
            )
            self._db.execute(f"{REACHABLE} DELETE FROM messages WHERE id NOT IN (SELECT id FROM reachable)")
            # The index only marks a row as deleted and keeps its words until it is merged.
            self._db.execute("INSERT INTO messages_fts(messages_fts) VALUES ('optimize')")
        try:
            self._shrink()
        except StoreError:
            raise StoreError(
                f"session {name!r} is deleted, but another kvchat kept its bytes from being wiped: close that, then run"
                " `kvchat vacuum`"
            ) from None

    # messages

    def add_messages(self, session_id: int, messages: Sequence[Message], expected_tip: str | None) -> None:
        """Append a chain of messages at `expected_tip` and move the tip to its end; durable on return.

        Raises:
            StoreError: the tip is not `expected_tip`: another process changed or deleted the session.
        """
        chain = [expected_tip, *(message.id for message in messages)]
        assert [message.parent for message in messages] == chain[:-1]
        with self._write():
            name, tip = self._tip(session_id)
            if tip != expected_tip:
                raise StoreError(f"session {name!r} was changed by another kvchat; open it again")
            self._insert_messages(messages, tip)
            self._db.execute("UPDATE sessions SET tip = ?, updated = ? WHERE id = ?", [chain[-1], now(), session_id])
            # Saying again what an old branch says continues that branch.
            self._db.execute(
                "DELETE FROM branches WHERE session_id = ? AND tip IN (SELECT value FROM json_each(?))",
                [session_id, json.dumps(chain[1:])],
            )

    def set_tip(self, session_id: int, tip: str | None) -> None:
        """Move to another message of the tree, or None: before the first. What lay beyond stays as a branch.

        Raises:
            StoreError: the session or the message is gone.
        """
        with self._write():
            _, old = self._tip(session_id)
            if old is not None:
                self._db.execute("INSERT OR REPLACE INTO branches VALUES (?, ?, ?)", [session_id, old, now()])
            self._db.execute("UPDATE sessions SET tip = ?, updated = ? WHERE id = ?", [tip, now(), session_id])
            self._db.execute(PRUNE_BRANCHES, {"session": session_id})

    def path(self, tip: str | None) -> list[Message]:
        """The messages from the root to `tip`."""
        return [message_of(row) for row in self._rows(PATH, tip=tip)]

    def branches(self, session_id: int) -> list[str]:
        """The ends of the branches that the session left, most recently left first; none lies on the current path."""
        rows = self._rows("SELECT tip FROM branches WHERE session_id = :id ORDER BY created DESC", id=session_id)
        return [row["tip"] for row in rows]

    def set_timings(self, message_id: str, timings: dict[str, Any]) -> None:
        """Replace what was measured of an answer, as when its seal is done."""
        with self._write("NORMAL"):
            self._db.execute("UPDATE messages SET timings = ? WHERE id = ?", [json.dumps(timings), message_id])

    def search(self, text: str, limit: int = 20) -> list[SearchHit]:
        """Messages that have every word of `text`, the last one perhaps begun only; best match first.

        Nothing in `text` is an operator. A message of several sessions is a hit in each.
        """
        # FTS5 ends a query at a NUL, and SQLite takes no lone surrogates.
        words = text.replace("\0", " ").encode(errors="replace").decode().split()
        if not words:
            return []
        match = " ".join('"' + word.replace('"', '""') + '"' for word in words) + "*"
        rows = self._rows(SEARCH, match=match, limit=limit)
        return [SearchHit(row["name"], row["turn"], row["role"], " ".join(row["snippet"].split())) for row in rows]

    # whole

    def stats(self) -> dict[str, Any]:
        """Counts, and bytes: file (with its log), kv (headers and frames), text (content and ids), free (reusable)."""
        totals = self._rows(TOTALS)[0]
        kinds = self._rows("SELECT kind, count(*) AS number FROM segments GROUP BY kind")
        counts = {key: int(totals[key]) for key in totals.keys()}  # noqa: SIM118
        return {**counts, "file_bytes": self._size(), "kinds": {row["kind"]: row["number"] for row in kinds}}

    def vacuum(self) -> tuple[int, int]:
        """Write the file anew without gaps, and the search index too; bytes before and after."""
        before = self._size()
        with self._write():
            self._db.execute("DELETE FROM frames WHERE segment_id NOT IN (SELECT id FROM segments)")
            self._db.execute("INSERT INTO messages_fts(messages_fts) VALUES ('rebuild')")
        with explained(self.file):
            self._db.vacuum()
        self._shrink()
        return before, self._size()

    def verify(self, name: str | None = None) -> list[str]:
        """Read everything, or one session and its segments; what is wrong, one line a problem.

        Raises:
            SessionNotFound
            StoreError: the file is too damaged to be read at all.
        """
        problems = [row[0] for row in self._rows("PRAGMA integrity_check(20)") if row[0] != "ok"]
        if problems:
            return [f"{self.file}: {' '.join(problem.split())}; {RESTORE}" for problem in problems]
        problems = self._verify_index() + self._verify_references()
        owners: defaultdict[str, set[str]] = defaultdict(set)
        for info in self.sessions() if name is None else [self.session(name)]:
            for tip in filter(None, [info.tip, *self.branches(info.id)]):
                problems += self._verify_path(info.name, tip, owners)
        for row in self._rows("SELECT id FROM segments ORDER BY start_token, id"):
            problems += self._verify_segment(row["id"], owners, everything=name is None)
        return problems

    def _verify_index(self) -> list[str]:
        with self._write():
            try:
                self._db.execute("INSERT INTO messages_fts(messages_fts, rank) VALUES ('integrity-check', 1)")
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
                    raise
                return ["the search index does not agree with the text; `kvchat vacuum` makes it anew"]
        return []

    def _verify_references(self) -> list[str]:
        rows = self._rows('SELECT "table", parent, count(*) AS number FROM pragma_foreign_key_check GROUP BY 1, 2')
        cures = {"frames": "`kvchat vacuum` removes them"}
        return [
            f"{row['number']} rows of {row['table']} refer to {row['parent']} that are missing;"
            f" {cures.get(row['table'], RESTORE)}"
            for row in rows
        ]

    def _verify_path(self, name: str, tip: str, owners: defaultdict[str, set[str]]) -> list[str]:
        """Check the messages up to `tip`, and note in `owners` that the session holds them."""
        rows = self._rows(PATH, tip=tip)
        if not rows or rows[0]["parent"] is not None:
            missing = rows[0]["parent"] if rows else tip
            return [f"session {name!r}: message {short(missing)} is missing, with all before it; {RESTORE}"]
        problems, place = [], None
        for row in rows:
            ids = unpack_ids(row["token_ids"])
            place = place_below(place, row["role"], len(ids))
            sound = row["id"] in owners or (
                row["id"] == message_id(row["parent"], row["role"], row["content"], ids)
                and place == (row["depth"], row["turn"], row["start_token"], row["end_token"])
            )
            if not sound:
                problems.append(f"session {name!r}: message {short(row['id'])} was altered; {RESTORE}")
            owners[row["id"]].add(name)
        return problems

    def _verify_segment(self, segment_id: str, owners: defaultdict[str, set[str]], everything: bool) -> list[str]:
        record = self._segments([segment_id])[segment_id]
        names = sorted({name for message in record.messages for name in owners.get(message, ())})
        if not names and not everything:
            return []
        label = f"session {', '.join(map(repr, names))}: segment {short(segment_id)}"
        return [f"{label}: {problem}; {REBUILT}" for problem in self._segment_problems(record)]

    def _infos(self, where: str, **values: object) -> list[SessionInfo]:
        return [session_of(row) for row in self._rows(INFOS.format(where=where), **values)]

    def _create(self, name: str, model: str, fingerprint: dict[str, str], tip: str | None) -> SessionInfo:
        with self._write():
            self._check_free(name)
            created = now()
            self._db.execute(
                "INSERT INTO sessions(name, model, fingerprint, tip, created, updated) VALUES (?, ?, ?, ?, ?, ?)",
                [name, model, json.dumps(fingerprint, sort_keys=True), tip, created, created],
            )
        return self.session(name)

    def _check_free(self, name: str) -> None:
        if not name.strip() or any(unicodedata.category(character) in NOT_IN_NAMES for character in name):
            raise InputError(f"{name!r} is no session name; use letters, digits, spaces and signs on one line")
        if self._rows("SELECT 1 FROM sessions WHERE name = :name", name=name):
            raise SessionExists(f"there is a session {name!r} already; choose another name")

    def _tip(self, session_id: int) -> tuple[str, str | None]:
        """Name and tip of a session."""
        rows = self._rows("SELECT name, tip FROM sessions WHERE id = :id", id=session_id)
        if not rows:
            raise StoreError("the session was deleted by another kvchat; `kvchat ls` lists those that are left")
        return rows[0]["name"], rows[0]["tip"]

    def _insert_messages(self, messages: Sequence[Message], tip: str | None) -> None:
        above = self._rows("SELECT depth, turn, start_token, end_token FROM messages WHERE id = :tip", tip=tip)
        place = tuple(above[0]) if above else None
        rows = []
        for message in messages:
            place = place_below(place, message.role, len(message.token_ids))
            rows.append(message_row(message, place))
        names = ", ".join(COLUMNS)
        marks = ", ".join("?" for _ in COLUMNS)
        # A fork that says the same again finds its rows there already.
        sql = f"INSERT INTO messages({names}) VALUES ({marks}) ON CONFLICT (id) DO NOTHING"
        self._db.conn.executemany(sql, rows)
