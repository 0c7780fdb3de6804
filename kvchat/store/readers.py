"""Connections that only read values, for threads beside the one that a store belongs to."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from threading import Lock

from kvchat.cipher import read_blob
from kvchat.errors import StoreError
from kvchat.store.migrations import explained, open_reader


class Readers:
    """As many connections to a file that is not encrypted as there are threads that read at once.

    To an encrypted file each would take as long to open as the store itself.
    """

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path = path.absolute()
        self._busy_timeout_s = busy_timeout_s
        self._free: list[sqlite3.Connection] | None = []
        """Connections that nobody reads from; None when it is closed."""
        self._lock = Lock()

    def blob(self, table: str, column: str, where: str, values: tuple[object, ...]) -> bytes | None:
        """As `read_blob`. Raises StoreDamaged, and StoreError, also when it is closed."""
        with explained(self._path):
            connection = self._taken() or open_reader(self._path, self._busy_timeout_s)
            try:
                return read_blob(connection, table, column, where, values)
            finally:
                self._give_back(connection)

    def _taken(self) -> sqlite3.Connection | None:
        with self._lock:
            if self._free is None:
                raise StoreError(f"{self._path} is closed")
            return self._free.pop() if self._free else None

    def _give_back(self, connection: sqlite3.Connection) -> None:
        with self._lock:
            if self._free is not None:
                self._free.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """End all connections, those that are read from when that is done."""
        with self._lock:
            free, self._free = self._free or [], None
        for connection in free:
            connection.close()
