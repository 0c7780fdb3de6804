"""The conversation on the screen: keys move a mark from message to message, and act on the marked one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from textual.binding import Binding, BindingType
from textual.message import Message as Announcement
from textual.widget import Widget

from kvchat.errors import InputError
from kvchat.terminal import neutralise
from kvchat.tui.answer import Answer
from kvchat.tui.items import Item, MoreBelow, Question
from kvchat.tui.splitting import code_blocks
from kvchat.tui.thought import Thought
from kvchat.tui.window import Window

What = Literal["answer", "question", "code"]


class Transcript(Window):
    """Messages and lines of the program. With the focus here, single keys act on the marked message.

    Everything that is copied is neutralised: what is pasted into a terminal could drive it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "mark(-1)", "Message above", show=False, id="transcript.up"),
        Binding("down,j", "mark(1)", "Message below", show=False, id="transcript.down"),
        Binding("e", "choose('edit')", "Edit the message", show=False, id="transcript.edit"),
        Binding("f", "choose('fork')", "Fork behind the turn", show=False, id="transcript.fork"),
        Binding("i,enter", "choose('inspect')", "Inspect the turn", show=False, id="transcript.inspect"),
        Binding("c,y", "copy('answer')", "Copy the answer", show=False, id="transcript.copy"),
        Binding("q", "copy('question')", "Copy the question", show=False, id="transcript.question"),
        *(Binding(f"{n}", f"copy('code', {n})", f"Copy code block {n}", show=False) for n in range(1, 10)),
        Binding("t", "thoughts", "Open or close the reasoning", show=False, id="transcript.thoughts"),
        Binding("space", "page_down", "Page down", show=False),
        Binding("escape", "leave", "Back to the input", show=False, id="transcript.leave"),
    ]
    DEFAULT_CSS = """
    Transcript:focus > .-marked { background: $boost; border-left: thick $accent; }
    Question { margin: 1 0 1 0; padding: 0 1; border-left: thick $primary; height: auto; }
    """

    @dataclass
    class Chosen(Announcement):
        """The user wants something done about a turn."""

        action: str
        """edit, fork, or inspect."""
        turn: int
        """From 1."""

    @dataclass
    class Left(Announcement):
        """The user wants to write."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._marked: Item | None = None

    @property
    def turn(self) -> int:
        """Of the marked message, or the last one; 0 if there is none."""
        self._sync()
        item = self._present or (self._items[-1] if self._items else None)
        return item.turn if item else 0

    @property
    def _present(self) -> Item | None:
        """What is marked, if it is still there and the user is here."""
        return self._marked if self.has_focus and self._marked in self._items else None

    def last_reply(self) -> list[Widget]:
        """What stands below the last question, the newest first; of what is mounted."""
        reply: list[Widget] = []
        for child in reversed(self.children):
            if isinstance(child, Question):
                break
            if not isinstance(child, MoreBelow):
                reply.append(child)
        return reply

    # -- the mark ----------------------------------------------------------------------------------------------------

    def action_mark(self, step: int) -> None:
        """Mark the next message in a direction; the first time, the last one in sight."""
        self._sync()
        window = [item for item in self._items[self._first : self._last] if item.kind in (Question, Answer)]
        if not window:
            return
        if self._marked in window:
            place = max(0, min(len(window) - 1, window.index(self._marked) + step))
        else:
            seen = [place for place, item in enumerate(window) if self._is_seen(item)]
            place = seen[-1] if seen else len(window) - 1
        self._mark(window[place])

    def _is_seen(self, item: Item) -> bool:
        top, bottom = self.scroll_y, self.scroll_y + self.page
        return any(widget is item.widget and y < bottom and end > top for widget, y, end in self._places)

    def _mark(self, item: Item | None) -> None:
        if self._marked is not None and self._marked.widget is not None:
            self._marked.widget.remove_class("-marked")
        self._marked = item
        if item is not None and item.widget is not None:
            item.widget.add_class("-marked")
            self.scroll_to_widget(item.widget, animate=False)

    def action_leave(self) -> None:
        self._mark(None)
        self.post_message(self.Left())

    def action_choose(self, action: str) -> None:
        if turn := self.turn:
            self.post_message(self.Chosen(action, turn))

    def action_thoughts(self) -> None:
        """Open or close the reasoning of the marked answer, or of the last one."""
        item = self._said(Answer)
        if item is not None and isinstance(item.widget, Answer):
            item.widget.toggle_thoughts()

    def toggle_thoughts(self) -> None:
        """Open all reasoning, that which is still to come too, or close all of it."""
        self.toggle_class("-thoughts")
        for thought in self.query(Thought):
            thought.open(self.has_class("-thoughts"))

    # -- copying -----------------------------------------------------------------------------------------------------

    def copy(self, what: What = "answer", number: int | None = None) -> str:
        """Put the marked or the last answer, its question, or one of its blocks of code on the clipboard (OSC 52).

        Args:
            number: which block of code, from 1; None = the last one.

        Returns:
            What was copied.

        Raises:
            InputError: there is none.
        """
        item = self._said(Question if what == "question" else Answer)
        if item is None or not item.text:
            raise InputError(f"there is no {'question' if what == 'question' else 'answer'} to copy")
        text = neutralise(item.text)
        if what == "code":
            blocks = code_blocks(text)
            if not 1 <= (number or 1) <= len(blocks):
                raise InputError(f"that answer has {len(blocks)} blocks of code")
            text = blocks[(number or len(blocks)) - 1]
        self.app.copy_to_clipboard(text)
        return text

    def action_copy(self, what: What, number: int | None = None) -> None:
        try:
            text = self.copy(what, number)
        except InputError as error:
            self.notify(str(error), severity="warning", markup=False)
        else:
            self.notify(f"copied {len(text)} characters", markup=False)

    def _said(self, kind: type[Question] | type[Answer]) -> Item | None:
        """The question or the answer of the marked turn; without a mark the last one."""
        self._sync()
        present = self._present
        if present is not None and present.kind is kind:
            return present
        found = (item for item in reversed(self._items) if item.kind is kind)
        return next((item for item in found if present is None or item.turn == present.turn), None)
