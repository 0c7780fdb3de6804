"""The help screen: keys as they are now, commands, and what the figures and colours of the other screens mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from textual import getters, on
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.keys import format_key
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, Static

from kvchat.segment_map import GLYPHS
from kvchat.tui.asking import Line
from kvchat.tui.legend import BRANCHES, METERS, TURN_LINE, TYPING, Row, Section, layout
from kvchat.tui.map import STYLES
from kvchat.tui.rows import one_line

if TYPE_CHECKING:
    from kvchat.tui.commands import Command

SPELLED = {"pageup": "PageUp", "pagedown": "PageDown", "backspace": "Backspace"}


class HelpScreen(ModalScreen[None]):
    """All that can be pressed and typed, and what is to be seen; a word narrows it down.

    Args:
        bindings: those of the screen below; its keys are shown as they are now, whatever they were to begin with.
        commands: slash commands by name.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1", "dismiss(None)", "Close", id="help.close"),
        Binding("up", "scroll(-1)", "Scroll", show=False),
        Binding("down", "scroll(1)", "Scroll", show=False),
        Binding("pageup", "page(-1)", "Page up", id="help.page_up", priority=True),
        Binding("pagedown", "page(1)", "Page down", id="help.page_down", priority=True),
        Binding("ctrl+home", "scroll(-1000000)", "Beginning", show=False, priority=True),
        Binding("ctrl+end", "scroll(1000000)", "End", show=False, priority=True),
    ]
    AUTO_FOCUS = "#filter"
    DEFAULT_CSS = """
    HelpScreen {
        background: $background;

        #filter {
            height: 3;
            padding: 0 1;
            background: $background;
            border: round $accent;
            border-title-color: $text-accent;
        }
        #all { height: 1fr; padding: 0 2; scrollbar-size-vertical: 1; }
        #rows { width: 100%; height: auto; }
    }
    """

    line = getters.query_one("#filter", Line)
    all = getters.query_one("#all", VerticalScroll)

    def __init__(self, bindings: Iterable[BindingType], commands: Mapping[str, Command]) -> None:
        super().__init__()
        self._own, self._commands = [*Binding.make_bindings(bindings)], commands
        self._sections: list[Section] = []

    def compose(self) -> ComposeResult:
        line = Line(placeholder="type a word to find it here", id="filter")
        line.border_title = "help"
        yield line
        with VerticalScroll(id="all", can_focus=False):
            yield Static("", id="rows", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        below = self.app.screen_stack[-2].active_bindings
        self._sections = [
            Section("Keys", (*key_rows(self._own, below), *TYPING)),
            Section("Commands", tuple(command_rows(self._commands))),
            METERS,
            TURN_LINE,
            Section("The map", tuple(map_rows())),
            BRANCHES,
            Section("Keys while typing", tuple(other_rows(self._own, below))),
        ]
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    @on(Input.Changed, "#filter")
    def _draw(self) -> None:
        """Lay out what is asked for, for the columns there are."""
        width = self.all.scrollable_content_region.width or 76
        found = layout(self._sections, self.line.value.lower().split(), width)
        self.query_one("#rows", Static).update(found or Content("Nothing here has these words."))

    def action_scroll(self, lines: int) -> None:
        self.all.scroll_relative(y=lines, animate=False)

    def action_page(self, pages: int) -> None:
        self.all.scroll_relative(y=pages * max(1, self.all.size.height - 2), animate=False)


def key_rows(own: Iterable[Binding], active: Mapping[str, ActiveBinding]) -> Iterator[Row]:
    """What each binding does, and the keys that do it now; another widget may have taken them."""
    told: dict[tuple[str, str], str] = {}
    for one in own:
        told[_name(one)] = told.get(_name(one)) or one.description
    for name, description in told.items():
        pressed = [key for key, live in active.items() if _name(live.binding) == name]
        if description and pressed:
            yield _row(pressed, description)
        elif description:
            yield Row(Content.styled("—", "$foreground-muted"), f"{one_line(description)} (no key does it just now)")


def other_rows(own: Iterable[Binding], active: Mapping[str, ActiveBinding]) -> Iterator[Row]:
    """The rest of the keys that can be pressed: those of the input that has the focus."""
    names = {_name(one) for one in own}
    rest: dict[tuple[str, str], list[str]] = {}
    for key, live in active.items():
        if live.binding.description and not live.binding.system and _name(live.binding) not in names:
            rest.setdefault((live.binding.action, live.binding.description), []).append(key)
    for (_, description), pressed in rest.items():
        yield _row(pressed, description)


def command_rows(commands: Mapping[str, Command]) -> Iterator[Row]:
    """Each command as it is typed."""
    for name, command in commands.items():
        usage = f"/{name} {command.argument}".strip()
        yield Row(Content.styled(one_line(usage), "$text-accent"), one_line(command.help))


def map_rows() -> Iterator[Row]:
    """The signs of the map of turns, in its colours."""
    for glyph, style, meaning in GLYPHS.values():
        yield Row(Content.styled(glyph * 3, STYLES[style]), meaning)
    yield Row(
        Content.styled("^", STYLES["mark"]), "brought back for the newest answer, because the question concerned it"
    )
    yield Row(Content("a b c"), "turns about one thing have one letter; its words stand below the map")


def _row(pressed: Iterable[str], description: str) -> Row:
    return Row(Content.styled(", ".join(map(spelled, pressed)), "bold $text-accent"), one_line(description))


def _name(binding: Binding) -> tuple[str, str]:
    return (binding.id, "") if binding.id else ("", binding.action)


def spelled(key: str) -> str:
    """A key as it is written on keyboards: ctrl+n is Ctrl+N, question_mark is ?."""
    *modifiers, last = one_line(key).split("+")
    last = SPELLED.get(last) or (last.capitalize() if last.isalnum() else format_key(last))
    return "+".join([*(modifier.capitalize() for modifier in modifiers), last])
