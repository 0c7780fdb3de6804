"""One thread that does jobs in order, and hands results and events back to whoever asked.

Whatever a job raises goes to its caller, a request to end the process too. What work in the background raises is kept
by the conversation it belongs to, and raised by the next call for it, but for a lack of memory, which is told: the next
call does what was not done. What is done in spare time only tells. The thread lives on; should it end all the same,
whatever waits for it fails.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

from kvchat.errors import InputError, OutOfMemory
from kvchat.events import Event, Listener, Notice
from kvchat.memory import named

Result = TypeVar("Result")
Chore = Callable[[Callable[[], bool]], None]
CLOSED = "this session is closed; open it again"

SAVE_AFTER_S = 0.05
"""Seconds without a job after which sealed KV is written; who sends turn after turn does not wait for it."""
MEND_AFTER_S = 0.2
"""Seconds without a job after which missing KV is computed again; a front end's first questions come sooner."""


class Job(NamedTuple):
    """What is done, and what is told that it never will be."""

    work: Callable[[], None]
    fail: Callable[[BaseException], None]


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
        self._asides: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvchat", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], Result], owner: Owner | None = None, aside: bool = False) -> Result:
        """Do `work` after all that was asked before, and wait for its result.

        `aside`: between two events of what is under way, if that is sooner. It must read no KV and change no path.
        """
        future: Future[Result] = Future()

        def job() -> None:
            if future.done():  # aside
                return
            try:
                raise_failure(owner)
                future.set_result(work())
            except BaseException as error:  # a process edge: the caller gets it
                future.set_exception(named(error))

        def fail(error: BaseException) -> None:
            if not future.done():
                future.set_exception(error)

        if aside:  # first: it goes with the job at the latest, and holds on to nothing
            self._asides.put(job)
        self.put(job, fail)
        return future.result()

    def stream(
        self, work: Callable[[], Iterator[Event]], after: Callable[[], Iterator[Event]], owner: Owner
    ) -> Iterator[Event]:
        """Do a turn; its events are given out as they come. `after` is done when the last has been handed over."""
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        def job() -> None:
            try:
                raise_failure(owner)
                for event in work():
                    events.put(event)
                    self._do_asides()
                events.put(None)
            except BaseException as error:  # a process edge: the caller gets it
                events.put(named(error))
            self.in_background(after, owner)

        self.put(job, events.put)
        return _drain(events)

    def in_background(self, steps: Callable[[], Iterator[Event]], owner: Owner) -> None:
        """Do the steps here and now, in the thread, with nobody waiting."""
        try:
            for event in steps():
                self.tell(event)
                self._do_asides()
        except Exception as error:  # a process edge: raised by the owner's next call
            if isinstance(failure := named(error), OutOfMemory):
                with suppress(Exception):  # it may be the listener that fails
                    self.tell(Notice(str(failure)))
            else:
                owner.failure = owner.failure or error

    def in_spare_time(self, steps: Callable[[], Iterator[Event]], what: str) -> None:
        """Do the steps here and now, in the thread; nobody needs them, so a failure is told and costs nothing else."""
        try:
            for event in steps():
                self.tell(event)
                self._do_asides()
        except Exception as error:  # a process edge: told
            self._tell_failure(what, error)

    def tell(self, event: Event) -> None:
        """Tell the listener."""
        if self._listener is not None:
            self._listener(event)  # type: ignore[arg-type]

    def put(self, work: Callable[[], None], fail: Callable[[BaseException], None] = lambda _: None) -> None:
        """Have work done that handles its own errors; `fail` is called if it never will be.

        Raises:
            InputError: the thread is closing.
        """
        with self._lock:
            if self._closing:
                raise InputError(CLOSED)
            self._jobs.put(Job(work, fail))

    def close(self) -> None:
        """Do what was asked for, then end the thread."""
        with self._lock:
            first, self._closing = not self._closing, True
            if first:
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while job := self._next():
                try:
                    job.work()
                except Exception as error:  # a process edge: told
                    self._tell_failure("work in the background", error)
                self._do_asides()
                del job  # or a closed conversation's memory would be held until the next one
        finally:
            with self._lock:
                self._closing = True
            with suppress(queue.Empty):
                while True:
                    if left := self._jobs.get_nowait():
                        left.fail(InputError(CLOSED))

    def _next(self) -> Job | None:
        """The next job; until it comes, the chores are done."""
        for quiet_s, chore in self._chores:
            with suppress(queue.Empty):
                return self._jobs.get(timeout=quiet_s)
            try:
                chore(lambda: not self._jobs.empty())
            except Exception as error:  # a process edge: told
                self._tell_failure("work in spare time", error)
        return self._jobs.get()

    def _do_asides(self) -> None:
        """Do what may be done meanwhile; each stands among the jobs too, which find it done."""
        with suppress(queue.Empty):
            while True:
                self._asides.get_nowait()()

    def _tell_failure(self, what: str, error: Exception) -> None:
        with suppress(Exception):  # it may be the listener that failed
            self.tell(Notice(f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())}"))


def raise_failure(owner: Owner | None) -> None:
    """Raise what failed in the background since the last call, once."""
    if owner is not None and owner.failure is not None:
        failure, owner.failure = owner.failure, None
        raise failure


def failure_notice(owner: Owner) -> Notice | None:
    """What failed in the background, for a listener, when no call can raise it any more."""
    failure, owner.failure = owner.failure, None
    return None if failure is None else Notice(f"saving failed: {type(failure).__name__}: {failure}")


def _drain(events: queue.SimpleQueue[Event | BaseException | None]) -> Iterator[Event]:
    while (event := events.get()) is not None:
        if isinstance(event, BaseException):
            raise event
        yield event
