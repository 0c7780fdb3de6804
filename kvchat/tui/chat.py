"""The chat screen's keys and commands: what is typed goes to the session, is queued, or edits a turn."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from textual import events, on
from textual.binding import Binding, BindingType
from textual.widgets import TextArea

from kvchat.errors import InputError, KVChatError
from kvchat.events import Listener
from kvchat.terminal import neutralise
from kvchat.tui.acts import Acts
from kvchat.tui.commands import COMMANDS, parse
from kvchat.tui.items import Question
from kvchat.tui.map import SegmentMap
from kvchat.tui.prompt import Prompt
from kvchat.tui.proposals import completer
from kvchat.tui.session_list import SessionList
from kvchat.tui.session_screen import Editing, SessionScreen
from kvchat.tui.shows import Shows
from kvchat.tui.transcript import Transcript

if TYPE_CHECKING:
    from textual.widgets import Markdown

    from kvchat.config import Config
    from kvchat.worker import Worker

NARROW = 96
"""Columns below which the session list is shown only on request."""


class Commands(Acts, Shows):
    """All of what slash commands do."""

    def run(self, line: str) -> None:
        """Run one line that begins with a slash.

        Raises:
            InputError: it cannot be run; the message says why.
        """
        name, argument = parse(line)
        if self.screen.jobs.busy and not COMMANDS[name].anytime:
            raise InputError(f"/{name} has to wait until the model is idle; Escape stops an answer")
        getattr(self, f"do_{name}")(argument)


class ChatScreen(SessionScreen):
    """The program's main screen.

    Args:
        connect: makes the worker; called in a thread, with the listener for work outside a turn.
        config: all settings.
        session: the session to open; None = the last one.
        how: `system`, `model`, `rebuild` of `Worker.open`, for that session.
    """

    AUTO_FOCUS = "#prompt"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", id="stop"),
        Binding("ctrl+n", "command('/new')", "New", id="new"),
        Binding("ctrl+r", "command('/sessions')", "Sessions", id="picker"),
        # The input has these for itself.
        Binding("ctrl+e", "command('/edit')", "Edit", id="edit", priority=True),
        Binding("ctrl+y", "command('/copy')", "Copy the answer", id="copy", show=False, priority=True),
        Binding("f1", "command('/help')", "Help", id="help"),
        Binding("f2", "command('/settings')", "Settings", id="settings", show=False),
        Binding("f3,ctrl+g", "command('/map')", "Map", id="map"),
        Binding("f4", "command('/inspect')", "Inspect the last turn", id="inspect", show=False),
        Binding("f5", "command('/branches')", "Branches", id="branches", show=False),
        Binding("f6", "thoughts", "Open or close all reasoning", id="thoughts", show=False, priority=True),
        Binding("f8", "command('/retry')", "Answer again", id="retry", show=False),
        Binding("f9", "command('/continue')", "Continue the answer", id="continue", show=False),
        Binding("ctrl+t", "command('/attach')", "Attach a file", id="attach", show=False),
        Binding("ctrl+l", "list", "Go to the list of sessions", id="sessions", show=False),
        Binding("ctrl+home", "to_beginning", "Go to the first message", id="first_message", show=False),
        Binding("ctrl+end", "to_end", "Go to the last message", id="last_message", show=False),
        Binding("ctrl+up", "keep(1)", "Keep more", id="keep_more", show=False, priority=True),
        Binding("ctrl+down", "keep(-1)", "Keep less", id="keep_less", show=False, priority=True),
    ]

    def __init__(
        self, connect: Callable[[Listener], Worker], config: Config, session: str | None = None, **how: Any
    ) -> None:
        super().__init__(connect, config)
        self.commands = Commands(self)
        self._first = session, how

    def on_mount(self) -> None:
        self.set_interval(0.1, self.drain)
        self.sessions.display = self.app.size.width >= NARROW
        self.prompt.completer = completer(self)
        self.jobs.busy = True
        self.jobs.say("starting…")
        # Reading torch keeps the interpreter busy: the screen is drawn before it, with the footer, which comes last.
        self.call_after_refresh(self._start_when_drawn)

    def _start_when_drawn(self) -> None:
        is_drawn = any(key.region for key in self.query("Footer > *"))
        self.call_after_refresh(self._start if is_drawn else self._start_when_drawn)

    def _start(self) -> None:
        self.jobs.busy = False
        self.jobs.begin("starting", self._open_first())

    async def _open_first(self) -> None:
        name, how = self._first
        engine = await to_thread(self.connected)
        infos = await to_thread(engine.sessions)
        found = [info.model for info in infos if name in (None, info.name)]
        await self.prepare(how.get("model") or (found[0] if found else self.config.model.name))
        await self.open_session(lambda engine: engine.open(name, **how))

    # -- what is typed -----------------------------------------------------------------------------------------------

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        if not self.attempt(self._take, event.text):
            self.prompt.give_back(event.text)

    def _take(self, text: str) -> None:
        """Do what is meant by a text that was sent."""
        if self.editing:
            self._say_anew(text)
        elif text.startswith("/") and not text.startswith("//"):
            self.commands.run(text)
        elif self.jobs.busy:
            self.waiting.put(text)
        else:
            self.turns.send(text)

    def attempt(self, act: Callable[..., None], *given: Any) -> bool:
        """Do `act` with what is given; an error becomes a line in the transcript. Whether it was done."""
        try:
            act(*given)
        except KVChatError as error:
            self.note(str(error), "-error")
            return False
        return True

    def after_job(self, is_done: bool) -> None:
        if is_done and self.chat and not self.editing:
            if text := self.waiting.take_first():
                self.drafts.typed()
                self.turns.send(text)
        else:
            self.give_back(self.waiting.take_all())

    @on(TextArea.Changed, "#prompt")
    def _typed(self) -> None:
        self.drafts.typed()

    def keys(self) -> list[BindingType]:
        """All bindings of the chat, as they are without a keymap."""
        return [*Prompt.BINDINGS, *self.BINDINGS, *type(self.app).BINDINGS]

    def ask_for(self, line: str) -> None:
        """Put the beginning of a command into the input, for the user to complete it."""
        self.prompt.put(line)
        self.prompt.focus()

    # -- editing a turn ----------------------------------------------------------------------------------------------

    def begin_editing(self, turn: int, text: str) -> None:
        """Put the message of a turn into the input; Enter says it anew, Escape brings back what was there."""
        self.editing = Editing(turn, self.editing.before if self.editing else self.prompt.text)
        self.prompt.border_title = f"editing turn {turn}"
        self.prompt.border_subtitle = "Enter sends, Escape leaves it as it is"
        self.prompt.put(text)
        self.prompt.focus()

    def _say_anew(self, text: str) -> None:
        if self.jobs.busy:
            raise InputError("an edited message has to wait until the model is idle; Escape leaves it")
        assert self.editing
        turn = self.editing.turn
        self.end_editing()
        self.turns.edit(turn, text)

    def end_editing(self) -> None:
        if self.editing:
            before, self.editing = self.editing.before, None
            self.prompt.border_title = self.prompt.border_subtitle = ""
            self.prompt.put(before)

    def on_click(self, event: events.Click) -> None:
        """A click on a message of the user edits it, unless text was selected in it."""
        clicked = [] if event.widget is None else event.widget.ancestors_with_self
        question = next((node for node in clicked if isinstance(node, Question)), None)
        if question is not None and not self.get_selected_text():
            self.action_command(f"/edit {question.turn}")

    # -- what other widgets want -------------------------------------------------------------------------------------

    @on(Transcript.Chosen)
    def _chosen(self, event: Transcript.Chosen) -> None:
        line = f"/{event.action} {event.turn}"
        if COMMANDS[event.action].needs_argument:
            self.ask_for(f"{line} ")
        else:
            self.action_command(line)

    @on(Transcript.Left)
    def _left(self) -> None:
        self.prompt.focus()

    @on(SegmentMap.Inspect)
    def _inspect(self, event: SegmentMap.Inspect) -> None:
        self.action_command(f"/inspect {event.turn}")

    @on(Prompt.Pasted)
    def _pasted(self, event: Prompt.Pasted) -> None:
        self.attempt(self.commands.do_attach, "", event.text)

    @on(SessionList.OptionSelected)
    def _selected(self, event: SessionList.OptionSelected) -> None:
        self._leave_sessions()
        self.attempt(self.commands.run, f"/resume {self.sessions.names[event.option_index]}")

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        """Show where a link leads, but go nowhere: the model wrote it."""
        # By its name: Markdown is read when the first answer is drawn.
        self.notify(neutralise(event.href), title="link", markup=False)

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_stop(self) -> None:
        """Leave the list, or the edited message; else take back a waiting message; else end the running turn."""
        if self.sessions.has_focus:
            self._leave_sessions()
        elif self.editing:
            self.end_editing()
        elif queued := self.waiting.take_newest():
            self.prompt.give_back(queued)
        elif self.jobs.answering and self.chat:
            self.jobs.say("stopping…")
            self.chat.stop()

    def action_command(self, line: str) -> None:
        self.attempt(self.commands.run, line)

    def action_keep(self, direction: int) -> None:
        self.attempt(self.commands.step_keep, direction)

    def action_thoughts(self) -> None:
        self.transcript.toggle_thoughts()

    def action_list(self) -> None:
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
        self.set_class(event.size.width < NARROW, "-narrow")
        if not self.sessions.has_focus:
            self.sessions.display = event.size.width >= NARROW

    def action_to_beginning(self) -> None:
        self.jobs.beside(self.transcript.to_beginning())

    def action_to_end(self) -> None:
        self.jobs.beside(self.transcript.to_end())

    def action_scroll(self, pages: int) -> None:
        scroll = self.transcript.scroll_page_down if pages > 0 else self.transcript.scroll_page_up
        scroll()
