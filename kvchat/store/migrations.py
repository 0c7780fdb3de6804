"""The database file: how it is opened, its schema as migrations, and what its errors mean to a user.

Migrations are append-only: one that was released is never edited, a change is a new function at the end.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sqlite_utils import Database, Migrations

from kvchat.cipher import SMALLEST, Key, connect, database_errors, error_code, salt
from kvchat.errors import StoreDamaged, StoreError
from kvchat.store.schema import ALIASES, NOTES, PARTIAL, SCHEMA, VECTORS

FORMAT = 1
"""Raised when an older program would misread the rows, even though their tables look familiar."""

# Sixteen KiB pages read frames fastest, tried from 4 to 64 KiB; the memory map doubles that speed.
PAGE_SIZE = 16_384
MMAP_SIZE = 1 << 30
JOURNAL_SIZE_LIMIT = 64 << 20  # a large segment swells the log

MIGRATIONS = Migrations("kvchat")


@MIGRATIONS()  # type: ignore[untyped-decorator]
def m001_conversations_and_segments(db: Database) -> None:
    """Everything that the first version stores."""
    db.executescript(SCHEMA)
    db.execute("INSERT INTO meta VALUES ('format', ?)", [str(FORMAT)])
    messages = db.table("messages")
    messages.enable_fts(["content"], create_triggers=True, tokenize="porter unicode61 remove_diacritics 2")
    # Content never changes, and this trigger would index a message again whenever its timings are set.
    db.execute("DROP TRIGGER messages_au")


@MIGRATIONS()  # type: ignore[untyped-decorator]
def m002_partial_segments_and_probes(db: Database) -> None:
    """Segments of which only the first chunks are stored, or that share a basis; recorded answers to check against."""
    db.executescript(PARTIAL)


@MIGRATIONS()  # type: ignore[untyped-decorator]
def m003_settings_of_sessions(db: Database) -> None:
    """Settings that one session has for itself."""
    db.execute("ALTER TABLE sessions ADD COLUMN settings TEXT NOT NULL DEFAULT '{}'")


@MIGRATIONS()  # type: ignore[untyped-decorator]
def m004_vectors(db: Database) -> None:
    """What messages are about, by which those that concern a question are found."""
    db.executescript(VECTORS)


@MIGRATIONS()  # type: ignore[untyped-decorator]
def m005_aliases_of_segments(db: Database) -> None:
    """Segments whose frames are those of another one, as of a document that is attached to several sessions."""
    db.executescript(ALIASES)


@MIGRATIONS()  # type: ignore[untyped-decorator]
def m006_titles_tags_drafts_and_unfinished_answers(db: Database) -> None:
    """What is noted about sessions, and the answers that were in the making."""
    db.executescript(NOTES)


@MIGRATIONS()  # type: ignore[untyped-decorator]
def m007_vectors_of_sentences(db: Database) -> None:
    """Vectors are of sentences now; those of whole messages are not asked for any more, and made anew when needed."""
    db.execute("DELETE FROM vectors")


def open_database(path: Path, busy_timeout_s: float, key: Key | None = None) -> Database:
    """The database at `path`, made with its folder if there is none, in the newest schema; encrypted if `key` is given.

    Raises:
        StoreError: damaged, not kvchat's, of a newer kvchat, busy, in a place that cannot be written, or the key wrong.
    """
    try:
        # Conversations are private; the log takes over the file's mode.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
        # SQLite takes a file of a few bytes for an empty one, and would write over it.
        if path.is_file() and 0 < path.stat().st_size < SMALLEST:
            raise StoreDamaged(_DAMAGED.format(path=path, error="file is not a database"))
        inode = path.stat().st_ino
    except OSError as error:
        raise StoreError(f"{path} cannot be made ({error.strerror}); choose another file with --store") from None
    try:
        with explained(path):
            return _opened(path, busy_timeout_s, key)
    except StoreError:
        if path.stat().st_ino == inode:
            raise
        raise StoreError(f"{path} was encrypted or decrypted by another kvchat meanwhile; try again") from None


def open_reader(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """One more connection to the database at an absolute path that is not encrypted, for any one thread at a time."""
    # Not to make a file where there is none any more.
    uri = f"{path.as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, timeout=busy_timeout_s, check_same_thread=False, uri=True)
    try:
        connection.execute(f"PRAGMA mmap_size = {MMAP_SIZE}").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def _opened(path: Path, busy_timeout_s: float, key: Key | None) -> Database:
    if key is None:
        connection: Any = sqlite3.connect(path, timeout=busy_timeout_s)
    else:
        connection = connect(path, busy_timeout_s, key, PAGE_SIZE)
    db = Database(connection, execute_plugins=False)
    try:
        _prepare(db, path, MMAP_SIZE if key is None else 0)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def transaction(db: Database, synchronous: Literal["FULL", "NORMAL"]) -> Iterator[None]:
    """All or nothing. FULL also survives a power cut right after the commit."""
    db.execute(f"PRAGMA synchronous = {synchronous}")
    # A deferred transaction that reads first fails at once, without waiting, if another process wrote meanwhile.
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.commit()
    except BaseException:
        db.rollback()
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as one line for the user.

    Raises:
        StoreDamaged: the file is damaged.
        StoreError: in place of another error of SQLite or SQLCipher that the user can do something about.
    """
    try:
        yield
    except database_errors() as error:
        code = error_code(error)
        text = EXPLANATIONS.get(code, EXPLANATIONS.get(code & 0xFF))
        if text is None:
            raise
        if text == _DAMAGED and salt(path) is not None:
            text = _ENCRYPTED
        kind = StoreDamaged if text in (_DAMAGED, _DAMAGED_PAGES, _ENCRYPTED) else StoreError
        raise kind(text.format(path=path, error=error)) from error


_DAMAGED = "{path} is damaged ({error}); restore a copy, or move it away and start anew: nothing was changed"
_ENCRYPTED = "{path} is encrypted, or damaged: give its key, or restore a copy: nothing was changed"
_DAMAGED_PAGES = "{path} is damaged ({error}); `kvchat verify --repair` saves what it can, else restore a copy"
_BUSY = "{path} is busy: another kvchat is writing to it; try again when that is done"
_READ_ONLY = "{path} cannot be written ({error}); allow writing to it and its folder, or choose another with --store"
EXPLANATIONS = {
    sqlite3.SQLITE_CORRUPT: _DAMAGED_PAGES,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: "{path} cannot be opened ({error}); choose a file in a folder of yours with --store",
    sqlite3.SQLITE_FULL: "there is no room left on the disk of {path}; free some: nothing was changed",
    sqlite3.SQLITE_IOERR: "{path} cannot be read or written ({error}); check its disk",
    sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY: "{path} was changed by another kvchat ({error}); open the session again",
}


def _prepare(db: Database, path: Path, mmap_size: int) -> None:
    tables = db.table_names()
    _refuse_foreign(db, path, tables)
    if not tables:
        # Both are fixed once the first table exists.
        db.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _enable_wal(db)
    for setting in ("foreign_keys = ON", "secure_delete = ON", f"mmap_size = {mmap_size}"):
        db.execute(f"PRAGMA {setting}").fetchall()
    db.execute(f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT}").fetchall()
    if MIGRATIONS.pending(db):
        with transaction(db, "FULL"):
            MIGRATIONS.apply(db)


def _refuse_foreign(db: Database, path: Path, tables: list[str]) -> None:
    applied = {migration.name for migration in MIGRATIONS.applied(db)}
    if tables and not applied:
        raise StoreError(f"{path} is a database of another program; choose another file with --store")
    with Database(memory=True) as blank:
        known = {migration.name for migration in MIGRATIONS.pending(blank)}
    found = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() if "meta" in tables else None
    if applied - known or (found and int(found[0]) > FORMAT):
        raise StoreError(f"{path} was written by a newer kvchat; update kvchat to open it: nothing was changed")


def _enable_wal(db: Database) -> None:
    # Alone of all statements this one does not wait while another process makes the same file.
    for patience in range(100, -1, -1):
        try:
            db.enable_wal()
            return
        except database_errors() as error:
            if error_code(error) & 0xFF != sqlite3.SQLITE_BUSY or not patience:
                raise
            time.sleep(0.02)
