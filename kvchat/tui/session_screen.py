"""The screen with a session on it: its widgets, what the engine reports, and how another session is opened.

Every call into the engine runs in a thread. At most one job (opening, a turn, a fork, ...) runs at a time; waiting for
a seal's numbers goes beside it.
"""

from __future__ import annotations

from asyncio import to_thread
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from textual import getters
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.message import Message as Announcement
from textual.screen import Screen
from textual.widgets import Footer

from kvchat.errors import InputError, KVChatError, ModelError, SessionNotFound
from kvchat.events import Listener, Notice, Progress
from kvchat.terminal import neutralise
from kvchat.tui.bars import StatusBar, TitleBar
from kvchat.tui.drafts import Drafts
from kvchat.tui.jobs import Jobs
from kvchat.tui.map import SegmentMap
from kvchat.tui.plain_text import Note
from kvchat.tui.prompt import Prompt
from kvchat.tui.queued import Queue
from kvchat.tui.session_list import SessionList
from kvchat.tui.transcript import Transcript
from kvchat.tui.turns import Turns

if TYPE_CHECKING:
    from kvchat.config import Config
    from kvchat.handle import Session
    from kvchat.store.store import SessionInfo
    from kvchat.worker import Worker


CUT = {
    "interrupted": "This answer was interrupted; /continue goes on with it, /retry begins it anew.",
    "length": "This answer was cut at max_new_tokens; /continue goes on with it.",
}
"""What is said of an answer by how it ended."""


@dataclass(frozen=True, slots=True)
class Editing:
    """The message of a turn is in the input, to be said anew."""

    turn: int
    before: str
    """What was in the input, which comes back."""


class SessionScreen(Screen[None]):
    """Shows one session of the engine.

    Args:
        connect: makes the worker; called in a thread, with the listener for work outside a turn.
        config: all settings.
    """

    @dataclass
    class Changed(Announcement):
        """The settings of all sessions were changed."""

        config: Config

    title_bar = getters.query_one(TitleBar)
    sessions = getters.query_one(SessionList)
    transcript = getters.query_one(Transcript)
    segment_map = getters.query_one(SegmentMap)
    waiting = getters.query_one(Queue)
    status = getters.query_one(StatusBar)
    prompt = getters.query_one(Prompt)

    def __init__(self, connect: Callable[[Listener], Worker], config: Config) -> None:
        super().__init__()
        self.config = config
        self.turns, self.jobs, self.drafts = Turns(self), Jobs(self), Drafts(self)
        self.engine: Worker | None = None
        self.chat: Session | None = None
        self.editing: Editing | None = None
        self.keep_ratio = float(config.compress.keep_ratio)
        """Of the open session."""
        self.room: int | None = None
        """Tokens that the window has left, as far as that is known."""
        self._connect = connect
        self._title = ""
        self._reports: deque[Progress | Notice] = deque()

    def compose(self) -> ComposeResult:
        yield TitleBar()
        with Horizontal(id="body"):
            yield SessionList(id="sessions")
            yield Transcript(id="transcript")
        yield SegmentMap(id="map")
        yield Queue(id="queued")
        yield StatusBar()
        yield Prompt(id="prompt")
        yield Footer(show_command_palette=False)

    # -- events ------------------------------------------------------------------------------------------------------

    def report(self, event: Progress | Notice) -> None:
        """The listener for work outside a turn; any thread may call it, and it never waits."""
        self._reports.append(event)

    def drain(self) -> None:
        """Show what the listener was told, and a title that the model gave meanwhile."""
        while self._reports:
            self.show_event(self._reports.popleft())
        if self.chat and self.chat.title != self._title:
            self._title = self.chat.title
            self.jobs.beside(self.show_sessions())

    def show_event(self, event: Progress | Notice) -> None:
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
        self.status.say(self.jobs.told)

    def note(self, text: str, kind: str = "") -> Note:
        """Add a line of the program to the transcript; `kind` is a class of the stylesheet.

        What the user asked for is gone to; a notice, or the line of a turn, leaves who reads elsewhere alone.
        """
        last = self.transcript.last_reply()[:1]
        if kind == "-error" and isinstance(last[0] if last else None, Note) and last[0].has_class(kind):
            last[0].remove()  # only the newest of errors in a row matters
        note = Note(text, classes=kind)
        self.transcript.mount(note)
        if kind in ("", "-error"):
            self.jobs.beside(self.transcript.to_end())
        return note

    # -- the session -------------------------------------------------------------------------------------------------

    def connected(self) -> Worker:
        """The worker; for threads only, for making it takes seconds."""
        if self.engine is None:
            self.engine = self._connect(self.report)
        return self.engine

    def session(self) -> Session:
        """The open session; InputError if there is none."""
        if self.chat is None:
            raise InputError("no session is open; /new begins one, /resume NAME goes on with one")
        return self.chat

    @property
    def session_name(self) -> str:
        """Of the open session; empty if there is none."""
        return self.chat.name if self.chat else ""

    async def open_session(self, make: Callable[[Worker], Session], same: bool = False) -> None:
        """Go over to the session that `make` opens; if that fails, the present one stays.

        What is in the input stays behind as the draft of the session it was written in, unless that is the `same`.
        """
        engine = await to_thread(self.connected)
        await self.show_sessions()
        before = None if same else self.chat
        left = self.drafts.put_aside() if before else ""
        try:
            chat = await self._opened(engine, make, before, left)
        except BaseException:
            self.drafts.aside = ""
            self.give_back(left)
            raise
        self.chat, self.room = chat, None
        self._title = chat.title
        self.title_bar.measure(0, chat.context_window, 0)
        await self.show_sessions()
        await self.show_history(chat)
        if not same:
            await self.drafts.bring_back(chat)
        self.jobs.beside(self.turns.measure(chat))
        if before is not None:
            await to_thread(before.close)

    async def _opened(
        self, engine: Worker, make: Callable[[Worker], Session], before: Session | None, left: str
    ) -> Session:
        """The session that `make` opens, once what is `left` unsent in the one `before` it is saved there."""
        chat = await to_thread(make, engine)
        try:
            if before is not None:
                await self.drafts.leave(before, left)
        except KVChatError:
            await to_thread(chat.close)
            raise
        return chat

    async def prepare(self, model: str) -> None:
        """See to it that the built-in model is here if `model` names it: the user is asked before it is downloaded.

        Raises:
            ModelError: the user would rather not.
        """
        from kvchat.builtin import is_missing

        if await to_thread(is_missing, model):
            from kvchat.tui.first_run import FirstRun

            if not await self.app.push_screen_wait(FirstRun()):
                raise ModelError("there is no model yet, so nobody can answer; /new asks once more, /quit leaves")

    async def show_sessions(self) -> None:
        """Read the list of sessions anew, and name the open one at the top."""
        engine = await to_thread(self.connected)
        infos = await to_thread(engine.sessions)
        self.sessions.show(infos, self.session_name)
        if self.chat:
            title = next((info.title for info in infos if info.name == self.chat.name), "")
            self.title_bar.name_session(self.chat.name, self.chat.model, title)

    async def info(self) -> SessionInfo:
        """What the store says of the open session."""
        engine, name = await to_thread(self.connected), self.session().name
        for info in await to_thread(engine.sessions):
            if info.name == name:
                return info
        raise SessionNotFound(f"no session named {name!r}")

    async def show_history(self, chat: Session) -> None:
        """Show the messages of the path anew."""
        messages = await to_thread(chat.messages)
        await self.transcript.show(messages)
        asked = [message.content for message in messages if message.role == "user"]
        self.prompt.forget()
        self.prompt.remember(asked)
        if not asked:
            self.note("A new session. Type a message and press Enter; /help lists commands.")
        elif (reason := getattr(messages[-1], "finish_reason", None)) in CUT:
            self.note(CUT[reason])

    # -- what changes it ---------------------------------------------------------------------------------------------

    def switch(self, message: str) -> None:
        """Begin to go to the branch of this message."""
        chat = self.session()

        async def job() -> None:
            await to_thread(chat.switch, message)
            await self.show_history(chat)
            self.jobs.beside(self.turns.measure(chat))

        self.jobs.begin("going to the branch", job())

    def attach(self, title: str, text: str) -> None:
        """Begin to take in a document."""
        chat = self.session()

        async def job() -> None:
            self.jobs.answering = True
            attached = await to_thread(chat.attach, title, text)
            await self.show_history(chat)
            self.note(f"{title} is attached, {attached.tokens} tokens, {attached.computed} computed")
            self.jobs.beside(self.turns.measure(chat))

        self.jobs.begin("reading", job())

    async def take_over(self, for_file: Mapping[str, Any], for_session: Mapping[str, Any]) -> None:
        """Keep changed settings in config.toml, and with the session."""
        if for_file:
            from kvchat.config_file import save

            self.config = await to_thread(save, self.config, for_file)
            self.post_message(self.Changed(self.config))
        if for_session:
            chat = self.session()
            await to_thread(chat.configure, for_session)
            await self.turns.measure(chat)

    # -- what a chat screen adds -------------------------------------------------------------------------------------

    def after_job(self, is_done: bool) -> None:
        """The job ended, well or not."""

    def end_editing(self) -> None:
        """Leave the message that is being edited, if one is, and put back what was in the input."""

    def give_back(self, text: str) -> None:
        """Put `text` into the input, in front of what has been typed since."""
        if text:
            self.prompt.give_back(text)
