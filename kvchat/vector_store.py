"""The part of the store that says which messages have to do with a text: by their words, or by vectors of them.

Vectors are derived from the text, and tell about it: they go with their messages. Equal messages after an equal past
are one row, so sessions that share them share their vectors too.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from kvchat.kv_store import KVStore
from kvchat.queries import MATCHES

MOST_WORDS = 128
"""Words of a text that are looked for; of a longer one the longest, which are the rarest."""


class VectorStore(KVStore):
    """Use it as part of `kvchat.store.Store`."""

    def matches(self, text: str, message_ids: Sequence[str]) -> dict[str, float]:
        """Those of the messages that have any word of `text`, and how well they match: BM25, higher is better.

        A word that most of the store's messages have counts next to nothing. Nothing in `text` is an operator.
        """
        wanted = sorted(dict.fromkeys(words(text)), key=len, reverse=True)[:MOST_WORDS]
        if not wanted:
            return {}
        match = " OR ".join(f'"{word}"' for word in wanted)
        rows = self._rows(MATCHES, match=match, ids=json.dumps(list(message_ids)))
        return {row["id"]: -float(row["rank"]) for row in rows}

    def vectors(self, embedder: str, message_ids: Sequence[str]) -> dict[str, bytes]:
        """What `put_vectors` wrote for these messages; those without are left out."""
        sql = (
            "SELECT message_id, body FROM json_each(:ids) CROSS JOIN vectors"
            " ON message_id = value WHERE embedder = :embedder"
        )
        rows = self._rows(sql, ids=json.dumps(list(message_ids)), embedder=embedder)
        return {row["message_id"]: bytes(row["body"]) for row in rows}

    def put_vectors(self, embedder: str, bodies: Mapping[str, bytes]) -> None:
        """Write the vectors of messages, by id; messages that were deleted meanwhile are passed over."""
        sql = "INSERT OR REPLACE INTO vectors(message_id, embedder, body) SELECT id, ?, ? FROM messages WHERE id = ?"
        with self._write("NORMAL"):
            self._db.conn.executemany(sql, [(embedder, body, message) for message, body in bodies.items()])


def words(text: str) -> Iterator[str]:
    """Runs of letters, digits and marks, as the index cuts text; so a quoted one is one word of the index, or none."""
    kept = (character if unicodedata.category(character)[0] in "LNM" else " " for character in text.casefold())
    yield from "".join(kept).split()
