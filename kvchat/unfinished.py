"""The answer in the making, written down while it is generated: a crash costs less than half a second of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from kvchat.errors import StoreError
from kvchat.store.store import Message, Store

if TYPE_CHECKING:
    from kvchat.session import Conversation

AFTER_S = 0.4
"""Seconds after which it is written down again."""
PATIENCE_MS = 50
"""While another process writes: the next token waits for it, and it is tried again soon."""


class Unfinished:
    """What the store has of the answer that a session is giving.

    Args:
        store: used from this thread alone.
        session_id: the session.
        clock: seconds.
    """

    def __init__(self, store: Store, session_id: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._session_id = session_id
        self._clock = clock
        self.kept = False
        """Whether the store has some of an answer that is no message yet."""
        self._kept_at = clock()

    def begin(self) -> None:
        """An answer begins."""
        self._kept_at = self._clock()

    def grow(self, parent: str, said: Sequence[int], more: Sequence[int]) -> None:
        """The answer to the message `parent` is `said` and `more` so far: keep it, if the last time is long enough ago.

        A store that cannot be written costs only that.
        """
        if self._clock() - self._kept_at >= AFTER_S:
            with suppress(StoreError), self._store.waiting(PATIENCE_MS):
                self.keep(parent, [*said, *more])
            self._kept_at = self._clock()

    def keep(self, parent: str, ids: Sequence[int]) -> None:
        """Write it down now. Raises StoreError."""
        self._store.set_unfinished(self._session_id, parent, ids)
        self.kept = True

    def forget(self) -> None:
        """The answer is a message now. If the store cannot be written, who opens the session again finds that out."""
        if self.kept:
            with suppress(StoreError):
                self._store.clear_unfinished(self._session_id)
                self.kept = False


def recover(conversation: Conversation, beside: bool = False) -> None:
    """Make a message of an answer that a crash cut off, as if it had been stopped.

    It is kept as a branch if the conversation has gone on from another message meanwhile, or is to go on `beside` it.
    """
    store, session_id = conversation.store, conversation.info.id
    found = store.unfinished(session_id)
    if found is None:
        return
    parent, ids = found
    tip = conversation.path[-1].id if conversation.path else None
    message = _message(conversation, parent, ids)
    if ids and tip == parent and not beside:
        store.add_messages(session_id, [message], tip)
        conversation.path = store.path(message.id)
    elif ids and not _is_said(store.tree(session_id), message):
        store.add_branch(session_id, [message])
    store.clear_unfinished(session_id)


def _message(conversation: Conversation, parent: str, ids: Sequence[int]) -> Message:
    template = conversation.engine.model.template
    opening, closing = template.generation_prompt, template.assistant_close
    span = (len(opening), len(opening) + len(ids))
    tokens = (*opening, *ids, *closing)
    return Message.new(parent, "assistant", template.text(ids), tokens, span, finish_reason="interrupted")


def _is_said(tree: Sequence[Message], cut: Message) -> bool:
    """Whether an answer to the same message begins with all of it."""
    low, high = cut.content_span
    beginning = cut.token_ids[low:high]
    answers = [one for one in tree if one.parent == cut.parent and one.role == "assistant"]
    return any(one.token_ids[slice(*one.content_span)][: high - low] == beginning for one in answers)
