"""Who has a session open: one lock file for each open session, in a folder beside the database.

The operating system holds the lock (flock, LockFileEx) and lets go of it when its process ends, however that ends: a
file that is left over locks nothing. Two workers of one process exclude each other like two processes.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from kvchat.errors import SessionBusy, StoreError

PATIENCE_S = 0.3
"""Longer than another process takes to look whether a session is open, or to let go of it."""


class SessionLock:
    """The right to write to one session, from construction to `release`.

    Args:
        store: the database.
        session_id, name: the session.

    Raises:
        SessionBusy: another process, or another worker of this one, has the session open.
        StoreError: the folder cannot be written.
    """

    def __init__(self, store: Path, session_id: int, name: str) -> None:
        self._file = _file(store, session_id)
        self._lock = FileLock(self._file, timeout=PATIENCE_S, mode=0o600, thread_local=False)
        try:
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            self._lock.acquire(poll_interval=0.02)
        except Timeout:
            raise SessionBusy(_refusal(name, self._file)) from None
        except OSError as error:
            raise StoreError(
                f"session {name!r} cannot be locked ({error.strerror}); allow writing to {self._file.parent}, or "
                "choose another store with --store"
            ) from None
        about = {"pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
        with suppress(OSError):  # Windows lets nobody write to a locked file; it only helps to explain
            self._file.write_text(json.dumps(about), "utf-8")

    def release(self) -> None:
        """Let go; calling it again does nothing."""
        if self._lock.is_locked:
            # Removed while it is held: who opened the file meanwhile sees that it has no name any more, and retries.
            with suppress(OSError):  # on Windows the file stays
                self._file.unlink()
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def held_elsewhere(store: Path, session_ids: Iterable[int]) -> set[int]:
    """The sessions that are open in another process or worker; the caller leaves out its own."""
    return {session_id for session_id in session_ids if _is_held(_file(store, session_id))}


@contextmanager
def kept_closed(store: Path, session_ids: Iterable[int]) -> Iterator[bool]:
    """Lock sessions, so that nobody opens one meanwhile; False, and none is locked, if one is open anywhere."""
    with ExitStack() as locks:
        try:
            for session_id in sorted(session_ids):
                locks.enter_context(SessionLock(store, session_id, str(session_id)))
            closed = True
        except StoreError:  # what cannot be locked is taken for open
            locks.close()
            closed = False
        yield closed


def _is_held(file: Path) -> bool:
    if not file.exists():
        return False
    lock = FileLock(file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except OSError:  # a Timeout is one too; what cannot be tried is taken for open
        return True
    file.unlink(missing_ok=True)  # left over by a process that was killed
    lock.release()
    return False


def _file(store: Path, session_id: int) -> Path:
    database = store.resolve()
    return database.with_name(f"{database.name}-locks") / f"{session_id}.lock"


def _refusal(name: str, file: Path) -> str:
    holder = "another kvchat"
    with suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(file.read_text("utf-8"))
        kind = "this process" if about["pid"] == os.getpid() else "another kvchat"
        holder = f"{kind} (process {about['pid']}, since {about['since']})"
    quoted = shlex.quote(name)
    return (
        f"session {name!r} is open in {holder}; close it there, read it with `kvchat show {quoted}`, or go on in a "
        f"copy that `kvchat fork {quoted} NEW` makes"
    )
