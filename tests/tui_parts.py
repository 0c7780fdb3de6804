"""A fake engine for tests of the chat screen: it answers from another thread as the test says."""

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

from textual.pilot import Pilot

from kvchat.branching import Node
from kvchat.config import Config
from kvchat.errors import SessionExists, SessionNotFound
from kvchat.events import Delta, Event, Timings, TurnDone, Usage
from kvchat.inspecting import Inspection
from kvchat.store.records import SearchHit, SessionInfo
from kvchat.tui.answer import Answer
from kvchat.tui.app import ChatApp
from kvchat.tui.chat import ChatScreen
from kvchat.tui.items import Question
from kvchat.tui.plain_text import Note
from tests.fake_inspection import inspection

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
    "keep_ratio": 0.5,
}


def done(text: str, reason: str = "stop") -> TurnDone:
    return TurnDone(text, Usage(3953, 3912, 41, 59), Timings(0.0, 0.1, ()), reason)  # type: ignore[arg-type]


def words(text: str) -> list[Event]:
    return [*(Delta(piece) for piece in re.findall(r"\S+\s*", text)), done(text)]


class FakeSession:
    """A session that answers "echo: ..." unless `script` holds other events; an exception there is raised."""

    context_window = 8192

    def __init__(self, worker: FakeWorker, name: str) -> None:
        self.worker, self.name, self.model = worker, name, "tiny"
        self.history: list[SimpleNamespace] = []
        self.script: list[Event | Exception] | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.sealed = threading.Event()
        self.sealed.set()
        self.stopped = threading.Event()
        self.saves_first = False
        self.closed = False
        self.draft = ""
        self.settings: dict[str, Any] = {}
        self.asked: list[tuple[Any, ...]] = []

    @property
    def title(self) -> str:
        return self.worker.titles.get(self.name, "")

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

    def edit(self, turn: int, text: str) -> Iterator[Event]:
        self.asked.append(("edit", turn, text))
        asked = [place for place, message in enumerate(self.history) if message.role == "user"]
        del self.history[asked[turn - 1] :]
        yield from self.send(text)

    def go_on(self) -> Iterator[Event]:
        before = self.history[-1].content
        for event in self._events("more"):
            if isinstance(event, TurnDone):
                event = done(self.history[-1].content + event.text)
                self.history[-1].content = event.text
            yield event
        assert before

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
        text: str = self.history[index].content
        del self.history[index:]
        return text

    def fork(self, name: str, at: int | None = None) -> FakeSession:
        copy = self.worker.open(name)
        copy.history = self.history[: None if at is None else 2 * at]
        return copy

    def configure(self, settings: dict[str, Any]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.asked.append(("configure", settings))
        self.settings |= settings

    def set_draft(self, text: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.draft = text

    def tree(self) -> list[Node]:
        stamp = "2026-11-30T09:00:00+00:00"
        return [
            Node("m1", None, "user", "one", 1, True, stamp),
            Node("m2", "m1", "assistant", "first", 1, True, stamp),
            Node("m3", "m1", "assistant", "second", 1, False, stamp),
        ]

    def inspect(self, turn: int) -> Inspection:
        assert threading.current_thread() is not threading.main_thread()
        return inspection(turn)

    def switch(self, message: str) -> None:
        self.asked.append(("switch", message))

    def attach(self, title: str, text: str) -> SimpleNamespace:
        self.say("user", f"{title}: {text}")
        self.say("assistant", "I have read it.")
        return SimpleNamespace(tokens=len(text), computed=3)

    def count(self, text: str) -> int:
        return len(text)

    def episodes(self) -> list[dict[str, Any]]:
        return []

    def stats(self) -> dict[str, Any]:
        assert self.sealed.wait(10)
        turns = [{"turn": 1, "tokens": 100, "rows": 90, "bytes_in_memory": 1_200_000, "bytes_on_disk": 2_000_000}]
        rest = {"name": self.name, "model": self.model, "context_window": 8192, "num_turns": len(self.history) // 2}
        kept = self.settings.get("compress.keep_ratio") or 0.5
        return STATS | rest | {"turns": turns, "last": {"seal_s": 0.42}, "keep_ratio": float(kept)}

    def close(self) -> None:
        self.closed = True


class FakeWorker:
    """Sessions in a dict; `error` is raised by the next `open`."""

    def __init__(self, *names: str) -> None:
        self.all = {name: FakeSession(self, name) for name in names}
        self.opened: list[dict[str, Any]] = []
        self.titles: dict[str, str] = {}
        self.tags: dict[str, tuple[str, ...]] = {}
        self.closed = False
        self.error: Exception | None = None
        self.ready = threading.Event()
        self.ready.set()
        self.connected = False
        self.listener: Callable[[Any], None] = lambda event: None

    def connect(self, listener: Callable[[Any], None]) -> FakeWorker:
        self.listener, self.connected = listener, True
        return self

    def open(self, name: str | None = None, create: bool = True, **how: Any) -> FakeSession:
        self.opened.append(how)
        assert self.ready.wait(10)
        if self.error:
            raise self.error
        name = name or next(iter(self.all), "first")
        if name not in self.all and not create:
            raise SessionNotFound(f"no session named {name!r}; `kvchat ls` lists them")
        session = self.all.setdefault(name, FakeSession(self, name))
        session.model = how.get("model") or session.model
        session.closed = False
        return session

    def sessions(self) -> list[SessionInfo]:
        stamp = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
        return [
            SessionInfo(
                id=number,
                name=name,
                model=session.model,
                fingerprint={},
                tip="m1",
                created=stamp,
                updated=stamp,
                title=self.titles.get(name, ""),
                num_turns=1,
                num_tokens=100,
                nbytes=4_100_000,
                stored=1.0,
                settings=session.settings,
                tags=self.tags.get(name, ()),
            )
            for number, (name, session) in enumerate(self.all.items())
        ]

    def retitle(self, name: str, title: str) -> None:
        self.titles[name] = title

    def tag(self, name: str, tags: tuple[str, ...]) -> None:
        self.tags[name] = tags

    def search(self, text: str) -> list[SearchHit]:
        return [
            SearchHit(name, 1 + place // 2, one.role, one.content, ())
            for name, session in self.all.items()
            for place, one in enumerate(session.history)
            if text in one.content
        ]

    def preview(self, name: str) -> list[SimpleNamespace]:
        assert threading.current_thread() is not threading.main_thread()
        return self.all[name].messages()

    def said(self, message_id: str) -> str:
        assert threading.current_thread() is not threading.main_thread()
        return f"all of {message_id}"

    def close(self) -> None:
        self.closed = True

    def rename(self, old: str, new: str) -> None:
        if new in self.all:
            raise SessionExists(f"a session named {new!r} is there already")
        self.all[new] = self.all.pop(old)
        self.all[new].name = new


async def wait_until(holds: Callable[[], Any], timeout: float = 30.0) -> None:
    end = monotonic() + timeout
    while not holds():
        assert monotonic() < end, "this never became true"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def chat(
    worker: FakeWorker, size: tuple[int, int] = WIDE, wait: bool = True, config: Config | None = None
) -> AsyncIterator[tuple[ChatScreen, Pilot[None]]]:
    """The chat screen over `worker`, as soon as its session is open."""
    # The built-in model may not be on this machine, and would be asked for.
    settings = (config or Config()).replaced({"model.name": "tiny"})
    app = ChatApp(worker.connect, settings)  # type: ignore[arg-type]
    async with app.run_test(size=size) as pilot:
        try:
            if wait:
                await idle(app.chat)
            yield app.chat, pilot
        finally:
            for session in worker.all.values():
                session.gate.set()
                session.sealed.set()
            worker.ready.set()


async def idle(app: ChatScreen) -> None:
    await wait_until(lambda: not app.jobs.busy)


async def enter(app: ChatScreen, pilot: Pilot[None], text: str, wait: bool = True) -> None:
    app.prompt.text = text
    await pilot.press("enter")
    await pilot.pause()
    if wait:
        await idle(app)


def texts(app: ChatScreen, kind: type[Answer] | type[Question] | type[Note]) -> list[str]:
    return [widget.text for widget in app.transcript.query(kind) if widget.display]


def screen(app: ChatScreen) -> str:
    """What is to be seen, of a screen on top too."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.app.screen._compositor.render_strips())
