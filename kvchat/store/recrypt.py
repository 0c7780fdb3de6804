"""Encrypts a store in place, takes its encryption away, or writes an encrypted one anew without its damaged pages.

A whole copy is checked, and then takes the file's place. A crash leaves the one file or the other, whole, and perhaps a
copy that the next opening removes. It takes room for the file's size once more, for damaged pages twice.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from kvchat.cipher import COMPATIBILITY, Key, connect, database_errors, error_code
from kvchat.errors import StoreDamaged, StoreError
from kvchat.store.migrations import PAGE_SIZE, explained, open_database
from kvchat.store.salvage import copy_beside, fill, remove_leftovers

PATIENCE_S = 1.0
"""How long to wait for other processes: a chat stays open for longer."""

Contents = dict[tuple[str, ...], int]
"""Each entry of the schema to the rows of its table, 0 for what is no table."""


def recrypt(path: Path, key: Key | None, new: Key | None) -> str | None:
    """Write the store at `path`, which `key` opens, anew for `new`; None = not encrypted. Made, if there is none.

    Returns:
        None, or why what had to come after it is not all done: to have the new name on the disk, and to overwrite the
        old file and its log if they were not encrypted.

    Raises:
        StoreError: it is open elsewhere, damaged, or there is no room; nothing was changed.
        OSError: it cannot be written; nothing was changed.
    """
    path = path.resolve()
    if not path.exists() or not path.stat().st_size:
        open_database(path, PATIENCE_S, new).close()
        return None
    with ExitStack() as stack:
        log = path.with_name(f"{path.name}-wal")
        plain = [stack.enter_context(log.open("r+b"))] if key is None and log.is_file() else []
        open_database(path, PATIENCE_S, key).close()  # kvchat's own, and in the newest schema
        with _replacing(path, key, plain) as swap:
            _copied(swap.db, swap.copy, new)
    return swap.undone


def salvage_encrypted(path: Path, key: Key, require_whole: Callable[[Path], None]) -> None:
    """What `salvage` does, for a store that nobody has open: SQLCipher writes no page over one that it cannot read.

    Raises:
        StoreDamaged: text cannot be read, or not all of it; nothing was changed.
        StoreError: another process has the store open; nothing was changed.
    """
    path = path.resolve()
    with _replacing(path, key) as swap:
        damaged = swap.copy.with_name(f"{swap.copy.name}-damaged")
        damaged.touch(mode=0o600, exist_ok=False)
        with damaged.open("wb") as stream:
            shutil.copyfileobj(swap.old, stream)
        with closing(_Reader(damaged, key)) as reader, closing(open_database(swap.copy, PATIENCE_S, key)) as made:
            # With a log all rows would lie there, and come into the file only at the end, if there is room left then.
            made.execute("PRAGMA journal_mode = OFF").fetchall()
            fill(made, reader)
        damaged.unlink()
        require_whole(swap.copy)


class _Reader:
    """Reads a file with damaged pages: after the first of them SQLCipher reads nothing more on a connection."""

    def __init__(self, path: Path, key: Key) -> None:
        self._connect = partial(connect, path, PATIENCE_S, key, PAGE_SIZE)
        self._db, self._usable = self._connect(), True

    def execute(self, sql: str, values: Any = (), /) -> Iterator[Any]:
        """The rows; an error may come with any of them."""
        if not self._usable:
            self._db.close()
            self._db = self._connect()
        self._usable = False
        yield from self._db.execute(sql, values)
        self._usable = True

    def close(self) -> None:
        self._db.close()


@dataclass
class _Swap:
    """The database with nobody else in it, its empty copy, which takes its place in the end, and its file."""

    db: Any
    copy: Path
    old: BinaryIO
    undone: str | None = None
    """Why what had to come after it is not all done."""


@contextmanager
def _replacing(path: Path, key: Key | None, logs: Sequence[BinaryIO] = ()) -> Iterator[_Swap]:
    # The old file is opened first and closed last: closing it gives up SQLite's locks on it.
    with explained(path), path.open("r+b") as old, _alone(path, key) as db:
        remove_leftovers(path)
        swap = _Swap(db, copy_beside(path), old)
        with ExitStack() as undo:
            undo.callback(remove_leftovers, path)
            _make_like(swap.copy, path, os.fstat(old.fileno()))
            yield swap
            _require_folded(swap.copy, path)
            _sync(swap.copy)
            os.replace(swap.copy, path)
            undo.pop_all()
        swap.undone = _settle(path, [old, *logs] if key is None else [])


def _make_like(copy: Path, path: Path, status: os.stat_result) -> None:
    """An empty file with the owner and the mode of the store's. Raises FileExistsError: somebody else's is there."""
    copy.touch(mode=0o600, exist_ok=False)
    if sys.platform != "win32":
        try:
            os.chown(copy, status.st_uid, status.st_gid)
        except PermissionError:
            raise StoreError(f"{path} belongs to another user or group: nothing was changed") from None
        copy.chmod(stat.S_IMODE(status.st_mode))


def _require_folded(copy: Path, path: Path) -> None:
    """SQLite does not say so if it cannot write a log into its file when that is closed."""
    log = copy.with_name(f"{copy.name}-wal")
    if log.exists() and log.stat().st_size:
        raise StoreError(f"the copy of {path} could not be written; is the disk full? Nothing was changed")


def _settle(path: Path, plain: Sequence[BinaryIO]) -> str | None:
    """Have the new name on the disk, and overwrite what was not encrypted; why not all of that is done."""
    try:
        _sync(path.parent)  # before: after a power cut the old name may be back
        for file in plain:
            if os.fstat(file.fileno()).st_nlink:
                return "they have another name"
            _wipe(file)
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextmanager
def _alone(path: Path, key: Key | None) -> Iterator[Any]:
    """A connection that keeps all others out, and has no log: one would be named like that of the new file."""
    with closing(connect(path, PATIENCE_S, key, PAGE_SIZE)) as db:
        try:
            db.execute("PRAGMA journal_mode = DELETE").fetchall()
            db.execute("PRAGMA main.locking_mode = EXCLUSIVE").fetchall()
            db.execute("BEGIN EXCLUSIVE")
            db.execute("COMMIT")  # the lock stays
        except database_errors() as error:
            if error_code(error) & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            raise _open_elsewhere(path) from error
        if db.execute("PRAGMA main.journal_mode").fetchone()[0] != "delete":  # somebody was quicker
            raise _open_elsewhere(path)
        yield db


def _open_elsewhere(path: Path) -> StoreError:
    return StoreError(f"{path} is open in another kvchat; close that first: nothing was changed")


def _copied(db: Any, copy: Path, key: Key | None) -> None:
    """Fill the copy, and check that it holds the same."""
    db.execute("ATTACH ? AS copy KEY ?", [str(copy), key.secret if key else ""])
    # A copy that a crash leaves half written is never read, so it needs no journal.
    settings = ("page_size", PAGE_SIZE), ("auto_vacuum", "INCREMENTAL"), ("journal_mode", "OFF"), ("synchronous", "OFF")
    for name, value in (("cipher_compatibility", COMPATIBILITY), ("cipher_page_size", PAGE_SIZE), *settings):
        db.execute(f"PRAGMA copy.{name} = {value}").fetchall()
    db.execute("BEGIN")
    db.execute("SELECT sqlcipher_export('copy')").fetchall()
    db.execute("COMMIT")
    db.execute("DETACH copy")
    with closing(open_database(copy, PATIENCE_S, key)) as made:
        sound = made.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        if not sound or _contents(made.conn) != _contents(db):
            raise StoreDamaged("the copy does not hold what the store holds; `kvchat verify`: nothing was changed")


def _contents(db: Any) -> Contents:
    found: Contents = {}
    for kind, name, sql in db.execute("SELECT type, name, coalesce(sql, '') FROM main.sqlite_schema").fetchall():
        rows = db.execute(f'SELECT count(*) FROM main."{name}"').fetchone()[0] if kind == "table" else 0
        found[kind, name, sql] = rows
    return found


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _wipe(old: BinaryIO) -> None:
    """Overwrite a file that has no name any more: its text, and what a process that waits to open it would write to."""
    size = old.seek(0, os.SEEK_END)
    old.seek(0)
    for start in range(0, size, len(ZEROS)):
        old.write(ZEROS[: size - start])
    old.flush()
    os.fsync(old.fileno())


ZEROS = bytes(1 << 20)
