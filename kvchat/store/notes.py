"""The part of the store that keeps what is noted about sessions: titles, tags, drafts and answers in the making.

None of it changes what the model reads, so nothing here moves a session up in the listing. Drafts and answers in the
making are written twice a second: a crash of the program loses nothing of them, a power cut perhaps the newest.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence

from kvchat.errors import InputError, StoreError
from kvchat.store.kv import KVStore
from kvchat.store.queries import TREE
from kvchat.store.records import Message, Titled, message_of, pack_ids, unpack_ids

# Control characters, lone surrogates and line ends: names, titles and tags are parts of one line of a listing.
NOT_ON_A_LINE = ("Cc", "Cs", "Zl", "Zp")
LONGEST_TITLE, LONGEST_TAG = 120, 64
UNFINISHED = """
INSERT INTO unfinished(session_id, parent, token_ids) SELECT id, :parent, :ids FROM sessions WHERE id = :session
ON CONFLICT (session_id) DO UPDATE SET parent = excluded.parent, token_ids = excluded.token_ids
"""


class NotesStore(KVStore):
    """Use it as part of `kvchat.store.store.Store`."""

    def set_title(self, session_id: int, title: str, by: Titled) -> None:
        """Give a session a title; "" takes it away. One of the model never takes the place of one of the user.

        Raises:
            InputError: it is too long, or has characters that no line has.
            StoreError: another process deleted the session.
        """
        title = " ".join(title.split())
        if len(title) > LONGEST_TITLE or not on_a_line(title):
            raise InputError(f"{title!r} is no title; use at most {LONGEST_TITLE} letters, digits and signs")
        sql = "UPDATE sessions SET title = ?, titled = ? WHERE id = ? AND (titled <> 'user' OR ? = 'user')"
        with self._write():
            self._require(session_id)
            self._db.execute(sql, [title, by if title else "", session_id, by])

    def set_tags(self, session_id: int, tags: Collection[str]) -> None:
        """Give a session these tags and no others.

        Raises:
            InputError: one is empty, too long, or has blanks or control characters.
            StoreError: another process deleted the session.
        """
        for tag in tags:
            _check_tag(tag)
        with self._write():
            self._require(session_id)
            self._put_tags(session_id, tags)

    def change_tags(self, session_id: int, more: Collection[str], fewer: Collection[str]) -> tuple[str, ...]:
        """Add tags to those that a session has by then, and take some away; all that it has afterwards.

        Raises:
            InputError, StoreError: as `set_tags`.
        """
        for tag in more:
            _check_tag(tag)
        with self._write():
            self._require(session_id)
            rows = self._rows("SELECT tag FROM tags WHERE session_id = :id", id=session_id)
            tags = {row["tag"] for row in rows}.union(more).difference(fewer)
            self._put_tags(session_id, tags)
        return tuple(sorted(tags))

    def draft(self, session_id: int) -> str:
        """What was typed in a session and not sent. Raises StoreError: another process deleted it."""
        rows = self._rows("SELECT draft FROM sessions WHERE id = :id", id=session_id)
        if not rows:
            raise deleted()
        return str(rows[0]["draft"])

    def set_draft(self, session_id: int, text: str) -> None:
        """Keep what is being typed; "" when it was sent.

        Raises:
            InputError: it holds half of a surrogate pair.
            StoreError: another process deleted the session.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the draft holds half a surrogate pair, which is no text, and is not kept") from None
        with self._write("NORMAL"):
            if not self._db.execute("UPDATE sessions SET draft = ? WHERE id = ?", [text, session_id]).rowcount:
                raise deleted()

    def set_unfinished(self, session_id: int, parent: str, ids: Sequence[int]) -> None:
        """Keep the tokens of an answer to the message `parent` so far, in place of those that were kept before.

        Raises:
            StoreError: another process deleted the session, or `parent` is not in the store.
        """
        values = {"session": session_id, "parent": parent, "ids": pack_ids(ids)}
        with self._write("NORMAL"):
            if not self._db.execute(UNFINISHED, values).rowcount:
                raise deleted()

    def unfinished(self, session_id: int) -> tuple[str, list[int]] | None:
        """The message that an unfinished answer follows, and its tokens; None if there is no such answer."""
        rows = self._rows("SELECT parent, token_ids FROM unfinished WHERE session_id = :id", id=session_id)
        return (rows[0]["parent"], [*unpack_ids(rows[0]["token_ids"])]) if rows else None

    def clear_unfinished(self, session_id: int) -> None:
        """Forget the unfinished answer: it is a message now, or nobody wants it."""
        with self._write("NORMAL"):
            self._db.execute("DELETE FROM unfinished WHERE session_id = ?", [session_id])

    def tree(self, session_id: int) -> list[Message]:
        """The messages of all branches of a session, parents before children."""
        return [message_of(row) for row in self._rows(TREE, session=session_id)]

    def _require(self, session_id: int) -> None:
        if not self._rows("SELECT 1 FROM sessions WHERE id = :id", id=session_id):
            raise deleted()

    def _put_tags(self, session_id: int, tags: Collection[str]) -> None:
        self._db.execute("DELETE FROM tags WHERE session_id = ?", [session_id])
        self._db.conn.executemany("INSERT INTO tags VALUES (?, ?)", [(session_id, tag) for tag in sorted(set(tags))])


def on_a_line(text: str) -> bool:
    """Whether all of a text can stand on one line."""
    return not any(unicodedata.category(character) in NOT_ON_A_LINE for character in text)


def deleted() -> StoreError:
    """What is raised when a session that was there is gone."""
    return StoreError("the session was deleted by another kvchat; `kvchat ls` lists those that are left")


def _check_tag(tag: str) -> None:
    if not tag or len(tag) > LONGEST_TAG or not on_a_line(tag) or tag.split() != [tag]:
        raise InputError(f"{tag!r} is no tag; use at most {LONGEST_TAG} letters, digits and signs without blanks")
