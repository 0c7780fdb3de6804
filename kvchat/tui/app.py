"""The chat screen: its keys, and the jobs it gives to the engine.

Every call into the engine runs in a thread. At most one job (opening, a turn, a fork, ...) runs at a time; waiting for
a seal's numbers goes beside it. An error ends its job and becomes a line in the transcript.
"""

from __future__ import annotations

from asyncio import to_thread
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ClassVar

from textual import events, getters, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.widgets import Footer, Markdown

from kvchat.config import Config
from kvchat.errors import InputError, KVChatError
from kvchat.events import Listener, Notice, Progress
from kvchat.terminal import neutralise
from kvchat.tui.bars import StatusBar, TitleBar
from kvchat.tui.commands import Commands
from kvchat.tui.map import SegmentMap
from kvchat.tui.turns import Turns
from kvchat.tui.widgets import Note, Plain, Prompt, SessionList, Transcript

if TYPE_CHECKING:
    from kvchat.handle import Session
    from kvchat.worker import Worker

NARROW = 80
"""Columns below which the session list is shown only on request."""


class ChatApp(App[None]):
    """The program on the screen.

    Args:
        connect: makes the worker; called in a thread, with the listener for work outside a turn.
        config: all settings.
        session: the session to open; None = the last one.
        how: `system`, `model`, `rebuild` of `Worker.open`, for that session.
    """

    TITLE = "kvchat"
    CSS_PATH = "kvchat.tcss"
    AUTO_FOCUS = "#prompt"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", id="stop"),
        Binding("ctrl+n", "command('/new')", "New", id="new"),
        Binding("ctrl+l", "sessions", "Sessions", id="sessions"),
        Binding("ctrl+r", "command('/retry')", "Retry", id="retry"),
        Binding("f3,ctrl+g", "command('/map')", "Map", id="map"),
        Binding("ctrl+q", "quit", "Quit", id="quit", priority=True),
    ]

    title_bar = getters.query_one(TitleBar)
    sessions = getters.query_one(SessionList)
    transcript = getters.query_one(Transcript)
    segment_map = getters.query_one(SegmentMap)
    waiting = getters.query_one("#queued", Plain)
    status = getters.query_one(StatusBar)
    prompt = getters.query_one(Prompt)

    def __init__(
        self, connect: Callable[[Listener], Worker], config: Config, session: str | None = None, **how: Any
    ) -> None:
        super().__init__()
        self.config = config
        self.commands = Commands(self)
        self.turns = Turns(self)
        self.engine: Worker | None = None
        self.chat: Session | None = None
        self.busy = False
        """A job runs: `begin` must not be called."""
        self.answering = False
        """The job is a turn, which can be stopped."""
        self._connect = connect
        self._first = session, how
        self._doing = ""
        self._reports: deque[Progress | Notice] = deque()

    def compose(self) -> ComposeResult:
        yield TitleBar()
        with Horizontal(id="body"):
            yield SessionList(id="sessions")
            yield Transcript(id="transcript")
        yield SegmentMap(id="map")
        yield Plain(id="queued")
        yield StatusBar()
        yield Prompt(id="prompt")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.set_interval(0.1, self.drain)
        name, how = self._first
        self.begin("starting", self.open_session(lambda engine: engine.open(name, **how)))

    # -- events ------------------------------------------------------------------------------------------------------

    def report(self, event: Progress | Notice) -> None:
        """The listener for work outside a turn; any thread may call it, and it never waits."""
        self._reports.append(event)

    def drain(self) -> None:
        """Show what the listener was told."""
        while self._reports:
            self.show(self._reports.popleft())

    def show(self, event: Progress | Notice) -> None:
        """Progress goes to the status line, a notice too, and into the transcript and a toast."""
        if isinstance(event, Notice):
            self.status.tell(event.text)
            self.notify(neutralise(event.text), markup=False)
            self.note(event.text, "-notice")
        elif event.total and event.done >= event.total:
            self.clear_progress()
        else:
            self.status.show(event)

    def clear_progress(self) -> None:
        """Show what is going on, without a bar."""
        self.status.say(self._doing)

    def note(self, text: str, kind: str = "") -> Note:
        """Add a line of the program to the transcript; `kind` is a class of the stylesheet."""
        note = Note(text, classes=kind)
        self.transcript.mount(note)
        return note

    def _say(self, words: str) -> None:
        self._doing = words
        self.status.say(words)

    # -- jobs --------------------------------------------------------------------------------------------------------

    def begin(self, words: str, job: Coroutine[Any, Any, None]) -> None:
        """Start the one job, which is called `words` in the status line."""
        self.busy = True
        self.status.tell("")
        self._say(f"{words}…")
        self.run_worker(self._finish(job), exit_on_error=False)

    async def _finish(self, job: Coroutine[Any, Any, None]) -> None:
        is_done = await self._guard(job)
        self.busy = self.answering = False
        self.drain()
        self._say("")
        if queued := self._take_queued():
            if is_done and self.chat:
                self.turns.send(queued)
            else:
                self.prompt.give_back(queued)

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that keeps nobody waiting: reading numbers."""
        self.run_worker(self._guard(work), exit_on_error=False)

    async def _guard(self, job: Coroutine[Any, Any, None]) -> bool:
        """Run `job`; an error becomes a line in the transcript. This is the edge of the program: nothing may escape."""
        try:
            await job
        except KVChatError as error:
            self.note(str(error), "-error")
        except OSError as error:
            self.note(f"{error.filename or 'the system'}: {error.strerror or error}", "-error")
        except Exception as error:
            self.note(f"internal error: {type(error).__name__}: {error}", "-error")
        else:
            return True
        return False

    async def open_session(self, make: Callable[[Worker], Session]) -> None:
        """Go over to the session that `make` opens; if that fails, the present one stays."""
        engine = await to_thread(self.connected)
        self.sessions.show(await to_thread(engine.sessions), self.session_name)
        chat = await to_thread(make, engine)
        before, self.chat = self.chat, chat
        self.show_name()
        self.title_bar.measure(0, chat.context_window, 0)
        await self.show_history(chat)
        self.beside(self.turns.measure(chat))
        if before is not None:
            await to_thread(before.close)

    def connected(self) -> Worker:
        if self.engine is None:
            self.engine = self._connect(self.report)
        return self.engine

    @property
    def session_name(self) -> str:
        """Of the open session; empty if there is none."""
        return self.chat.name if self.chat else ""

    def show_name(self) -> None:
        """Write the session's name and model at the top."""
        if self.chat:
            self.title_bar.name_session(self.chat.name, self.chat.model)

    async def show_history(self, chat: Session) -> None:
        messages = await to_thread(chat.messages)
        await self.transcript.show(messages)
        if not any(message.role == "user" for message in messages):
            self.note("A new session. Type a message and press Enter; /help lists commands.")

    # -- turns -------------------------------------------------------------------------------------------------------

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        text = event.text
        is_command = text.startswith("/") and not text.startswith("//")
        act = self.commands.run if is_command else self._queue if self.busy else self.turns.send
        if not self._attempt(act, text):
            self.prompt.give_back(text)

    def _attempt(self, act: Callable[[str], None], text: str) -> bool:
        try:
            act(text)
        except KVChatError as error:
            self.note(str(error), "-error")
            return False
        return True

    def _queue(self, text: str) -> None:
        if self.waiting.text:
            raise InputError("one message is waiting already; Escape takes it back")
        self.waiting.text = text
        self.waiting.update(f"next: {neutralise(text)}")
        self.waiting.display = True

    def _take_queued(self) -> str:
        text, self.waiting.text, self.waiting.display = self.waiting.text, "", False
        return text

    def session(self) -> Session:
        if self.chat is None:
            raise InputError("no session is open; /new begins one, /resume NAME goes on with one")
        return self.chat

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_stop(self) -> None:
        """End the running turn, keeping what was said; a message that waits returns to the input."""
        if self.sessions.has_focus:
            self._leave_sessions()
            return
        if queued := self._take_queued():
            self.prompt.give_back(queued)
        if self.answering and self.chat:
            self._say("stopping…")
            self.chat.stop()

    def action_command(self, line: str) -> None:
        self._attempt(self.commands.run, line)

    def action_sessions(self) -> None:
        """Go to the session list; from there, close it."""
        if self.sessions.has_focus:
            self.sessions.display = False
            self.prompt.focus()
        else:
            self.sessions.display = True
            self.sessions.focus()

    def _leave_sessions(self) -> None:
        self.sessions.display = self.size.width >= NARROW
        self.prompt.focus()

    def on_resize(self, event: events.Resize) -> None:
        self.screen.set_class(event.size.width < NARROW, "-narrow")
        if not self.sessions.has_focus:
            self.sessions.display = event.size.width >= NARROW

    def action_scroll(self, pages: int) -> None:
        scroll = self.transcript.scroll_page_down if pages > 0 else self.transcript.scroll_page_up
        scroll()

    async def action_quit(self) -> None:
        if self.answering and self.chat:
            self.chat.stop()
        self.exit()

    @on(SessionList.OptionSelected)
    def _selected(self, event: SessionList.OptionSelected) -> None:
        self._leave_sessions()
        self._attempt(self.commands.run, f"/resume {self.sessions.names[event.option_index]}")

    @on(Markdown.LinkClicked)
    def _link(self, event: Markdown.LinkClicked) -> None:
        # The model wrote it: where it leads is shown, not opened.
        self.notify(neutralise(event.href), title="link", markup=False)
