"""The message in the making: several lines, what was sent before, and completion of commands."""

from __future__ import annotations

import re
from asyncio import to_thread
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import events, on
from textual.binding import Binding, BindingType
from textual.message import Message as Announcement
from textual.widgets import TextArea

from kvchat.terminal import UNSAFE, neutralise
from kvchat.tui.completion import Candidate, Completer
from kvchat.tui.popup import Popup


class Prompt(TextArea):
    """The input. Enter sends, Ctrl+J (in some terminals also Shift+Enter) begins a new line.

    Up on the first row and Down on the last go through what was sent before. A line that begins with a slash is
    completed by `completer`, if there is one: Tab takes what is marked, arrows mark, Escape closes the list.
    """

    MOST_LINES: ClassVar[int] = 40
    MOST_CHARACTERS: ClassVar[int] = 8000
    """A paste of more is not typed in but announced."""
    MOST_SENT: ClassVar[int] = 200
    """Messages that are remembered."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send", show=False, id="prompt.send"),
        Binding("ctrl+j,shift+enter", "newline", "New line", show=False, id="prompt.newline"),
        Binding("pageup", "screen.scroll(-1)", "Page up", show=False, id="page_up"),
        Binding("pagedown", "screen.scroll(1)", "Page down", show=False, id="page_down"),
    ]

    @dataclass
    class Submitted(Announcement):
        """The user pressed Enter on a message that is not blank."""

        text: str

    @dataclass
    class Pasted(Announcement):
        """A text was pasted that is too long to be typed in: it may become an attachment."""

        text: str

    def __init__(self, *, id: str | None = None, completer: Completer | None = None) -> None:
        hint = "Message, or /help; Ctrl+J begins a new line"
        super().__init__(id=id, placeholder=hint, highlight_cursor_line=False, show_line_numbers=False, compact=True)
        self.completer = completer
        self._sent: list[str] = []
        self._place = 0  # among what was sent; at its end stands what is being written
        self._written = ""
        self._popup = Popup(self._clicked)
        self._refused: str | None = None  # the line for which the user closed the list
        self._is_looking = False

    # -- sending -----------------------------------------------------------------------------------------------------

    def action_submit(self) -> None:
        if text := self.text.strip():
            self.remember([text])
            self.clear()
            self.post_message(self.Submitted(text))

    def action_newline(self) -> None:
        self.insert("\n")

    def give_back(self, text: str) -> None:
        """Put an unsent message in front of whatever has been typed since."""
        self.put(f"{text}\n{self.text}" if self.text else text)

    def put(self, text: str) -> None:
        """Write `text` in place of what is there."""
        self.text = text
        self.move_cursor(self.document.end)

    # -- what was sent before ----------------------------------------------------------------------------------------

    def remember(self, texts: Iterable[str]) -> None:
        """Let Up bring back these too, the last one first."""
        for text in texts:
            if text.strip() and self._sent[-1:] != [text]:
                self._sent.append(text)
        del self._sent[: -self.MOST_SENT]
        self._place = len(self._sent)

    def forget(self) -> None:
        """Forget what was sent, as when another session is opened."""
        self._sent.clear()
        self._place = 0

    def action_cursor_up(self, select: bool = False) -> None:
        row = self.wrapped_document.location_to_offset(self.cursor_location).y
        if select or row or not self._go(-1):
            super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        row = self.wrapped_document.location_to_offset(self.cursor_location).y
        if select or row < self.wrapped_document.height - 1 or not self._go(1):
            super().action_cursor_down(select)

    def _go(self, step: int) -> bool:
        """Show another message that was sent; False if there is none in that direction."""
        place = self._place + step
        if not 0 <= place <= len(self._sent):
            return False
        if self._place == len(self._sent):
            self._written = self.text
        self._place = place
        text = self._sent[place] if place < len(self._sent) else self._written
        self._refused = text
        self.put(text)
        return True

    # -- pasting, and what is seen of it -----------------------------------------------------------------------------

    def on_paste(self, event: events.Paste) -> None:
        if event.text.count("\n") + event.text.count("\r") > self.MOST_LINES or len(event.text) > self.MOST_CHARACTERS:
            event.stop()
            event.prevent_default()
            self.post_message(self.Pasted(event.text))

    def get_line(self, line_index: int) -> Text:
        # The text is kept as it is: it may be a message that was said before, or a path.
        return Text(UNSAFE.sub(_sign, self.document.get_line(line_index)), end="", no_wrap=True)

    # -- completion --------------------------------------------------------------------------------------------------

    def on_key(self, event: events.Key) -> None:
        is_listed = bool(self._popup.candidates)
        if is_listed and event.key in ("up", "down"):
            self._popup.move(1 if event.key == "down" else -1)
        elif is_listed and event.key == "escape":
            self._refused = self._line
            self._popup.hide()
        elif is_listed and (event.key == "tab" or (event.key == "enter" and self._takes_marked())):
            self._take(self._popup.marked, send=event.key == "enter")
        elif event.key == "tab" and self._line is not None:
            self._refused = None
            self._look_up()
        else:
            if event.key == "enter":  # else TextArea takes it as text before bindings are looked at
                event.prevent_default()
            return
        event.stop()
        event.prevent_default()

    def _takes_marked(self) -> bool:
        """Whether Enter means the candidate: the user moved to it, or what is typed is no command yet."""
        assert self.completer
        return self._popup.marked.line != self.text and (
            self._popup.is_chosen or not self.completer.is_command(self.text)
        )

    def _take(self, candidate: Candidate, *, send: bool) -> None:
        self._popup.hide()
        self._refused = candidate.line if candidate.is_complete else None
        self.put(candidate.line)
        if send and candidate.is_complete:
            self.action_submit()

    def _clicked(self, candidate: Candidate) -> None:
        self.focus()
        self._take(candidate, send=False)

    @property
    def _line(self) -> str | None:
        """The line to be completed: the cursor is at its end."""
        text = self.text
        if self.completer is None or not text.startswith("/") or "\n" in text or len(text) > 500:
            return None
        return text if self.cursor_location == self.document.end else None

    @on(TextArea.Changed)
    def _changed(self) -> None:
        self._look_up()

    def _look_up(self) -> None:
        line = self._line
        if line is None or line == self._refused or not self.has_focus:
            self._popup.hide()
        elif not self._is_looking:
            self._is_looking = True
            self.run_worker(self._look(line), exit_on_error=False)

    async def _look(self, line: str) -> None:
        """Find the candidates of a line. Only one search runs at a time: a source may have to wait for the engine."""
        assert self.completer
        try:
            found = await to_thread(self.completer.candidates, line)
        finally:
            self._is_looking = False
        if line != self._line:
            self._look_up()
        elif line != self._refused:
            await self._list([one for one in found if one.line != line])

    async def _list(self, found: list[Candidate]) -> None:
        if not found:
            self._popup.hide()
            return
        if not self._popup.is_attached:
            await self.screen.mount(self._popup)
        self._popup.show(found, self.region)

    @on(events.Blur)
    def _left(self) -> None:
        self._popup.hide()


def _sign(match: re.Match[str]) -> str:
    """One character for one, or the cursor would stand elsewhere."""
    return neutralise(match.group())[:1].strip() or "�"
