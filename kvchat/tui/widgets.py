"""What the chat screen is made of. Widgets show values and post messages; none of them knows the engine.

Text of the user, the model and the store is shown as it is: never as Textual markup, and without control characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, ClassVar

from markdown_it import MarkdownIt
from textual import events, on
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message as Announcement
from textual.widget import Widget
from textual.widgets import Button, Markdown, Static, TextArea

from kvchat.terminal import neutralise
from kvchat.tui.session_list import SessionList, age

if TYPE_CHECKING:
    from kvchat.store import Message

__all__ = ["Answer", "Note", "Plain", "Prompt", "Question", "SessionList", "Transcript", "age"]


class Plain(Static):
    """Text that is shown literally."""

    def __init__(self, text: str = "", *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(neutralise(text), markup=False, id=id, classes=classes)
        self.text = text

    def show(self, text: str) -> None:
        self.text = text
        self.update(neutralise(text))


class Question(Plain):
    """What the user said."""


class Note(Plain):
    """A line of the program: help, a notice, an error, the numbers of a turn."""


class Answer(Markdown):
    """What the model said. It is only appended to, then replaced once by the whole text.

    Textual 8.2 breaks an open code fence when `update` of a partial text is followed by `append`.
    """

    def __init__(self, text: str | None = None) -> None:
        super().__init__(None if text is None else neutralise(text), parser_factory=_parser, open_links=False)
        self.text = text or ""

    async def grow(self, piece: str) -> None:
        self.text += piece
        await self.append(neutralise(piece))

    async def finish(self, text: str) -> None:
        self.text = text
        await self.update(neutralise(text))


def _parser() -> MarkdownIt:
    # With HTML on, Textual leaves out whatever looks like a tag, such as <think>.
    return MarkdownIt("gfm-like", {"html": False})


class Transcript(VerticalScroll):
    """The conversation, newest at the bottom; it follows the end until the user scrolls away."""

    NUM_SHOWN = 50
    """Messages shown; the others wait behind a button at the top."""
    NUM_AT_ONCE = 4

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, can_focus=False)
        self._earlier: list[Message] = []

    def on_mount(self) -> None:
        self.anchor()

    async def add(self, *widgets: Widget) -> None:
        """Mount `widgets` at the end and go there."""
        await self.mount_all(widgets)
        self.anchor()

    def last_reply(self) -> list[Widget]:
        """What stands below the last question."""
        return list(takewhile(lambda child: not isinstance(child, Question), reversed(self.children)))

    async def show(self, messages: Sequence[Message]) -> None:
        """Replace everything with the newest of `messages`."""
        # A system message without text is the template's own opening.
        self._earlier = [message for message in messages if message.content or message.role != "system"]
        await self.remove_children()
        await self._mount_earlier()
        self.anchor()

    @on(Button.Pressed, "#earlier")
    async def show_earlier(self) -> None:
        top = next((child for child in self.children if not isinstance(child, Button)), None)
        await self.query(Button).remove()
        await self._mount_earlier()
        if top is not None:
            self.call_after_refresh(self.scroll_to_widget, top, animate=False, top=True)

    async def _mount_earlier(self) -> None:
        self._earlier, page = self._earlier[: -self.NUM_SHOWN], self._earlier[-self.NUM_SHOWN :]
        widgets = [_widget(message) for message in page]
        # A few at a time, the newest first: keys are served in between.
        for end in range(len(widgets), 0, -self.NUM_AT_ONCE):
            await self.mount_all(widgets[max(0, end - self.NUM_AT_ONCE) : end], before=0 if self.children else None)
        if self._earlier:
            label = f"show earlier ({len(self._earlier)} messages)"
            await self.mount(Button(label, id="earlier", compact=True), before=0)


def _widget(message: Message) -> Widget:
    if message.role == "assistant":
        return Answer(message.content)
    return Question(message.content) if message.role == "user" else Note(f"system: {message.content}")


class Prompt(TextArea):
    """The message in the making. Enter sends, Ctrl+J (in some terminals also Shift+Enter) begins a new line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send", show=False, id="prompt.send"),
        Binding("ctrl+j,shift+enter", "newline", "New line", show=False, id="prompt.newline"),
        Binding("pageup", "screen.scroll(-1)", show=False, id="page_up"),
        Binding("pagedown", "screen.scroll(1)", show=False, id="page_down"),
    ]

    @dataclass
    class Submitted(Announcement):
        """The user pressed Enter on a message that is not blank."""

        text: str

    def __init__(self, *, id: str | None = None) -> None:
        hint = "Message, or /help; Ctrl+J begins a new line"
        super().__init__(id=id, placeholder=hint, highlight_cursor_line=False, show_line_numbers=False, compact=True)

    def on_key(self, event: events.Key) -> None:
        # Without this, TextArea takes Enter as text before bindings are looked at.
        if event.key == "enter":
            event.prevent_default()

    def action_submit(self) -> None:
        if text := self.text.strip():
            self.clear()
            self.post_message(self.Submitted(text))

    def action_newline(self) -> None:
        self.insert("\n")

    def give_back(self, text: str) -> None:
        """Put an unsent message in front of whatever has been typed since."""
        self.text = f"{text}\n{self.text}" if self.text else text
        self.move_cursor(self.document.end)
