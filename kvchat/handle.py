"""The handle on a conversation that lives in a worker's thread.

Safe from any thread. Every method is a message to the worker, so calls of several threads are served one after the
other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from kvchat.attaching import Attached, attach, build, document_of, is_built
from kvchat.documents import Document
from kvchat.engine import Stop
from kvchat.errors import CapacityError, InputError
from kvchat.events import Event, Notice, Progress, Reply, TurnDone, Usage, followed
from kvchat.jobs import raise_failure
from kvchat.probe import Finding, check
from kvchat.sections import GenerateConfig
from kvchat.session import Conversation
from kvchat.stats import episodes_of
from kvchat.store import Message

if TYPE_CHECKING:
    from kvchat.worker import Worker

Result = TypeVar("Result")


class Session:
    """A conversation. Use it as a context manager, or call `close`."""

    def __init__(self, worker: Worker, conversation: Conversation) -> None:
        self.on_close: Callable[[], None] = lambda: None
        """Called at the end of `close`."""
        self._worker = worker
        self._conversation = conversation
        self._stops: set[threading.Event] = set()
        self._closed = False

    @property
    def name(self) -> str:
        """The session's name."""
        return self._conversation.info.name

    @property
    def model(self) -> str:
        """The model's name."""
        return self._conversation.engine.model.name

    @property
    def context_window(self) -> int:
        """Tokens that the model can take in."""
        return self._conversation.engine.model.context_window

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

    def stop(self) -> None:
        """End the running turn, from any thread; what was generated stays."""
        for event in list(self._stops):
            event.set()

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
        self._call(lambda: self._conversation.fork(name, at), None)
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

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _call(self, work: Callable[[], Result], growth: int | None = 0) -> Result:
        """Do it when there is room for so many more tokens; None: it reads no KV."""
        self._check_open()
        conversation, balance = self._conversation, self._worker.balance
        return self._worker.jobs.call(lambda: balance.attended(conversation, growth, work), conversation)

    def _taken(self, steps: Generator[Progress | Notice, None, Result]) -> Result:
        """Take steps that compute, and tell the listener of them; what they come to."""
        worker = self._worker
        steps = worker.balance.held(self._conversation, steps)
        return self._call(lambda: followed(steps, worker.jobs.tell))

    def _background(self, steps: Callable[[Conversation], Iterator[Event]]) -> None:
        """Have them done with nobody waiting."""
        conversation, jobs = self._conversation, self._worker.jobs
        jobs.put(lambda: jobs.in_background(partial(steps, conversation), conversation))

    def _turn(self, work: Callable[[Stop], Iterator[Event]], growth: int) -> Iterator[Event]:
        """Begin a turn now; it is stopped if nobody wants to see its end."""
        self._check_open()
        stop, conversation, balance = threading.Event(), self._conversation, self._worker.balance
        self._stops.add(stop)
        turn = partial(balance.turn, conversation, growth, partial(work, stop.is_set))
        events = self._worker.jobs.stream(turn, partial(balance.finish, conversation), conversation)

        def followed() -> Iterator[Event]:
            try:
                yield from events
            finally:
                stop.set()
                self._stops.discard(stop)

        return followed()

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"session {self.name!r} is closed; open it again")

    def _sampling(self, given: Mapping[str, Any]) -> GenerateConfig:
        return self._conversation.residence.config.sampling(given)


def _last(events: Iterator[Event]) -> Reply:
    """The turn's end; what comes before is not looked at."""
    for event in events:
        last = event
    assert isinstance(last, TurnDone)
    return last
