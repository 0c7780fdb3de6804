"""One setting on the screen: its value to change, where that comes from and goes to, and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.widget import Widget
from textual.widgets import Input, Label, Select, Static, Switch

from kvchat.meanings import MEANINGS, NAMES
from kvchat.tui.asking import Line
from kvchat.tui.edits import Edits
from kvchat.tui.rows import one_line
from kvchat.values import annotation

PLACES = {"session": "this session", "file": "config.toml"}


class Choice(Select[str], inherit_bindings=False):
    """One of a few words. Up and Down go on to other settings."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,space", "show_overlay", "Choose", show=False)]


class PlaceSwitch(Static, can_focus=True):
    """Where the value goes; if there is a choice, Enter, Space or a click takes the other."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter,space", "turn", "Other place", show=False)]

    class Turned(Message):
        """The other place was asked for."""

    def action_turn(self) -> None:
        self.post_message(self.Turned())

    def on_click(self, _: events.Click) -> None:
        self.action_turn()


class SettingRow(Widget):
    """A setting; what is done to it goes into `edits`."""

    DEFAULT_CSS = """
    SettingRow {
        layout: grid;
        grid-size: 4 2;
        grid-columns: 20 1fr 14 15;
        grid-rows: 1 auto;
        height: auto;
        padding: 0 1;
        border-left: blank;

        &:focus-within { border-left: thick $accent; background: $boost; }
        &:focus-within .name { text-style: bold; color: $text-accent; }
        &.-changed .name { text-style: bold; }
        &.-changed .from { color: $text-success; }
        &.-wrong .told { color: $text-error; }
        &.-remark .told { color: $text-warning; }

        .name { width: 100%; height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
        .from { width: 100%; height: 1; color: $text-muted; text-align: right; text-wrap: nowrap; }
        .told { column-span: 4; width: 100%; height: 1; color: $text-muted; }
        .told { text-wrap: nowrap; text-overflow: ellipsis; }
        &:focus-within .told { height: auto; text-wrap: wrap; }
        PlaceSwitch {
            width: 14; height: 1; margin-left: 1; text-wrap: nowrap; color: $text-muted;
            &.-choice { color: $text-primary; }
            &:focus { color: $foreground; background: $panel; text-style: bold; }
        }
        Input { width: 100%; height: 1; background: $surface; }
        Input:focus { background: $panel; }
        Choice { width: 100%; height: 1; }
        Choice SelectCurrent { height: 1; background: $surface; }
        Choice:focus SelectCurrent { background: $panel; }
        Switch { width: 8; height: 1; border: none; padding: 0; background: $surface; }
        Switch:focus { border: none; background: $panel; }
    }
    """

    @dataclass
    class Edited(Message):
        """Something else was typed, or is to go elsewhere."""

        key: str

    def __init__(self, key: str, edits: Edits) -> None:
        super().__init__()
        self.key, self.edits = key, edits
        self._shown: tuple[str | bool, ...] = ()

    def compose(self) -> ComposeResult:
        yield Label(self.key.partition(".")[2], classes="name", markup=False)
        yield self._editor()
        yield Label("", classes="from", markup=False)
        yield PlaceSwitch("", markup=False)
        yield Label("", classes="told", markup=False)

    def _editor(self) -> Widget:
        kind, text = annotation(self.key), self.edits.text(self.key)
        if kind is bool:
            return Switch(_is_on(text), animate=False)
        if get_origin(kind) is Literal:
            return Choice.from_values(get_args(kind), value=text, allow_blank=False, compact=True)
        names = NAMES.get(self.key) or (tuple(sorted(self.app.available_themes)) if self.key == "tui.theme" else ())
        suggester = SuggestFromList(names, case_sensitive=False) if names else None
        return Line(text, suggester=suggester, compact=True, placeholder="none", select_on_focus=False)

    def on_mount(self) -> None:
        can_turn = len(self.edits.places(self.key)) > 1
        switch = self.query_one(PlaceSwitch)
        switch.can_focus = can_turn
        switch.set_class(can_turn, "-choice")
        self.show()

    # -- what is shown -----------------------------------------------------------------------------------------------

    @property
    def editor(self) -> Widget:
        """What takes the keys that change the value."""
        return self.query("Input, Choice, Switch").first()

    def show(self) -> None:
        """Show origin, place, problem, remark and meaning as they are now."""
        problem, remark = self.edits.problem(self.key), self.edits.remark(self.key)
        origin, place = self.edits.origin(self.key), PLACES[self.edits.place(self.key)]
        is_changed = self.edits.is_changed(self.key)
        now = (problem, remark, origin, place, is_changed)
        if now == self._shown or not self.children:  # it is told of other rows before it has its own parts
            return
        self._shown = now
        self.set_class(bool(problem), "-wrong")
        self.set_class(bool(remark) and not problem, "-remark")
        self.set_class(is_changed, "-changed")
        origin = "variable" if origin.startswith("KVCHAT_") else origin
        self.query_one(".from", Label).update("changed" if is_changed else origin)
        if len(self.edits.places(self.key)) > 1:
            self.query_one(PlaceSwitch).update(f"→ {place}")
        prefix = f"setting {self.key}: "
        self.query_one(".told", Label).update(one_line(problem.removeprefix(prefix) or remark or MEANINGS[self.key]))

    def show_value(self) -> None:
        """Show what the value is after it was reset, or goes elsewhere."""
        editor, text = self.editor, self.edits.text(self.key)
        if isinstance(editor, Switch):
            editor.value = _is_on(text)
        elif isinstance(editor, Choice | Input):
            editor.value = text
        self.show()

    # -- what is done ------------------------------------------------------------------------------------------------

    @on(Input.Changed)
    @on(Select.Changed)
    @on(Switch.Changed)
    def _typed(self, event: Input.Changed | Select.Changed | Switch.Changed) -> None:
        event.stop()
        value: Any = event.value
        self.edits.put(self.key, ("true" if value else "false") if isinstance(value, bool) else str(value))
        self.post_message(self.Edited(self.key))

    @on(PlaceSwitch.Turned)
    def _turned(self, event: PlaceSwitch.Turned) -> None:
        event.stop()
        self.turn()

    def turn(self) -> None:
        """Let the value go to the other place."""
        self.edits.turn(self.key)
        self.show_value()
        self.post_message(self.Edited(self.key))

    def reset(self) -> None:
        """Undo the change, or take away what is set."""
        self.edits.reset(self.key)
        self.show_value()
        self.post_message(self.Edited(self.key))


def _is_on(text: str) -> bool:
    return text == "true"
