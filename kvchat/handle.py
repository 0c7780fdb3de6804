"""The handle on a conversation that lives in a worker's thread.

Safe from any thread. Every method is a message to the worker, so calls of several threads are served one after the
other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvchat.attaching import Attached, attach, build, document_of, is_built
from kvchat.branching import Node, fork, question_at, switch, tree
from kvchat.calling import Calls
from kvchat.documents import Document
from kvchat.engine import Stop
from kvchat.errors import CapacityError, InputError
from kvchat.events import Event, Reply, TurnDone, Usage
from kvchat.inspecting import Inspection, inspect
from kvchat.jobs import raise_failure
from kvchat.probe import Finding, check
from kvchat.session import Conversation
from kvchat.stats import episodes_of
from kvchat.store.store import Message

if TYPE_CHECKING:
    from kvchat.worker import Worker


class Session(Calls):
    """A conversation. Use it as a context manager, or call `close`."""

    def __init__(self, worker: Worker, conversation: Conversation) -> None:
        super().__init__(worker, conversation)
        self.on_close: Callable[[], None] = lambda: None
        """Called at the end of `close`."""

    @property
    def model(self) -> str:
        """The model's name."""
        return self._conversation.engine.model.name

    @property
    def context_window(self) -> int:
        """Tokens that the model can take in."""
        return self._conversation.engine.model.context_window

    @property
    def title(self) -> str:
        """As of `SessionInfo`, when it was opened or given one since; the model may do so in idle time."""
        return self._conversation.info.title

    # -- turns -------------------------------------------------------------------------------------------------------

    def send(self, text: str, **sampling: Any) -> Iterator[Event]:
        """One turn: `Progress`, `Notice` and `Delta` as they come, then `TurnDone`.

        Args:
            text: the user's message.
            **sampling: max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, for this turn.

        Raises:
            InputError: the message is blank. CapacityError: it does not fit. ConfigError: a wrong sampling value.
        """
        settings, submitted = self._sampling(sampling), time.perf_counter()
        growth = len(text) + settings.max_new_tokens
        return self._turn(lambda stop: self._conversation.send(text, settings, stop, submitted), growth)

    def ask(self, text: str, **sampling: Any) -> Reply:
        """One turn, whole; arguments and errors as for `send`."""
        return _last(self.send(text, **sampling))

    def resend(self, **sampling: Any) -> Iterator[Event]:
        """Answer the newest message of the user once more; the former answer stays in the store as a branch."""
        settings, submitted = self._sampling(sampling), time.perf_counter()

        def again(stop: Stop) -> Iterator[Event]:
            conversation = self._conversation
            conversation.rewind(conversation.user_index(1) + 1)
            return conversation.answer(settings, stop, submitted)

        return self._turn(again, settings.max_new_tokens)

    def regenerate(self, **sampling: Any) -> Reply:
        """`resend`, whole."""
        return _last(self.resend(**sampling))

    def go_on(self, **sampling: Any) -> Iterator[Event]:
        """Go on with the last answer, which was cut off: the deltas are the new text, `TurnDone.text` is all of it.

        The shorter answer stays in the store as a branch. Arguments as for `send`; max_new_tokens counts new ones. If
        it was cut inside a character, its text ends with U+FFFD, and the deltas begin with that character.

        Raises:
            InputError: there is no answer, or the model had ended it itself. CapacityError: the window is full.
        """
        settings, submitted = self._sampling(sampling), time.perf_counter()
        return self._turn(lambda stop: self._conversation.go_on(settings, stop, submitted), settings.max_new_tokens)

    def edit(self, turn: int, text: str, **sampling: Any) -> Iterator[Event]:
        """Say the user's message of a turn, from 1, anew, and have it answered; what was said stays as a branch.

        Arguments and errors as for `send`; InputError too if there is no such turn.
        """
        settings, submitted = self._sampling(sampling), time.perf_counter()

        def anew(stop: Stop) -> Iterator[Event]:
            conversation = self._conversation
            conversation.take([{"role": "user", "content": text}], question_at(conversation.path, turn))
            return conversation.answer(settings, stop, submitted)

        return self._turn(anew, len(text) + settings.max_new_tokens)

    # -- the conversation --------------------------------------------------------------------------------------------

    def append(self, messages: Sequence[Mapping[str, str]]) -> Usage:
        """Take in {"role", "content"} messages and generate nothing; progress goes to the listener."""
        stop = threading.Event()
        self._stops.add(stop)
        try:
            usage = self._taken(self._conversation.append(messages, stop.is_set))
        finally:
            self._stops.discard(stop)
        self._background(self._worker.balance.finish)
        return usage

    def attach(self, title: str, text: str) -> Attached:
        """Take in a document, whose KV several sessions share; progress goes to the listener.

        It is computed once, in a session of its own, and cut into as many messages as it needs.

        Raises:
            InputError: it is empty, or this is its own session. CapacityError: it does not fit.
            SessionBusy: another process is computing it.
        """
        stop, conversation = threading.Event(), self._conversation
        document = self._call(lambda: document_of(title, text, conversation), None)
        if document.session == self.name:
            raise InputError(f"{title} stands in this session already")
        self._stops.add(stop)
        try:
            computed = self._built(document, stop.is_set)
            attached = self._taken(attach(conversation, document, stop.is_set))
        finally:
            self._stops.discard(stop)
        self._background(self._worker.balance.finish)
        return replace(attached, computed=attached.computed + computed)

    def _built(self, document: Document, stop: Stop) -> int:
        """See to it that a document's own session has all of it; how many tokens were computed for that."""
        conversation = self._conversation
        store, prints = conversation.store, conversation.residence.fingerprint
        if self._call(lambda: is_built(store, document, prints), None):
            return 0
        with self._worker.open(document.session, model=self.model) as own:
            try:
                return own._taken(build(own._conversation, document, stop))
            except CapacityError:
                empty = all(message.role == "system" for message in own.messages())
                own.close()
                if empty:
                    self._worker.delete(document.session)
                raise

    def logprobs(self, prompt: str, continuation: str) -> list[tuple[str, float]]:
        """Natural log-probability of each token of `continuation` as the answer to `prompt`; nothing changes."""
        return self._call(lambda: self._conversation.logprobs(prompt, continuation), len(prompt + continuation))

    def prefetch(self) -> None:
        """Bring back what the session gave way with, while the user still types; waits for nothing."""
        self._check_open()
        self._background(self._worker.balance.ready)

    def fork(self, name: str, at: int | None = None) -> Session:
        """A new session, open, that shares everything up to the end of turn `at` (None = all)."""
        self._call(lambda: fork(self._conversation, name, at), None)
        return self._worker.open(name)

    def rewind(self, turns: int = 1) -> str:
        """Take the newest turns back; returns the first user message taken back. The branch left stays in the store."""

        def back() -> str:
            conversation = self._conversation
            index = conversation.user_index(turns)
            text = conversation.path[index].content
            conversation.rewind(index)
            return text

        return self._call(back)

    def tree(self) -> list[Node]:
        """The messages of all branches, parents before children."""
        return self._aside(lambda: tree(self._conversation))

    def switch(self, message_id: str) -> None:
        """Go on at the newest end of the branches on which that message lies. InputError: there is no such message."""
        self._call(lambda: switch(self._conversation, message_id))
        self._background(self._worker.balance.ready)

    def messages(self) -> list[Message]:
        """The conversation so far, the system prompt first."""
        return self._call(lambda: list(self._conversation.path), None)

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Give this session settings of its own, as {"compress.keep_ratio": 0.2}; None takes one away. ConfigError."""
        self._call(lambda: self._conversation.configure(settings, self._worker.config))

    def settle(self) -> float:
        """Wait until every finished turn is sealed or saved; seconds that the last answer's took."""
        return self._call(self._conversation.save, None)

    def stats(self) -> dict[str, Any]:
        """Tokens, pairs, bytes of the whole, each segment, each turn, and why sessions gave way. Waits for a seal."""
        return self._call(lambda: self._conversation.stats() | self._worker.balance.stats())

    def inspect(self, turn: int) -> Inspection:
        """What became of each token of a turn, from 1, by rank and by head. InputError: there is no such turn."""
        return self._call(lambda: inspect(self._conversation, turn))

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return self._aside(lambda: self._conversation.count(text))

    @property
    def draft(self) -> str:
        """What was typed and not sent."""
        return self._aside(lambda: self._conversation.store.draft(self._conversation.info.id))

    def set_draft(self, text: str) -> None:
        """Keep what is being typed, while a turn is running too; "" when it was sent."""
        self._aside(lambda: self._conversation.store.set_draft(self._conversation.info.id, text))

    def episodes(self) -> list[dict[str, Any]]:
        """What the turns are about, as far as vectors of them are saved; `kvchat episodes` makes those that are not."""
        return self._call(lambda: episodes_of(self._conversation), None)

    def check(self) -> Finding:
        """Whether the session answers a probe as recorded, and each message's tokens say its text; `verify --deep`."""
        return self._call(lambda: check(self._conversation))

    def close(self) -> None:
        """Save what is under way and let the memory go."""
        if not self._closed:
            self._closed = True
            self.stop()
            conversation = self._conversation
            try:
                self._worker.jobs.call(lambda: self._worker.release(conversation))
                raise_failure(conversation)
            finally:
                self.on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _last(events: Iterator[Event]) -> Reply:
    """The turn's end; what comes before is not looked at."""
    for event in events:
        last = event
    assert isinstance(last, TurnDone)
    return last
