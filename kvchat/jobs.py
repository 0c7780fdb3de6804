"""One thread that does jobs in order, and hands results and events back to whoever asked.

Whatever a job raises goes to its caller. What work in the background raises is kept by the conversation it belongs to,
and raised by the next call for it; the thread lives on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, TypeVar

from kvchat.errors import InputError
from kvchat.events import Event, Listener, Notice

Result = TypeVar("Result")
Job = Callable[[], None]
Chore = Callable[[Callable[[], bool]], None]


class Owner(Protocol):
    """Whom background work is done for."""

    failure: Exception | None


class Jobs:
    """The thread. `listener` is called in it with the progress of work that belongs to no turn.

    After so many seconds without a job each chore is done once, one after the other; it is given a function that says
    whether a job has come, and should end then.
    """

    def __init__(self, listener: Listener | None, chores: Sequence[tuple[float, Chore]] = ()) -> None:
        self._listener = listener
        self._chores = chores
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvchat", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], Result], owner: Owner | None = None) -> Result:
        """Do `work` after all that was asked before, and wait for its result."""
        future: Future[Result] = Future()

        def job() -> None:
            try:
                raise_failure(owner)
                future.set_result(work())
            except Exception as error:  # a process edge: the caller gets it
                future.set_exception(error)

        self.put(job)
        return future.result()

    def stream(
        self, work: Callable[[], Iterator[Event]], after: Callable[[], Iterator[Event]], owner: Owner
    ) -> Iterator[Event]:
        """Do a turn; its events are given out as they come. `after` is done when the last has been handed over."""
        events: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()

        def job() -> None:
            try:
                raise_failure(owner)
                for event in work():
                    events.put(event)
                events.put(None)
            except Exception as error:  # a process edge: the caller gets it
                events.put(error)
            self.in_background(after, owner)

        self.put(job)
        return _drain(events)

    def in_background(self, steps: Callable[[], Iterator[Event]], owner: Owner) -> None:
        """Do the steps here and now, in the thread, with nobody waiting."""
        try:
            for event in steps():
                self.tell(event)
        except Exception as error:  # a process edge: raised by the owner's next call
            owner.failure = owner.failure or error

    def tell(self, event: Event) -> None:
        """Tell the listener."""
        if self._listener is not None:
            self._listener(event)  # type: ignore[arg-type]

    def put(self, job: Job) -> None:
        """Have a job done. Raises InputError: the thread is closing."""
        with self._lock:
            if self._closing:
                raise InputError("this session is closed; open it again")
            self._jobs.put(job)

    def close(self) -> None:
        """Do what was asked for, then end the thread."""
        with self._lock:
            first, self._closing = not self._closing, True
            if first:
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while job := self._next():
            job()
            del job  # or a closed conversation's memory would be held until the next one

    def _next(self) -> Job | None:
        """The next job; until it comes, the chores are done."""
        for quiet_s, chore in self._chores:
            with suppress(queue.Empty):
                return self._jobs.get(timeout=quiet_s)
            chore(lambda: not self._jobs.empty())
        return self._jobs.get()


def raise_failure(owner: Owner | None) -> None:
    """Raise what failed in the background since the last call, once."""
    if owner is not None and owner.failure is not None:
        failure, owner.failure = owner.failure, None
        raise failure


def failure_notice(owner: Owner) -> Notice | None:
    """What failed in the background, for a listener, when no call can raise it any more."""
    failure, owner.failure = owner.failure, None
    return None if failure is None else Notice(f"saving failed: {type(failure).__name__}: {failure}")


def _drain(events: queue.SimpleQueue[Event | Exception | None]) -> Iterator[Event]:
    while (event := events.get()) is not None:
        if isinstance(event, Exception):
            raise event
        yield event
