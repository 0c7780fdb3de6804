"""Saves a database of which pages are damaged, if none of them holds text.

SQLite cannot delete rows that it cannot read, nor safely write among damaged pages. So the text and all KV that can be
read are copied into a new database, and its pages are then written over the damaged one, in one transaction: a crash on
the way changes nothing. It takes room for twice the file's size.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from kvchat.errors import StoreDamaged
from kvchat.migrations import open_database, transaction

Row = tuple[Any, ...]

TEXT = ("meta", "messages", "sessions", "branches", "sqlite_sequence")
"""Tables that nothing can be made again from."""
DERIVED = {"bases": "id", "segments": "id", "segment_messages": "segment_id", "frames": "segment_id"}
"""Tables that can be made again from the text, and the key by which their rows are copied."""
ORPHANS = (
    "DELETE FROM segments WHERE basis NOT NULL AND basis NOT IN (SELECT id FROM bases)",
    "DELETE FROM segment_messages WHERE segment_id NOT IN (SELECT id FROM segments)",
    "DELETE FROM frames WHERE segment_id NOT IN (SELECT id FROM segments)",
)


def salvage(db: Database, path: Path) -> None:
    """Write the database anew without its damaged pages; KV that lay in them is lost.

    Raises:
        StoreDamaged: text cannot be read; nothing was changed.
    """
    beside = path.with_name(f"{path.name}-salvage")
    try:
        copy = open_database(beside, busy_timeout_s=10.0)
        try:
            _fill(copy, db)
            copy.conn.backup(db.conn)
        finally:
            copy.close()
    finally:
        for file in path.parent.glob(f"{beside.name}*"):
            file.unlink()


def _fill(copy: Database, db: Database) -> None:
    """Copy all that can be read, the rows of a key whole or not at all."""
    copy.execute("PRAGMA foreign_keys = OFF")
    with transaction(copy, "NORMAL"):
        for table in TEXT:
            copy.execute(f"DELETE FROM {table}")
            rows, error = _readable(db, f"SELECT * FROM {table} ORDER BY 1")
            if error:
                raise StoreDamaged(
                    f"text cannot be read from the table {table} ({error}); restore a copy: nothing was changed"
                ) from error
            _insert(copy, table, rows)
        for table, key in DERIVED.items():
            # As many keys as can be listed: the index that gives them is small, and so more likely whole than the rows.
            for (value,) in _readable(db, f"SELECT DISTINCT {key} FROM {table} ORDER BY 1")[0]:
                rows, error = _readable(db, f"SELECT * FROM {table} WHERE {key} = ?", value)
                _insert(copy, table, [] if error else rows)
        for orphans in ORPHANS:
            copy.execute(orphans)


def _insert(copy: Database, table: str, rows: list[Row]) -> None:
    if rows:
        copy.conn.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' for _ in rows[0])})", rows)


def _readable(db: Database, sql: str, *values: object) -> tuple[list[Row], sqlite3.DatabaseError | None]:
    """The rows up to the first damaged page, and what SQLite says of that page."""
    rows: list[Row] = []
    try:
        for row in db.execute(sql, values):
            rows.append(row)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        return rows, error
    return rows, None
