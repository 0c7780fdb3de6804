"""Small questions over another screen: yes or no, and a few words in fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label

from kvchat.terminal import neutralise
from kvchat.tui.rows import one_line


class Line(Input):
    """One line to type in; what is pasted into it cannot drive the terminal."""

    def validate_value(self, value: str) -> str:
        return one_line(value)


class YesNo(ModalScreen[bool]):
    """A question that is answered by a key; Escape and the button that is chosen at first say no.

    Args:
        question: one line. detail: what yes does. yes, no: what the buttons say.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "Yes", show=False),
        Binding("n,escape", "answer(False)", "No", show=False),
        Binding("left", "app.focus_previous", show=False),
        Binding("right", "app.focus_next", show=False),
    ]
    AUTO_FOCUS = "#no"
    DEFAULT_CSS = """
    YesNo {
        align: center middle;

        & > Vertical {
            width: 60;
            max-width: 90%;
            height: auto;
            max-height: 90%;
            padding: 1 2;
            border: round $error;
            background: $surface;
        }
        Label { width: 100%; height: auto; max-height: 6; }
        #detail { color: $text-muted; margin-top: 1; }
        Horizontal { height: auto; align-horizontal: right; margin-top: 1; }
        Button { margin-left: 2; }
    }
    """

    def __init__(self, question: str, detail: str = "", yes: str = "Yes", no: str = "No") -> None:
        super().__init__()
        self._texts, self._buttons = (question, detail), (yes, no)

    def compose(self) -> ComposeResult:
        (question, detail), (yes, no) = self._texts, self._buttons
        with Vertical():
            yield Label(one_line(question), markup=False)
            yield Label(neutralise(detail), id="detail", markup=False)
            with Horizontal():
                yield Button(f"{yes} (y)", id="yes", variant="error", compact=True)
                yield Button(f"{no} (n)", id="no", compact=True)

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, is_yes: bool) -> None:
        self.dismiss(is_yes)


class Fields(ModalScreen[tuple[str | None, ...] | None]):
    """A few lines to fill in. Enter gives them back, None for each that was left as it was; Escape gives None.

    Args:
        heading: what they are about. fields: what each is called, and what it says now.
        hint: how to fill them in.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel", show=False)]
    DEFAULT_CSS = """
    Fields {
        align: center middle;

        & > Vertical {
            width: 70;
            max-width: 95%;
            height: auto;
            padding: 1 2;
            border: round $accent;
            border-title-color: $text-accent;
            background: $surface;
        }
        Label { width: 100%; color: $text-muted; }
        Line { margin-bottom: 1; }
    }
    """

    def __init__(self, heading: str, fields: Sequence[tuple[str, str]], hint: str) -> None:
        super().__init__()
        self._heading, self._hint = heading, hint
        self._names = [name for name, _ in fields]
        # Shown without control characters, which is no reason to take them out of what is stored.
        self._before = [one_line(value) for _, value in fields]

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = self._heading
            for name, value in zip(self._names, self._before, strict=True):
                yield Label(name, markup=False)
                yield Line(value, select_on_focus=False, compact=True)
            yield Label(self._hint, markup=False)

    @on(Input.Submitted)
    def _submitted(self) -> None:
        now = [line.value for line in self.query(Line)]
        self.dismiss(tuple(None if new == old else new for new, old in zip(now, self._before, strict=True)))
