"""A worker that says what it is doing: the real one, looked at from where the chat screen calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from kvchat.events import Delta, Event, TurnDone
from kvchat.handle import Session
from kvchat.worker import Worker

Tell = Callable[[str], None]
"""Told of each phase: load, restore, prefill, generate, seal, idle. Called in any thread."""


class WatchedWorker:
    """Hands everything on to a worker."""

    def __init__(self, worker: Worker, tell: Tell) -> None:
        self._worker, self._tell = worker, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def open(self, *what: Any, **how: Any) -> Any:
        """As of Worker."""
        self._tell("load")
        session = self._worker.open(*what, **how)
        self._tell("restore")
        return WatchedSession(session, self._tell)


class WatchedSession:
    """Hands everything on to a session."""

    def __init__(self, session: Session, tell: Tell) -> None:
        self._session, self._tell = session, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def send(self, text: str) -> Iterator[Event]:
        """As of Session."""
        self._tell("prefill")
        is_first = True
        for event in self._session.send(text):
            if is_first and isinstance(event, Delta):
                self._tell("generate")
                is_first = False
            elif isinstance(event, TurnDone):
                self._tell("seal")
            yield event

    def stats(self) -> dict[str, Any]:
        """As of Session, which waits for restoring and sealing."""
        stats = self._session.stats()
        self._tell("idle")
        return stats
