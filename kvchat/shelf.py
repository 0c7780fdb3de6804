"""The part of the worker that lists sessions, finds in them, and changes what is noted about them.

None of it needs the model, and what only reads waits for no turn. A session that is open has what changed from then on.
"""

from __future__ import annotations

from collections.abc import Collection

from kvchat.errors import InputError
from kvchat.jobs import Jobs
from kvchat.locks import SessionLock
from kvchat.residence.host import HostedStore
from kvchat.session import Conversation
from kvchat.store.store import Message, SearchHit, SessionInfo


class Shelf:
    """Use it as part of `kvchat.worker.Worker`."""

    jobs: Jobs
    _store: HostedStore
    _open: dict[int, tuple[Conversation, int]]

    def sessions(self) -> list[SessionInfo]:
        """All sessions, the last used first."""
        return self.jobs.call(lambda: self._store.sessions(), aside=True)

    def search(self, text: str) -> list[SearchHit]:
        """Messages with all the words."""
        return self.jobs.call(lambda: self._store.search(text), aside=True)

    def preview(self, name: str) -> list[Message]:
        """The messages of a session's path, which need not be open. Raises SessionNotFound."""
        return self.jobs.call(lambda: self._store.path(self._store.session(name).tip), aside=True)

    def said(self, message_id: str) -> str:
        """The whole text of a message on any branch; empty if there is none of that id."""
        return self.jobs.call(lambda: "".join(one.content for one in self._store.path(message_id)[-1:]), aside=True)

    def rename(self, name: str, new: str) -> None:
        """Give a session another name."""
        self.jobs.call(lambda: self._rename(name, new))

    def retitle(self, name: str, title: str) -> None:
        """Give a session a title of the user's; "" takes it away.

        Raises:
            SessionNotFound
            InputError: it is no title.
        """
        self.jobs.call(lambda: self._retitle(name, title))

    def tag(self, name: str, tags: Collection[str]) -> None:
        """Give a session these tags and no others.

        Raises:
            SessionNotFound
            InputError: one is no tag.
        """
        self.jobs.call(lambda: self._tag(name, tags))

    def delete(self, name: str) -> None:
        """Delete a session for good; InputError while it is open, SessionBusy while another process has it open."""
        self.jobs.call(lambda: self._delete(name))

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _rename(self, name: str, new: str) -> None:
        self._store.rename(name, new)
        self._look_up(new)

    def _retitle(self, name: str, title: str) -> None:
        self._store.set_title(self._store.session(name).id, title, "user")
        self._look_up(name)

    def _tag(self, name: str, tags: Collection[str]) -> None:
        self._store.set_tags(self._store.session(name).id, tags)
        self._look_up(name)

    def _look_up(self, name: str) -> None:
        """Have a conversation that is open say what the store says of it now."""
        info = self._store.session(name)
        if info.id in self._open:
            self._open[info.id][0].info = info

    def _delete(self, name: str) -> None:
        session_id = self._store.session(name).id
        if session_id in self._open:
            raise InputError(f"session {name!r} is open; close it before deleting it")
        with SessionLock(self._store.file, session_id, name):
            self._store.delete(name, session_id)
