"""What stands in a transcript, shown or not: messages as the store has them, and widgets that came to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from textual import events
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from kvchat.tui.answer import Answer
from kvchat.tui.plain_text import Note, Plain

if TYPE_CHECKING:
    from kvchat.store.store import Message


class Question(Plain):
    """What the user said; `turn` counts from 1."""

    def __init__(self, text: str, *, turn: int = 0) -> None:
        super().__init__(text)
        self.turn = turn


class MoreBelow(Static):
    """Says that the end is out of sight; a click goes there. It is no place in the transcript."""

    DEFAULT_CSS = """
    MoreBelow {
        layer: hint;
        dock: bottom;
        width: 100%;
        height: 1;
        text-align: center;
        background: $panel;
        color: $text-muted;
    }
    """

    def __init__(self) -> None:
        super().__init__("↓ more below · Ctrl+End", markup=False)

    def on_click(self, event: events.Click) -> None:
        event.stop()
        if isinstance(self.parent, VerticalScroll):
            self.parent.action_scroll_end()


@dataclass(slots=True, eq=False)
class Item:
    """One place in the transcript. `widget` is there while it is mounted; `make` makes another one."""

    kind: type[Widget]
    text: str
    turn: int
    make: Callable[[], Widget] | None
    widget: Widget | None = None

    def mounted(self) -> Widget:
        """The widget, made if there is none."""
        if self.widget is None:
            assert self.make
            self.widget = self.make()
        return self.widget

    def refresh(self) -> None:
        """Take over what its widget says now."""
        if isinstance(self.widget, (Question, Answer, Note)):
            self.text = self.widget.text
            self.make = _maker(self.widget)
            if not isinstance(self.widget, Note):
                self.widget.turn = self.turn

    @property
    def can_leave(self) -> bool:
        """Nothing is lost when its widget is removed."""
        return self.make is not None and not (isinstance(self.widget, Answer) and self.widget.is_growing)


def item_of(widget: Widget, turn: int) -> Item:
    """The place of a widget that somebody made, in or after a turn."""
    item = Item(type(widget), "", turn, None, widget)
    item.refresh()
    return item


def items_of(messages: Iterable[Message]) -> Iterator[Item]:
    """The places of messages. A system message without text is the template's own opening."""
    turn = 0
    for message in messages:
        text = message.content
        if message.role == "user":
            turn += 1
            yield Item(Question, text, turn, partial(Question, text, turn=turn))
        elif message.role == "assistant":
            yield Item(Answer, text, turn, partial(Answer, text, turn=turn))
        elif text:
            said = f"system: {text}"
            yield Item(Note, said, turn, partial(Note, said))


def _maker(widget: Question | Answer | Note) -> Callable[[], Widget] | None:
    """What makes the same widget again; None if it is of a kind that nobody here knows."""
    if type(widget) is Note:
        return partial(Note, widget.text, classes=" ".join(widget.classes))
    if type(widget) is Question:
        return partial(Question, widget.text, turn=widget.turn)
    if type(widget) is Answer and not widget.is_growing:
        return partial(Answer, widget.text, turn=widget.turn)
    return None
