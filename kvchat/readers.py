"""Connections that only read values, for threads beside the one that a store belongs to."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from queue import Empty, SimpleQueue

from kvchat.cipher import read_blob
from kvchat.migrations import explained, open_reader


class Readers:
    """As many connections to a file that is not encrypted as there are threads that read at once.

    To an encrypted file each would take as long to open as the store itself.
    """

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._free: SimpleQueue[sqlite3.Connection] = SimpleQueue()

    def blob(self, table: str, column: str, rowid: int) -> bytes | None:
        """One value; None if it is gone. Raises StoreDamaged and StoreError."""
        with explained(self._path):
            try:
                connection = self._free.get_nowait()
            except Empty:
                connection = open_reader(self._path, self._busy_timeout_s)
            try:
                return read_blob(connection, table, column, rowid)
            finally:
                self._free.put(connection)

    def close(self) -> None:
        """End all connections that nobody reads from."""
        while not self._free.empty():
            self._free.get().close()
