"""The SQLite store: conversations as trees of messages, and the frames of their sealed KV.

Text and token ids are the truth and are committed before any KV; a segment is derived from them, immutable, and may be
dropped at any time. One thread uses a Store; other processes may read and write the same file meanwhile.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvchat.errors import InputError, SessionChanged, SessionExists, SessionNotFound, StoreDamaged, StoreError
from kvchat.store.aliases import AliasStore
from kvchat.store.checks import RESTORE, Checks
from kvchat.store.limited import LimitedStore
from kvchat.store.listing import find_messages, list_sessions
from kvchat.store.migrations import explained
from kvchat.store.notes import NotesStore, deleted, on_a_line
from kvchat.store.queries import BASES_OF, INFOS, ORPHANS, PATH, PRUNE_BRANCHES, REACHABLE, TOTALS
from kvchat.store.records import (
    COLUMNS,
    Kind,
    Message,
    Role,
    SearchHit,
    SegmentRecord,
    SessionInfo,
    message_of,
    message_row,
    now,
    place_below,
    session_of,
)
from kvchat.store.salvage import remove_leftovers
from kvchat.store.vectors import VectorStore

__all__ = ["Kind", "Message", "Role", "SearchHit", "SegmentRecord", "SessionInfo", "Store"]

LONGEST_NAME = 200
"""Characters of a session's name. A store may hold longer ones from before there was a limit."""


class Store(LimitedStore, AliasStore, VectorStore, NotesStore, Checks):
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

    def take_in(
        self, name: str, model: str, fingerprint: dict[str, str], batches: Iterable[Sequence[Message]]
    ) -> SessionInfo:
        """A session with the messages that `batches` bring, each after the last, all of them; nothing, if one raises.

        Raises:
            SessionExists, InputError: the name is taken, or is no name.
        """
        with self._write():
            self._insert_session(name, model, fingerprint, None)
            tip: str | None = None
            for batch in batches:
                self._insert_messages(batch, tip)
                tip = batch[-1].id
            self._db.execute("UPDATE sessions SET tip = ? WHERE name = ?", [tip, name])
        return self.session(name)

    def session(self, name: str, session_id: int | None = None) -> SessionInfo:
        """The session of that name, which must be the one with `session_id` if that is known already.

        Raises:
            SessionNotFound: with the closest names.
            StoreError: another process gave the name to another session.
        """
        found = self._infos("name = :name", name=name)
        if found and session_id not in (None, found[0].id):
            raise StoreError(f"another session was named {name!r} meanwhile, and is left alone; try again")
        if found:
            return found[0]
        names = [row["name"] for row in self._rows("SELECT name FROM sessions")]
        close = ", ".join(repr(other) for other in difflib.get_close_matches(name, names))
        hint = f"; did you mean {close}?" if close else ";"
        raise SessionNotFound(f"there is no session {name!r}{hint} `kvchat ls` lists all")

    def name_of(self, session_id: int) -> str:
        """The name that a session has now. Raises StoreError: it was deleted."""
        return self._tip(session_id)[0]

    def last_session(self) -> SessionInfo | None:
        """The most recently updated session."""
        found = self._infos("id = (SELECT id FROM sessions ORDER BY updated DESC, id DESC LIMIT 1)")
        return found[0] if found else None

    def sessions(self) -> list[SessionInfo]:
        """All sessions, most recently updated first."""
        return list_sessions(self._rows)

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

        It takes the settings and the tags over; title and draft it gets of its own.

        Raises:
            SessionNotFound, SessionExists, InputError
            StoreError: the session does not hold `tip`.
        """
        source = self.session(name)
        tips = [source.tip, *self.branches(source.id)]
        if tip is not None and not any(message.id == tip for end in tips for message in self.path(end)):
            raise StoreError(f"session {name!r} has no message {tip!r}; fork it at one of its own")
        with self._write():
            self._insert_session(new, source.model, source.fingerprint, tip)
            own = "SELECT settings FROM sessions WHERE id = ?"
            self._db.execute(f"UPDATE sessions SET settings = ({own}) WHERE name = ?", [source.id, new])
            tags = "SELECT sessions.id, tag FROM tags, sessions WHERE session_id = ? AND name = ?"
            self._db.execute(f"INSERT INTO tags {tags}", [source.id, new])
        return self.session(new)

    def set_settings(self, session_id: int, settings: Mapping[str, Any]) -> None:
        """Give a session these settings of its own, by dotted key, and no others."""
        with self._write():
            self._db.execute("UPDATE sessions SET settings = ? WHERE id = ?", [json.dumps(settings), session_id])

    def set_model(self, name: str, model: str, fingerprint: dict[str, str]) -> None:
        """Say that another model continues the session.

        Raises:
            SessionNotFound
        """
        session_id = self.session(name).id
        with self._write():
            values = [model, json.dumps(fingerprint, sort_keys=True), now(), session_id]
            self._db.execute("UPDATE sessions SET model = ?, fingerprint = ?, updated = ? WHERE id = ?", values)

    def delete(self, name: str, session_id: int | None = None) -> None:
        """Remove a session for good: every message no other session reaches, its index entries, all KV made from it.

        KV can be turned back into text, so a segment that covers any removed message goes whole, and so does every
        segment with a basis that may have been fitted to one; a fork that shared them makes them again. On return the
        bytes are in neither the file nor its log.

        Args:
            name: the session.
            session_id: as for `session`.

        Raises:
            SessionNotFound
            StoreError: the name belongs to another session by now; or the session is gone, but another process kept
                the bytes from being wiped.
        """
        with self._write():
            found = self.session(name, session_id).id
            bases = [row["basis"] for row in self._rows(BASES_OF, session=found)]
            self._db.execute("DELETE FROM sessions WHERE id = ?", [found])
            self._db.execute(
                f"{REACHABLE} DELETE FROM segments WHERE id IN (SELECT segment_id FROM segment_messages"
                " WHERE message_id NOT IN (SELECT id FROM reachable))"
            )
            self._db.execute(f"{REACHABLE} DELETE FROM messages WHERE id NOT IN (SELECT id FROM reachable)")
            if self._rows("SELECT changes() AS number")[0]["number"]:  # `rowcount` counts nothing after WITH
                sharing = "DELETE FROM segments WHERE basis IN (SELECT value FROM json_each(?))"
                self._db.execute(sharing, [json.dumps(bases)])
            # The index only marks a row as deleted and keeps its words until it is merged.
            self._db.execute("INSERT INTO messages_fts(messages_fts) VALUES ('optimize')")
            remove_leftovers(self.file)
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
            SessionChanged: the tip is not `expected_tip`: another process wrote to the session.
            StoreError: another process deleted the session.
        """
        chain = [expected_tip, *(message.id for message in messages)]
        assert [message.parent for message in messages] == chain[:-1]
        with self._write():
            name, tip = self._tip(session_id)
            if tip != expected_tip:
                raise SessionChanged(f"session {name!r} was changed by another kvchat; open it again")
            self._insert_messages(messages, tip)
            self._db.execute("UPDATE sessions SET tip = ?, updated = ? WHERE id = ?", [chain[-1], now(), session_id])
            # Saying again what an old branch says continues that branch.
            self._db.execute(
                "DELETE FROM branches WHERE session_id = ? AND tip IN (SELECT value FROM json_each(?))",
                [session_id, json.dumps(chain[1:])],
            )

    def add_branch(self, session_id: int, messages: Sequence[Message]) -> None:
        """Append a chain of messages to one that is there, beside the session's path; durable on return.

        Raises:
            StoreError: another process deleted the session.
        """
        with self._write():
            self._tip(session_id)
            self._insert_messages(messages, messages[0].parent)
            self._db.execute("INSERT OR REPLACE INTO branches VALUES (?, ?, ?)", [session_id, messages[-1].id, now()])
            self._db.execute(PRUNE_BRANCHES, {"session": session_id})

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
        return find_messages(self._rows, match, limit)

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
            self._db.execute(ORPHANS.format(table="frames"))
            self._db.execute("INSERT INTO messages_fts(messages_fts) VALUES ('rebuild')")
            remove_leftovers(self.file)
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
        return self.page_problems() or self.problems(self._ends(name), everything=name is None)

    def repair(self, name: str | None = None) -> list[str]:
        """Remove what is damaged, of everything or of one session, but text; what was done, one line each.

        Raises:
            SessionNotFound
            StoreDamaged: pages with text are damaged; nothing was changed.
            StoreError: pages are damaged, and another process has the file open; nothing was changed.
        """
        problems = self.page_problems()
        for problem in problems:
            if problem.endswith(RESTORE):
                raise StoreDamaged(f"{problem}: nothing was changed")
        done = self.mend_pages() if problems else []
        return done + self.mend(self._ends(name), everything=name is None)

    def _ends(self, name: str | None) -> dict[str, list[str]]:
        """The ends of the path and the branches of one session, or of all."""
        infos = self.sessions() if name is None else [self.session(name)]
        return {info.name: [tip for tip in (info.tip, *self.branches(info.id)) if tip] for info in infos}

    def _infos(self, where: str, **values: object) -> list[SessionInfo]:
        return [session_of(row) for row in self._rows(INFOS.format(where=where), **values)]

    def _create(self, name: str, model: str, fingerprint: dict[str, str], tip: str | None) -> SessionInfo:
        with self._write():
            self._insert_session(name, model, fingerprint, tip)
        return self.session(name)

    def _insert_session(self, name: str, model: str, fingerprint: dict[str, str], tip: str | None) -> None:
        self._check_free(name)
        created = now()
        self._db.execute(
            "INSERT INTO sessions(name, model, fingerprint, tip, created, updated) VALUES (?, ?, ?, ?, ?, ?)",
            [name, model, json.dumps(fingerprint, sort_keys=True), tip, created, created],
        )

    def _check_free(self, name: str) -> None:
        if not name.strip() or not on_a_line(name):
            raise InputError(f"{name!r} is no session name; use letters, digits, spaces and signs on one line")
        if len(name) > LONGEST_NAME:
            begins = name[:24]
            raise InputError(f"a session name has at most {LONGEST_NAME} characters; {begins!r}… has {len(name)}")
        if self._rows("SELECT 1 FROM sessions WHERE name = :name", name=name):
            raise SessionExists(f"there is a session {name!r} already; choose another name")

    def _tip(self, session_id: int) -> tuple[str, str | None]:
        """Name and tip of a session."""
        rows = self._rows("SELECT name, tip FROM sessions WHERE id = :id", id=session_id)
        if not rows:
            raise deleted()
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
