"""Saves a database of which pages are damaged, if none of them holds text.

SQLite cannot delete rows that it cannot read, nor safely write among damaged pages. So the text and all KV that can be
read are copied into a new database, and its pages are then written over the damaged one, in one transaction: a crash on
the way changes nothing. It takes room for twice the file's size. All other processes are kept out meanwhile.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqlite_utils import Database

from kvchat.cipher import database_errors, error_code
from kvchat.errors import StoreDamaged
from kvchat.store.migrations import open_database, transaction
from kvchat.store.queries import ORPHANS

Row = tuple[Any, ...]


class Source(Protocol):
    """What is read: a database, or what reads one."""

    def execute(self, sql: str, values: Any = (), /) -> Any:
        """An iterable of rows."""


TEXT = ("meta", "messages", "sessions", "branches", "tags", "unfinished", "sqlite_sequence")
"""Tables that nothing can be made again from."""
DERIVED = {"bases": "id", "segments": "id", "segment_messages": "segment_id", "frames": "segment_id"}
"""Tables that can be made again from the text, and the key by which their rows are copied."""
COUNTED = ("messages", "sessions", "branches", "tags")
"""Tables of text that have indexes, by which their rows can be counted too."""
LOST = (
    "DELETE FROM segments WHERE id IN (SELECT segment_id FROM segment_messages WHERE message_id NOT IN"
    " (SELECT id FROM messages))",
    "DELETE FROM segments WHERE basis NOT NULL AND basis NOT IN (SELECT id FROM bases)",
    "DELETE FROM segments WHERE frames_of NOT NULL AND frames_of NOT IN (SELECT id FROM segments)",
)
"""Segments that refer to what could not be copied."""


def salvage(db: Database, path: Path, busy_timeout_s: float, require_whole: Callable[[Path], None]) -> None:
    """Write the database anew without its damaged pages; KV that lay in them is lost.

    Args:
        db: the only connection to `path`, which is not encrypted.
        path: the database.
        busy_timeout_s: how long to wait for other processes.
        require_whole: given the copy before it is written over the database; raises StoreDamaged if text is missing.

    Raises:
        StoreDamaged: text cannot be read, or not all of it; nothing was changed.
        sqlite3.OperationalError: SQLITE_BUSY: another process has the database open.
    """
    beside = copy_beside(path)
    with _alone(db):
        remove_leftovers(path)
        try:
            beside.touch(mode=0o600, exist_ok=False)  # what is there now is no copy
            with closing(open_database(beside, busy_timeout_s)) as copy:
                fill(copy, db)
                require_whole(beside)
                copy.conn.backup(db.conn, progress=_until(time.monotonic() + busy_timeout_s))
        finally:
            remove_leftovers(path)


def copy_beside(path: Path) -> Path:
    """Where the copy of a database is made, with which it is then written over or replaced."""
    file = path.resolve()
    return file.with_name(f".{file.name}.kvchat-salvage")


def remove_leftovers(path: Path) -> None:
    """Remove the copy that was left by a process that was killed: it holds all text. For who has the database open.

    A copy is made only by who keeps all others out. What is no plain file is somebody else's, and stays.
    """
    copy = copy_beside(path)
    for suffix in ("", "-wal", "-shm", "-journal", "-damaged", "-damaged-wal", "-damaged-shm"):
        file = copy.with_name(copy.name + suffix)
        if file.is_file() and not file.is_symlink():
            file.unlink(missing_ok=True)


@contextmanager
def _alone(db: Database) -> Iterator[None]:
    """Keep all other processes out of the database: what they wrote now would be written over."""
    db.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    try:
        with transaction(db, "FULL"):
            pass  # the lock comes with the first transaction, and stays
        yield
    finally:
        db.execute("PRAGMA locking_mode = NORMAL").fetchall()
        db.execute("PRAGMA user_version").fetchall()  # and goes with the first read


def _until(deadline: float) -> Callable[[int, int, int], None]:
    """For `Connection.backup`, which else tries again without end while the database is busy."""

    def check(status: int, _remaining: int, _total: int) -> None:
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > deadline:
            busy = sqlite3.OperationalError("database is locked")
            busy.sqlite_errorcode = status
            raise busy

    return check


def fill(copy: Database, db: Source) -> None:
    """Copy all that can be read, the rows of a key whole or not at all. Raises StoreDamaged: text is missing."""
    copy.execute("PRAGMA foreign_keys = OFF")
    with transaction(copy, "NORMAL"):
        for table in TEXT:
            copy.execute(f"DELETE FROM {table}")
            _insert(copy, table, _text(db, table))
        for table, key in DERIVED.items():
            # As many keys as can be listed: the index that gives them is small, and so more likely whole than the rows.
            for (value,) in _readable(db, f"SELECT DISTINCT {key} FROM {table} ORDER BY 1")[0]:
                rows, error = _readable(db, f"SELECT * FROM {table} WHERE {key} = ?", value)
                _insert(copy, table, [] if error else rows)
        for sql in (*LOST, *(ORPHANS.format(table=table) for table in ("segment_messages", "frames"))):
            copy.execute(sql)
        if lost := copy.execute("PRAGMA foreign_key_check").fetchone():
            raise _lost(lost[0], f"what refers to {lost[2]} is not there")


def _text(db: Source, table: str) -> list[Row]:
    """All rows of a table. A scan can leave rows out and report nothing, so each index must know of as many."""
    rows, error = _readable(db, f"SELECT * FROM {table} NOT INDEXED ORDER BY 1")
    if error:
        raise _lost(table, str(error)) from error
    for (index,) in list(db.execute(f"SELECT name FROM pragma_index_list('{table}')")) if table in COUNTED else ():
        found, error = _readable(db, f'SELECT count(*) FROM {table} INDEXED BY "{index}"')
        if error or found != [(len(rows),)]:
            raise _lost(table, f"the index {index} does not have its {len(rows)} rows") from error
    return rows


def _lost(table: str, why: str) -> StoreDamaged:
    return StoreDamaged(f"text cannot be read from the table {table} ({why}); restore a copy: nothing was changed")


def _insert(copy: Database, table: str, rows: list[Row]) -> None:
    """Rows of text all, of KV those that keep to the schema."""
    if not rows:
        return
    otherwise = "ABORT" if table in TEXT else "IGNORE"
    sql = f"INSERT OR {otherwise} INTO {table} VALUES ({', '.join('?' for _ in rows[0])})"
    try:
        copy.conn.executemany(sql, rows)
    except database_errors() as error:
        if error_code(error) & 0xFF != sqlite3.SQLITE_CONSTRAINT:
            raise
        raise _lost(table, str(error)) from error


def _readable(db: Source, sql: str, *values: object) -> tuple[list[Row], Exception | None]:
    """The rows up to the first damaged page, and what SQLite says of that page."""
    rows: list[Row] = []
    try:
        for row in db.execute(sql, values):
            rows.append(row)
    except database_errors() as error:
        if error_code(error) & 0xFF != sqlite3.SQLITE_CORRUPT:
            raise
        return rows, error
    return rows, None
