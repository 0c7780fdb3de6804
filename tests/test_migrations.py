"""A store in the schema of every version so far is taken over with all it holds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlite_utils import Database

from kvchat.store.migrations import MIGRATIONS
from kvchat.store.store import Store
from tests.store_parts import converse, segment

TABLES = ("messages", "sessions", "branches", "segments", "segment_messages", "frames")
LATER = [
    *("m002_partial_segments_and_probes", "m003_settings_of_sessions", "m004_vectors", "m005_aliases_of_segments"),
    *("m006_titles_tags_drafts_and_unfinished_answers", "m007_vectors_of_sentences"),
]
"""Before each of these a version of the schema ended."""


def put_back(store: Path, old: Path, stop_before: str) -> None:
    """Write what a store holds in the schema that ended before a migration."""
    with closing(sqlite3.connect(old)) as connection:
        MIGRATIONS.apply(Database(connection, execute_plugins=False), stop_before=stop_before)
        connection.execute("ATTACH ? AS newer", [str(store)])
        for table in TABLES:
            columns = ", ".join(row[1] for row in connection.execute(f"PRAGMA main.table_info({table})"))
            connection.execute(f"INSERT INTO main.{table}({columns}) SELECT {columns} FROM newer.{table}")
        connection.commit()


def test_every_migration_but_the_first_is_tried_here() -> None:
    with Database(memory=True) as blank:
        assert [migration.name for migration in MIGRATIONS.pending(blank)][1:] == LATER


@pytest.mark.parametrize("later", LATER)
def test_an_older_store_is_taken_over_whole(tmp_path: Path, later: str) -> None:
    with closing(Store(tmp_path / "now.db")) as store:
        _, chain = converse(store, "trip", "where", "Rome", "and then", "Naples")
        record, frames = segment(chain, 0, 4)
        store.put_segment(record, frames)
        info = store.session("trip")
    put_back(tmp_path / "now.db", tmp_path / "old.db", later)
    with closing(Store(tmp_path / "old.db")) as store:
        assert store.session("trip") == info and store.path(info.tip) == chain
        (found, count), *rest = store.cover([message.id for message in chain], record.fingerprint)
        assert (found.id, count, found.stored_chunks, rest) == (record.id, 4, record.num_chunks, [])
        assert list(store.frames(record.id, range(record.num_chunks))) == frames
        assert [hit.session for hit in store.search("Naples")] == ["trip"]
        assert store.verify() == []
        assert (info.titled, info.tags, store.draft(info.id), store.unfinished(info.id)) == ("", (), "", None)
        store.set_title(info.id, "Italy", "user")
        store.set_tags(info.id, ["work"])
        assert store.session("trip") == replace(info, title="Italy", titled="user", tags=("work",))
