"""The chat screen, driven by keys, over a fake engine that answers from another thread as the test says."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Button

from kvchat.config import Config
from kvchat.errors import CapacityError, ModelError, SessionExists, SessionNotFound
from kvchat.events import Delta, Event, Notice, Progress, Timings, TurnDone, Usage
from kvchat.tui.app import ChatApp
from kvchat.tui.commands import help_text
from kvchat.tui.widgets import Answer, Note, Question, age

WIDE, NARROW = (100, 32), (60, 20)
STATS = {
    "num_seen": 4012,
    "num_tokens": 4012,
    "position": 4012,
    "offset": 0,
    "rebased": False,
    "kv_budget": "",
    "segments": [],
    "num_pairs": 3953,
    "num_kept": 1204,
    "bytes_in_memory": 18_000_000,
    "bytes_on_disk": 4_100_000,
    "stored": 0.5,
}


def done(text: str, reason: str = "stop") -> TurnDone:
    return TurnDone(text, Usage(3953, 3912, 41, 59), Timings(0.0, 0.1, ()), reason)  # type: ignore[arg-type]


def words(text: str) -> list[Event]:
    return [*(Delta(piece) for piece in re.findall(r"\S+\s*", text)), done(text)]


class FakeSession:
    """A session that answers "echo: ..." unless `script` holds other events; an exception there is raised."""

    model, context_window = "tiny", 8192

    def __init__(self, worker: FakeWorker, name: str) -> None:
        self.worker, self.name = worker, name
        self.history: list[SimpleNamespace] = []
        self.script: list[Event | Exception] | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.sealed = threading.Event()
        self.sealed.set()
        self.stopped = threading.Event()
        self.saves_first = False
        self.closed = False

    def say(self, role: str, content: str) -> None:
        self.history.append(SimpleNamespace(role=role, content=content))

    def send(self, text: str) -> Iterator[Event]:
        if self.saves_first:
            self.say("user", text)
        for event in self._events(text):
            if isinstance(event, TurnDone):
                self.say("user", text)
                self.say("assistant", event.text)
            yield event

    def resend(self) -> Iterator[Event]:
        for event in self._events(f"again {self.history[-2].content}"):
            if isinstance(event, TurnDone):
                self.history[-1].content = event.text
            yield event

    def _events(self, text: str) -> Iterator[Event]:
        assert threading.current_thread() is not threading.main_thread()
        self.stopped.clear()
        said = ""
        for event in self.script or words(f"echo: {text}"):
            while not self.gate.wait(0.01):
                if self.stopped.is_set():
                    yield done(said, "interrupted")
                    return
            if isinstance(event, Exception):
                raise event
            said += event.text if isinstance(event, Delta) else ""
            yield event

    def stop(self) -> None:
        self.stopped.set()

    def messages(self) -> list[SimpleNamespace]:
        return list(self.history)

    def rewind(self, turns: int) -> str:
        index = len(self.history) - 2 * turns
        text = self.history[index].content
        del self.history[index:]
        return text

    def fork(self, name: str) -> FakeSession:
        copy = self.worker.open(name)
        copy.history = list(self.history)
        return copy

    def episodes(self) -> list[dict[str, Any]]:
        return []

    def stats(self) -> dict[str, Any]:
        assert self.sealed.wait(10)
        turns = [{"turn": 1, "tokens": 100, "rows": 90, "bytes_in_memory": 1_200_000, "bytes_on_disk": 2_000_000}]
        rest = {"name": self.name, "model": self.model, "context_window": 8192, "num_turns": len(self.history) // 2}
        return STATS | rest | {"turns": turns, "last": {"seal_s": 0.42}}

    def close(self) -> None:
        self.closed = True


class FakeWorker:
    """Sessions in a dict; `error` is raised by the next `open`."""

    def __init__(self, *names: str) -> None:
        self.all = {name: FakeSession(self, name) for name in names}
        self.error: Exception | None = None
        self.ready = threading.Event()
        self.ready.set()
        self.listener: Callable[[Any], None] = lambda event: None

    def connect(self, listener: Callable[[Any], None]) -> FakeWorker:
        self.listener = listener
        return self

    def open(self, name: str | None = None, create: bool = True, **_: Any) -> FakeSession:
        assert self.ready.wait(10)
        if self.error:
            raise self.error
        name = name or next(iter(self.all), "first")
        if name not in self.all and not create:
            raise SessionNotFound(f"no session named {name!r}; `kvchat ls` lists them")
        return self.all.setdefault(name, FakeSession(self, name))

    def sessions(self) -> list[SimpleNamespace]:
        stamp = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
        return [SimpleNamespace(name=name, num_turns=1, updated=stamp) for name in self.all]

    def rename(self, old: str, new: str) -> None:
        if new in self.all:
            raise SessionExists(f"a session named {new!r} is there already")
        self.all[new] = self.all.pop(old)
        self.all[new].name = new


async def wait_until(holds: Callable[[], Any], timeout: float = 10.0) -> None:
    end = monotonic() + timeout
    while not holds():
        assert monotonic() < end, "this never became true"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def chat(
    worker: FakeWorker, size: tuple[int, int] = WIDE, wait: bool = True
) -> AsyncIterator[tuple[ChatApp, Pilot[None]]]:
    app = ChatApp(worker.connect, Config())  # type: ignore[arg-type]
    async with app.run_test(size=size) as pilot:
        try:
            if wait:
                await wait_until(lambda: not app.busy)
            yield app, pilot
        finally:
            for session in worker.all.values():
                session.gate.set()
                session.sealed.set()
            worker.ready.set()


async def enter(app: ChatApp, pilot: Pilot[None], text: str, wait: bool = True) -> None:
    app.prompt.text = text
    await pilot.press("enter")
    await pilot.pause()
    if wait:
        await wait_until(lambda: not app.busy)


def texts(app: ChatApp, kind: type[Answer] | type[Question] | type[Note]) -> list[str]:
    return [widget.text for widget in app.transcript.query(kind) if widget.display]


def screen(app: ChatApp) -> str:
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


async def test_two_turns_are_streamed_in_full() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await enter(app, pilot, "one two three")
        await enter(app, pilot, "and four")
        assert texts(app, Question) == ["one two three", "and four"]
        assert texts(app, Answer) == ["echo: one two three", "echo: and four"]
        assert [answer.source for answer in app.query(Answer)] == texts(app, Answer)
        assert app.prompt.text == ""


async def test_text_is_on_the_screen_before_the_answer_is_complete() -> None:
    worker = FakeWorker("trip")

    def slow() -> Iterator[Event]:
        yield Delta("```python\nx = 1\n")
        assert release.wait(10)
        yield Delta("y = 2\n```\n")
        yield done("```python\nx = 1\ny = 2\n```\n")

    release = threading.Event()
    worker.all["trip"].script = slow()  # type: ignore[assignment]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "code", wait=False)
        await wait_until(lambda: "x = 1" in screen(app))
        release.set()
        await wait_until(lambda: not app.busy)
        await wait_until(lambda: "y = 2" in screen(app))
        assert "```" not in screen(app)


async def test_the_numbers_of_a_turn_come_at_once_and_those_of_the_seal_after_it() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        worker.all["trip"].sealed.clear()
        await enter(app, pilot, "hello")
        assert texts(app, Note)[-1] == "cached 3912 · prefilled 41 · sealing…"
        worker.all["trip"].sealed.set()
        expected = "cached 3912 · prefilled 41 · kept 1204/3953 pairs · 18 MB · sealed 0.4 s"
        await wait_until(lambda: texts(app, Note)[-1] == expected)
        await wait_until(lambda: "4012 / 8192 tokens" in screen(app))


async def test_typing_and_queueing_work_while_the_engine_is_silent() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "first", wait=False)
        await pilot.press(*"second")
        assert app.prompt.text == "second"
        await pilot.press("enter")
        assert "next: second" in screen(app)
        await enter(app, pilot, "third", wait=False)
        assert app.prompt.text == "third" and "Escape" in texts(app, Note)[-1]
        worker.all["trip"].gate.set()
        await wait_until(lambda: len(texts(app, Answer)) == 2 and not app.busy)
        assert texts(app, Question) == ["first", "second"]
        assert app.prompt.text == "third"


async def test_escape_stops_the_answer_and_returns_the_waiting_message() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        worker.all["trip"].gate.clear()
        await enter(app, pilot, "long story", wait=False)
        await enter(app, pilot, "next one", wait=False)
        app.prompt.text = "a draft"
        await pilot.press("escape")
        await wait_until(lambda: not app.busy)
        assert app.prompt.text == "next one\na draft"
        assert any(note.startswith("stopped · cached") for note in texts(app, Note))


async def test_a_message_typed_before_the_model_is_loaded_is_sent_afterwards() -> None:
    worker = FakeWorker("trip")
    worker.ready.clear()
    async with chat(worker, wait=False) as (app, pilot):
        worker.listener(Progress("download", 40_000_000, 98_000_000))
        await wait_until(lambda: "downloading the model 40 of 98 MB" in screen(app))
        await enter(app, pilot, "hello", wait=False)
        assert texts(app, Question) == []
        worker.ready.set()
        await wait_until(lambda: texts(app, Answer) == ["echo: hello"])


async def test_progress_and_notices_are_shown() -> None:
    worker = FakeWorker("trip")
    release = threading.Event()

    def slow() -> Iterator[Event]:
        yield Progress("prefill", 100, 4000)
        yield Notice("turn 3 was [b]damaged[/b] and is computed again")
        assert release.wait(10)
        yield from words("fine")

    worker.all["trip"].script = slow()  # type: ignore[assignment]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await wait_until(lambda: "reading 100 of 4000 tokens" in screen(app))
        assert "turn 3 was [b]damaged[/b] and is computed again" in texts(app, Note)
        assert len(app._notifications) == 1
        release.set()
        await wait_until(lambda: not app.busy)
        await wait_until(lambda: "reading" not in screen(app))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CapacityError("the message has 9000 tokens, the window has room for 180"), "the message has 9000 tokens"),
        (RuntimeError("out of memory"), "internal error: RuntimeError: out of memory"),
    ],
)
async def test_a_message_that_was_not_sent_returns_to_the_input(error: Exception, line: str) -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].script = [error]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "precious words")
        assert app.prompt.text == "precious words"
        assert texts(app, Question) == texts(app, Answer) == []
        assert texts(app, Note)[-1].startswith(line)
        worker.all["trip"].script = None
        await pilot.press("enter")
        await wait_until(lambda: texts(app, Answer) == ["echo: precious words"])


async def test_a_message_that_was_saved_before_the_error_stays_and_can_be_answered() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].saves_first = True
    worker.all["trip"].script = [RuntimeError("boom")]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "precious words")
        assert texts(app, Question) == ["precious words"] and app.prompt.text == ""
        assert any("Ctrl+R" in note for note in texts(app, Note))


async def test_a_model_that_cannot_be_loaded_is_one_line_and_nothing_typed_is_lost() -> None:
    worker = FakeWorker("trip")
    worker.ready.clear()
    worker.error = ModelError("there is no model 'x'")
    async with chat(worker, wait=False) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        worker.ready.set()
        await wait_until(lambda: not app.busy)
        assert texts(app, Note)[-1] == "there is no model 'x'" and app.prompt.text == "hello"
        await pilot.press("enter")
        assert app.prompt.text == "hello" and "no session is open" in texts(app, Note)[-1]


async def test_resuming_shows_the_history_and_closes_the_other_session() -> None:
    worker = FakeWorker("trip", "work")
    worker.all["work"].say("system", "be brief")
    worker.all["work"].say("user", "how much?")
    worker.all["work"].say("assistant", "**ten**")
    async with chat(worker) as (app, pilot):
        await pilot.press("ctrl+l", "down", "enter")
        await wait_until(lambda: not app.busy and app.session_name == "work")
        assert (texts(app, Note), texts(app, Question)) == (["system: be brief"], ["how much?"])
        assert texts(app, Answer) == ["**ten**"] and "**" not in screen(app)
        assert worker.all["trip"].closed and "work · tiny" in screen(app)
        assert app.prompt.has_focus


async def test_a_long_history_shows_its_newest_messages_and_the_others_on_request() -> None:
    worker = FakeWorker("trip")
    for turn in range(60):
        worker.all["trip"].say("user", f"question {turn}")
        worker.all["trip"].say("assistant", f"answer {turn}")
    async with chat(worker) as (app, _):
        assert texts(app, Question) == [f"question {turn}" for turn in range(35, 60)]
        await wait_until(lambda: "answer 59" in screen(app))
        app.transcript.scroll_home(animate=False)
        app.query_one("#earlier", Button).press()
        await wait_until(lambda: texts(app, Question)[0] == "question 10")
        await wait_until(lambda: "question 35" in screen(app) and "question 34" not in screen(app))
        app.query_one("#earlier", Button).press()
        await wait_until(lambda: texts(app, Answer) == [f"answer {turn}" for turn in range(60)])
        assert not app.query("#earlier")


async def test_page_keys_scroll_the_transcript_while_the_input_has_the_focus() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].say("user", "line\n" * 200)
    async with chat(worker) as (app, pilot):
        await wait_until(lambda: app.transcript.scroll_y > 0 and app.transcript.is_vertical_scroll_end)
        await pilot.press("pageup")
        await wait_until(lambda: not app.transcript.is_vertical_scroll_end)
        await pilot.press("pagedown")
        await wait_until(lambda: app.transcript.is_vertical_scroll_end)


async def test_a_new_session_begins_empty_and_an_existing_name_is_refused() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].say("user", "old")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/new trip")
        assert "is there already" in texts(app, Note)[-1] and app.session_name == "trip"
        await pilot.press("ctrl+n")
        await wait_until(lambda: not app.busy and app.session_name != "trip")
        assert texts(app, Question) == [] and len(worker.all) == 2
        await enter(app, pilot, "/new with spaces")
        assert app.session_name == "with spaces"


async def test_commands_fork_rename_rewind_retry_and_count() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        await enter(app, pilot, "two")
        await pilot.press("ctrl+r")
        await wait_until(lambda: not app.busy)
        assert texts(app, Answer) == ["echo: one", "echo: again two"]
        await enter(app, pilot, "/fork side")
        assert app.session_name == "side" and texts(app, Question) == ["one", "two"]
        await enter(app, pilot, "/rewind")
        assert app.prompt.text == "two" and texts(app, Question) == ["one"]
        await enter(app, pilot, "/rename trip")
        assert "is there already" in texts(app, Note)[-1]
        await enter(app, pilot, "/rename [b]x[/b]")
        await wait_until(lambda: screen(app).count("[b]x[/b]") == 2)
        await enter(app, pilot, "/stats")
        assert "kept 1204/3953 pairs · 18 MB in memory · 4.1 MB on disk" in texts(app, Note)[-1]
        assert worker.all["trip"].history[-1].content == "echo: again two"


async def test_a_failed_retry_leaves_the_former_answer() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        worker.all["trip"].script = [Delta("half"), RuntimeError("boom")]
        await enter(app, pilot, "/retry")
        assert texts(app, Answer) == ["echo: one"] and "boom" in texts(app, Note)[-1]


@pytest.mark.parametrize("line", ["/frobnicate", "/resume", "/rewind many", "/quit now", "/resume nowhere"])
async def test_a_wrong_command_is_a_one_line_hint(line: str) -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await enter(app, pilot, line)
        (note,) = app.query("Note.-error").results(Note)
        assert "\n" not in note.text
        assert texts(app, Question) == []


async def test_commands_that_change_the_session_wait_for_the_answer() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await enter(app, pilot, "/new", wait=False)
        assert "has to wait" in texts(app, Note)[-1] and app.prompt.text == "/new"
        await enter(app, pilot, "/help", wait=False)
        assert texts(app, Note)[-1].startswith(help_text())


async def test_two_slashes_send_one() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await enter(app, pilot, "//help me")
        assert texts(app, Question) == ["/help me"]


async def test_quit_leaves_while_the_model_answers() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await enter(app, pilot, "/quit", wait=False)
        await wait_until(lambda: not app.is_running)
        assert worker.all["trip"].stopped.is_set()


async def test_what_the_model_says_cannot_drive_the_terminal_nor_the_markup() -> None:
    worker = FakeWorker("trip")
    text = "\x1b]0;owned\x07 and [red]this[/red] <think>too</think>\x9b2J"
    worker.all["trip"].script = [Delta(text[:1]), Delta(text[1:]), done(text)]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello [link=x]\x1b[2J")
        await wait_until(lambda: "␛]0;owned␇ and [red]this[/red] <think>too</think>�2J" in screen(app))
        assert "hello [link=x]␛[2J" in screen(app)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", screen(app).replace("\n", ""))


async def test_a_message_may_have_several_lines() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await pilot.press("a", "ctrl+j", "b", "enter")
        await wait_until(lambda: texts(app, Question) == ["a\nb"])


async def test_a_narrow_terminal_hides_the_session_list_until_it_is_asked_for() -> None:
    worker = FakeWorker("trip", "work")
    async with chat(worker, size=NARROW) as (app, pilot):
        assert not app.sessions.display
        await enter(app, pilot, "hello " * 40)
        await pilot.press("ctrl+l")
        assert app.sessions.display and app.sessions.has_focus
        await pilot.press("down", "enter")
        await wait_until(lambda: not app.busy and app.session_name == "work")
        assert not app.sessions.display
        await pilot.resize_terminal(*WIDE)
        await wait_until(lambda: app.sessions.display)


def test_age_is_told_in_its_largest_unit() -> None:
    now = datetime.now(UTC)
    spans = {"now": 5, "4 min": 250, "2 h": 7300, "3 d": 3 * 86400 + 5}
    assert {age((now - timedelta(seconds=s)).isoformat()) for s in spans.values()} == set(spans)
