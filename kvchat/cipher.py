"""SQLCipher: SQLite whose file, log and index are encrypted. Its package is loaded when an encrypted store is opened.

Every page is AES-256-CBC with an HMAC-SHA512 of its own (https://www.zetetic.net/sqlcipher/design/). The first 16 bytes
of a file are its salt, in plain.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kvchat.errors import StoreError

PLAIN = b"SQLite format 3\0"
"""What a file begins with that is not encrypted."""
SMALLEST = 512
"""Bytes of the smallest database; SQLite takes a shorter file for an empty one."""
COMPATIBILITY = 4
"""The format of the pages. A later SQLCipher may have another default, and would not open what an earlier one wrote."""


@dataclass(frozen=True)
class Key:
    """What opens an encrypted store. Printed, it shows where it came from and never itself."""

    secret: str = field(repr=False)
    """What `PRAGMA key` takes: x'...' around the hex digits of 32 bytes of key and 16 of salt."""
    source: str
    """As in "the passphrase in KVCHAT_PASSPHRASE"."""

    @property
    def salt(self) -> str:
        """In hex."""
        return self.secret[-33:-1]


def salt(path: Path) -> bytes | None:
    """The 16 bytes that an encrypted file begins with; None if it is not encrypted, too short, or not there.

    A file of which these bytes are damaged looks encrypted.
    """
    if not path.is_file() or (status := path.stat()).st_size < SMALLEST:
        return None
    if sys.platform == "win32":  # where locks belong to their descriptor, and an open file cannot be replaced
        with path.open("rb") as stream:
            first = stream.read(len(PLAIN))
    else:
        first = os.pread(_descriptor(path, status.st_dev, status.st_ino), len(PLAIN), 0)
    return None if first == PLAIN else first


@cache
def _descriptor(path: Path, device: int, inode: int) -> int:
    """One to read from, never closed; `device` and `inode` tell one file from the next."""
    # Closing any descriptor of a file drops the locks that SQLite has on it in this process, and another process would
    # take the store for closed (https://www.sqlite.org/howtocorrupt.html, 2.2). So this one stays, one for each store.
    return os.open(path, os.O_RDONLY)


def sqlcipher() -> Any:
    """The module that opens encrypted files. Raises StoreError: it is not installed."""
    try:
        from sqlcipher3 import dbapi2
    except ImportError:
        raise StoreError("an encrypted store needs SQLCipher: install it with `pip install 'kvchat[crypt]'`") from None
    return dbapi2


def connect(path: Path, timeout_s: float, key: Key | None, page_size: int) -> Any:
    """A connection by SQLCipher to a file that `key` opens, or encrypts if it is empty; None = not encrypted.

    Raises:
        StoreError: the key is wrong, or the file damaged.
        sqlcipher3.dbapi2.Error: the file is busy, or cannot be read; `database_errors` catches it.
    """
    with ExitStack() as undo:
        connection = sqlcipher().connect(path.absolute(), timeout=timeout_s)
        undo.callback(connection.close)
        connection.execute("PRAGMA cipher_log_level = NONE")  # it writes to stderr
        if key is not None:
            # A pragma takes no parameters.
            connection.execute("PRAGMA key = '{}'".format(key.secret.replace("'", "''")))
            connection.execute(f"PRAGMA cipher_compatibility = {COMPATIBILITY}")  # before what it would reset
            connection.execute(f"PRAGMA cipher_page_size = {page_size}")
        try:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        except database_errors() as error:
            if key is None or error_code(error) & 0xFF != sqlite3.SQLITE_NOTADB:
                raise
            found = salt(path)
            if found is not None and found.hex() != key.salt:  # a key is made for the salt that the file has
                why = "is damaged, or was made or encrypted by another kvchat meanwhile; try again"
                raise StoreError(f"{path} {why}") from None
            raise StoreError(f"{path} is damaged, or encrypted with another key than {key.source}") from None
        undo.pop_all()
    return connection


def database_errors() -> tuple[type[Exception], ...]:
    """What to catch: the errors of sqlite3, and those of SQLCipher if it is loaded, which are none of the former."""
    loaded = sys.modules.get("sqlcipher3.dbapi2")
    return (sqlite3.Error, loaded.Error) if loaded else (sqlite3.Error,)


def error_code(error: Exception) -> int:
    """SQLite's extended result code of an error; SQLITE_OK for a misuse of the module, a mistake of this program."""
    code = int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK))
    # SQLCipher's module gives only the primary code, the last eight bits.
    foreign = code == sqlite3.SQLITE_CONSTRAINT and str(error).startswith("FOREIGN KEY")
    return sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY if foreign else code


def row_class(connection: Any) -> Any:
    """The rows with names of the module that a connection is of."""
    return sqlite3.Row if isinstance(connection, sqlite3.Connection) else sqlcipher().Row


def read_blob(connection: Any, table: str, column: str, where: str, values: tuple[object, ...]) -> bytes | None:
    """The value in the one row that `where` finds; None if there is none.

    Incremental reading takes a third to a half of a query's time. It goes by row numbers, which are given out again: so
    both see one state of the file. Raises the errors of the module that the connection is of.
    """
    plain = isinstance(connection, sqlite3.Connection)
    with ExitStack() as undo:
        if not connection.in_transaction:
            connection.execute("BEGIN")
            undo.callback(connection.rollback)
        row = connection.execute(f"SELECT rowid FROM {table} WHERE {where}", values).fetchone()
        if row is None:
            return None
        opening = connection.blobopen if plain else connection.open_blob
        blob = opening(table, column, row[0], readonly=True)
        undo.callback(blob.close)
        body: bytes = blob.read()
        return body
