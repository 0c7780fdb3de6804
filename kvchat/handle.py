"""Handles on a conversation that lives in a worker's thread: `Session`, and `AsyncSession` for asyncio.

Safe from any thread. Every method is a message to the worker, so calls of several threads are served one after the
other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from kvchat.engine import Stop
from kvchat.errors import InputError
from kvchat.events import Event, Reply, TurnDone, Usage, followed
from kvchat.jobs import raise_failure
from kvchat.probe import Finding, check
from kvchat.sections import GenerateConfig
from kvchat.session import Conversation
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
        return self._turn(lambda stop: self._conversation.send(text, settings, stop, submitted))

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

        return self._turn(again)

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

        def take() -> Usage:
            steps = self._conversation.append(messages, stop.is_set)
            return followed(steps, self._worker.jobs.tell)

        self._stops.add(stop)
        try:
            usage = self._call(take)
        finally:
            self._stops.discard(stop)
        conversation = self._conversation
        self._worker.jobs.put(lambda: self._worker.jobs.in_background(conversation.finish, conversation))
        return usage

    def logprobs(self, prompt: str, continuation: str) -> list[tuple[str, float]]:
        """Natural log-probability of each token of `continuation` as the answer to `prompt`; nothing changes."""
        return self._call(lambda: self._conversation.logprobs(prompt, continuation))

    def fork(self, name: str, at: int | None = None) -> Session:
        """A new session, open, that shares everything up to the end of turn `at` (None = all)."""
        self._call(lambda: self._conversation.fork(name, at))
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
        return self._call(lambda: list(self._conversation.path))

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Give this session settings of its own, as {"compress.keep_ratio": 0.2}; None takes one away. ConfigError."""
        self._call(lambda: self._conversation.configure(settings, self._worker.config))

    def settle(self) -> float:
        """Wait until every finished turn is sealed or saved; seconds that the last answer's took."""
        return self._call(self._conversation.save)

    def stats(self) -> dict[str, Any]:
        """Tokens, pairs and bytes: of the whole, each segment, each turn. Waits for a running seal."""
        return self._call(self._conversation.stats)

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

    def _call(self, work: Callable[[], Result]) -> Result:
        self._check_open()
        return self._worker.jobs.call(work, self._conversation)

    def _turn(self, work: Callable[[Stop], Iterator[Event]]) -> Iterator[Event]:
        """Begin a turn now; it is stopped if nobody wants to see its end."""
        self._check_open()
        stop, conversation = threading.Event(), self._conversation
        self._stops.add(stop)
        events = self._worker.jobs.stream(lambda: work(stop.is_set), conversation.finish, conversation)

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


class AsyncSession:
    """`Session` for asyncio: the same methods, awaited; `send` and `resend` are asynchronous iterators."""

    def __init__(self, session: Session) -> None:
        self.session = session

    async def send(self, text: str, **sampling: Any) -> AsyncIterator[Event]:
        """As `Session.send`."""
        async for event in _follow(self.session.send(text, **sampling)):
            yield event

    async def resend(self, **sampling: Any) -> AsyncIterator[Event]:
        """As `Session.resend`."""
        async for event in _follow(self.session.resend(**sampling)):
            yield event

    async def ask(self, text: str, **sampling: Any) -> Reply:
        """As `Session.ask`."""
        return await asyncio.to_thread(self.session.ask, text, **sampling)

    async def regenerate(self, **sampling: Any) -> Reply:
        """As `Session.regenerate`."""
        return await asyncio.to_thread(self.session.regenerate, **sampling)

    def stop(self) -> None:
        """As `Session.stop`."""
        self.session.stop()

    async def append(self, messages: Sequence[Mapping[str, str]]) -> Usage:
        """As `Session.append`."""
        return await asyncio.to_thread(self.session.append, messages)

    async def logprobs(self, prompt: str, continuation: str) -> list[tuple[str, float]]:
        """As `Session.logprobs`."""
        return await asyncio.to_thread(self.session.logprobs, prompt, continuation)

    async def fork(self, name: str, at: int | None = None) -> AsyncSession:
        """As `Session.fork`."""
        return AsyncSession(await asyncio.to_thread(self.session.fork, name, at))

    async def rewind(self, turns: int = 1) -> str:
        """As `Session.rewind`."""
        return await asyncio.to_thread(self.session.rewind, turns)

    async def messages(self) -> list[Message]:
        """As `Session.messages`."""
        return await asyncio.to_thread(self.session.messages)

    async def configure(self, settings: Mapping[str, Any]) -> None:
        """As `Session.configure`."""
        await asyncio.to_thread(self.session.configure, settings)

    async def settle(self) -> float:
        """As `Session.settle`."""
        return await asyncio.to_thread(self.session.settle)

    async def stats(self) -> dict[str, Any]:
        """As `Session.stats`."""
        return await asyncio.to_thread(self.session.stats)

    async def check(self) -> Finding:
        """As `Session.check`."""
        return await asyncio.to_thread(self.session.check)

    async def close(self) -> None:
        """As `Session.close`."""
        await asyncio.to_thread(self.session.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()


async def _follow(events: Iterator[Event]) -> AsyncIterator[Event]:
    """The events of a turn, each waited for in a thread."""
    end = object()
    while (event := await asyncio.to_thread(next, events, end)) is not end:
        yield event  # type: ignore[misc]
