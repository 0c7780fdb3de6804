"""The part of the store that lets a segment have the frames of another one, of the same tokens elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from kvchat.store.kv import KVStore
from kvchat.store.queries import ALIAS
from kvchat.store.records import SegmentRecord, now, segment_id

ALIAS_CODEC = "alias"
"""Stands for the codec in the name of such a segment, which stays when its frames are written anew."""


class AliasStore(KVStore):
    """Use it as part of `kvchat.store.store.Store`."""

    def put_alias(
        self, source: SegmentRecord, messages: Sequence[str], start: int, offset: int, onward: int
    ) -> SegmentRecord | None:
        """A segment of these messages, which say the same tokens as `source`, with its frames; None if that is gone.

        One that is there already stays as it is.

        Args:
            source: sealed.
            messages: their ids.
            start: place of the first token.
            offset, onward: as of `Ranking`.

        Raises:
            StoreError: one of the messages was deleted meanwhile.
        """
        identity = segment_id(source.fingerprint, "sealed", source.scorer, ALIAS_CODEC, messages[0], messages[-1])
        place = {"id": identity, "start": start, "offset": offset, "onward": onward}
        with self._write("NORMAL"):
            self._db.execute(ALIAS, {**place, "source": source.frames_of or source.id, "created": now()})
            if self._has(identity):
                self._db.conn.executemany(
                    "INSERT OR IGNORE INTO segment_messages VALUES (?, ?, ?)",
                    [(identity, ordinal, message) for ordinal, message in enumerate(messages)],
                )
        return self.segment(identity)
