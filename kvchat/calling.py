"""How what a handle asks for reaches the thread in which its conversation lives.

Every call is a message to the worker, so calls of several threads are served one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from kvchat.engine import Stop
from kvchat.errors import InputError
from kvchat.events import Event, Notice, Progress, followed
from kvchat.sections import GenerateConfig
from kvchat.session import Conversation

if TYPE_CHECKING:
    from kvchat.worker import Worker

Result = TypeVar("Result")


class Calls:
    """The part of a `Session` that knows the worker."""

    def __init__(self, worker: Worker, conversation: Conversation) -> None:
        self._worker = worker
        self._conversation = conversation
        self._stops: set[threading.Event] = set()
        self._closed = False

    @property
    def name(self) -> str:
        """The session's name."""
        return self._conversation.info.name

    def stop(self) -> None:
        """End the running turn, from any thread; what was generated stays."""
        for event in list(self._stops):
            event.set()

    def _call(self, work: Callable[[], Result], growth: int | None = 0) -> Result:
        """Do it when there is room for so many more tokens; None: it reads no KV."""
        self._check_open()
        conversation, balance = self._conversation, self._worker.balance
        return self._worker.jobs.call(lambda: balance.attended(conversation, growth, work), conversation)

    def _aside(self, work: Callable[[], Result]) -> Result:
        """Do it soon, while a turn is running too; it reads no KV and changes no path."""
        self._check_open()
        return self._worker.jobs.call(work, aside=True)

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
