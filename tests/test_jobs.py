"""The thread that does jobs: what is raised in it reaches somebody, and nobody waits for a thread that has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from kvchat.errors import InputError
from kvchat.events import Event, Notice, Progress
from kvchat.jobs import Jobs


class Ending(BaseException):
    """As SystemExit is: no Exception."""


class Somebody:
    failure: Exception | None = None


def outcome(call: Callable[[], object]) -> object:
    """What a call gives or raises, in a thread of its own: it could wait for ever."""
    future: Future[object] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.exception(10) or future.result()


def ending() -> Iterator[Event]:
    yield Progress("seal", 0, 1)
    raise Ending


def nothing() -> Iterator[Event]:
    yield from ()


def test_what_is_no_exception_reaches_the_caller_too_and_the_thread_lives_on() -> None:
    jobs = Jobs(None)
    assert isinstance(outcome(lambda: jobs.call(lambda: list(ending()))), Ending)
    assert isinstance(outcome(lambda: list(jobs.stream(ending, nothing, Somebody()))), Ending)
    assert outcome(lambda: jobs.call(lambda: 1)) == 1
    jobs.close()


@pytest.mark.parametrize("listener_fails", [False, True])
def test_a_chore_that_fails_is_told_and_the_thread_lives_on(listener_fails: bool) -> None:
    told, tried = list[Event](), threading.Event()

    def chore(_: object) -> None:
        raise ValueError("one\ntwo")

    def listener(event: Event) -> None:
        told.append(event)
        tried.set()
        if listener_fails:
            raise RuntimeError("the window is gone")

    jobs = Jobs(listener, [(0.01, chore)])
    assert tried.wait(10)
    assert outcome(lambda: jobs.call(lambda: 1)) == 1
    assert told[0] == Notice("work in spare time failed: ValueError: one two")
    jobs.close()


def test_what_fails_in_spare_time_is_told_and_is_nobodys_failure() -> None:
    told = list[Event]()

    def steps() -> Iterator[Event]:
        yield Progress("rebuild", 1, 2)
        raise MemoryError("full")

    jobs = Jobs(told.append)
    jobs.call(lambda: jobs.in_spare_time(steps, "trip: recording"))
    assert told == [Progress("rebuild", 1, 2), Notice("trip: recording failed: MemoryError: full")]
    jobs.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_thread_ends_whatever_waits_for_it_fails() -> None:
    jobs, begun, go_on = Jobs(None), threading.Event(), threading.Event()

    def end() -> None:
        begun.set()
        go_on.wait(10)
        raise Ending

    jobs.put(end)
    begun.wait(10)
    waiting: list[Future[object]] = []
    calls: list[Callable[[], object]] = [
        lambda: jobs.call(lambda: 1),
        lambda: list(jobs.stream(nothing, nothing, Somebody())),
    ]
    for call in calls:
        waiting.append(Future())
        threading.Thread(target=lambda call=call, one=waiting[-1]: one.set_result(outcome(call)), daemon=True).start()
    while jobs._jobs.qsize() < len(calls):
        threading.Event().wait(0.01)
    go_on.set()
    results = [one.result(20) for one in waiting] + [outcome(calls[0])]
    assert all(isinstance(result, InputError) and "is closed" in str(result) for result in results)
    jobs.close()


def test_what_was_done_aside_is_not_held_by_an_idle_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(None)
    put = jobs.put

    def put_and_wait(work: Callable[[], None], fail: Callable[[BaseException], None] = lambda _: None) -> None:
        put(work, fail)
        monkeypatch.setattr(jobs, "put", put)
        jobs.call(lambda: None)

    monkeypatch.setattr(jobs, "put", put_and_wait)
    assert outcome(lambda: jobs.call(lambda: 1, aside=True)) == 1
    assert jobs._asides.empty()
    jobs.close()


def test_what_is_done_aside_waits_for_one_step_of_a_turn_alone() -> None:
    done, told, jobs = list[str](), threading.Event(), Jobs(None)

    def turn() -> Iterator[Event]:
        told.set()
        while "aside" not in done:
            yield Notice("on")
        done.append("turn")

    events = jobs.stream(turn, nothing, Somebody())
    assert told.wait(10)
    assert outcome(lambda: jobs.call(lambda: done.append("aside") or 1, aside=True)) == 1
    assert all(isinstance(event, Notice) for event in events)
    assert isinstance(outcome(lambda: jobs.call(lambda: 1 // 0, aside=True)), ZeroDivisionError)
    assert outcome(lambda: jobs.call(lambda: done.append("job") or 1)) == 1
    assert done == ["aside", "turn", "job"]
    jobs.close()
    assert isinstance(outcome(lambda: jobs.call(nothing, aside=True)), InputError)
