"""The settings screen: every setting with its meaning, where its value comes from, and where a new one goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

from textual import getters, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Footer, Input, Label, Tab, Tabs
from textual.worker import Worker

from kvchat.config import Config
from kvchat.meanings import MEANINGS
from kvchat.tui.asking import Line, YesNo
from kvchat.tui.edits import Changed, Edits
from kvchat.tui.keymap import checked
from kvchat.tui.setting_row import SettingRow

PAGES = {
    "Model": ("model",),
    "Sampling": ("generate",),
    "Compression": ("compress", "codec"),
    "Recall": ("recall", "episodes"),
    "Store": ("store",),
    "Look": ("tui",),
}
"""What each page shows, by section."""
HINT = "type to find a setting"


class Finder(Line):
    """Takes words to find settings by; while it is empty, Left and Right turn pages."""

    def action_cursor_left(self, select: bool = False) -> None:
        if self.value or not isinstance(self.screen, SettingsScreen):
            super().action_cursor_left(select)
        else:
            self.screen.action_page(-1)

    def action_cursor_right(self, select: bool = False) -> None:
        if self.value or not isinstance(self.screen, SettingsScreen):
            super().action_cursor_right(select)
        else:
            self.screen.action_page(1)


class Page(VerticalScroll, inherit_bindings=False, can_focus=False):
    """The settings of a page. Up and Down are the screen's."""


class SettingsScreen(ModalScreen[Changed | None]):
    """All settings. What it gives back is to be kept; None: nothing.

    Args:
        config: of the program.
        own: the open session's own, by dotted key; None = no session is open.
        page: the one to begin with.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+s", "save", "Save", id="settings.save", priority=True),
        Binding("escape", "leave", "Close", id="settings.close"),
        Binding("ctrl+t", "turn", "Session or file", id="settings.place", priority=True),
        Binding("ctrl+r", "reset", "Reset", id="settings.reset", priority=True),
        Binding("f6", "page(1)", "Next page", id="settings.next"),
        Binding("shift+f6", "page(-1)", show=False, id="settings.previous"),
        Binding("up", "move(-1)", show=False),
        Binding("down", "move(1)", show=False),
        Binding("pageup", "scroll(-1)", show=False),
        Binding("pagedown", "scroll(1)", show=False),
        Binding("ctrl+f", "find", show=False, id="settings.find", priority=True),
    ]
    AUTO_FOCUS = "#find"
    DEFAULT_CSS = """
    SettingsScreen {
        background: $background;

        #find { border: round $accent; border-title-color: $text-accent; padding: 0 1; height: 3; }
        #find:blur { border: round $panel; }
        Tabs { margin: 0 1; }
        #rows { height: 1fr; padding: 0 1; scrollbar-size-vertical: 1; }
        .section { color: $text-muted; text-style: bold; padding: 0 2; margin-top: 1; }
        .section.-first { margin-top: 0; }
        &.-tall SettingRow { margin-bottom: 1; }
        #state { height: 1; padding: 0 3; width: 100%; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
        #state.-wrong { color: $text-error; }
    }
    """

    finder = getters.query_one("#find", Finder)
    tabs = getters.query_one(Tabs)
    shown = getters.query_one(Page)
    state = getters.query_one("#state", Label)

    def __init__(self, config: Config, own: Mapping[str, Any] | None, page: str = "Model") -> None:
        super().__init__()
        self.VERTICAL_BREAKPOINTS = [(0, "-low"), (34, "-tall")]
        self._first = page
        self.edits = Edits(config, own, check_keys)
        self._keys: tuple[str, ...] = ()

    def compose(self) -> ComposeResult:
        finder = Finder(placeholder=HINT, id="find")
        finder.border_title = "settings"
        yield finder
        yield Tabs(*(Tab(name, id=name.lower()) for name in PAGES), active=self._first.lower())
        yield Page(id="rows")
        yield Label("", id="state", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._begin_rows()
        self._say()

    # -- what is shown -----------------------------------------------------------------------------------------------

    @property
    def page(self) -> str:
        """Name of the page, as in Sampling."""
        active = self.tabs.active
        return next((name for name in PAGES if name.lower() == active), self._first)

    def wanted(self) -> tuple[str, ...]:
        """Settings of the page, or those of all pages that have each word typed."""
        words = self.finder.value.lower().split()
        if not words:
            return tuple(key for section in PAGES[self.page] for key in MEANINGS if key.startswith(f"{section}."))
        texts = {key: f"{key} {meaning}".lower() for key, meaning in MEANINGS.items()}
        return tuple(key for key, text in texts.items() if all(word in text for word in words))

    @on(Input.Changed, "#find")
    @on(Tabs.TabActivated)
    def _turned(self) -> None:
        self._begin_rows()

    def _begin_rows(self) -> Worker[None] | None:
        """Show other settings, if there are others to be shown."""
        if (keys := self.wanted()) == self._keys:
            return None
        self._keys = keys
        self.tabs.disabled = bool(self.finder.value.strip())
        return self.run_worker(self._show_rows(keys), group="rows", exclusive=True)

    async def _show_rows(self, keys: Sequence[str]) -> None:
        """Mount the rows one by one: keys are served in between, and other words typed end it."""
        await self.shown.remove_children()
        self.shown.scroll_home(animate=False)
        groups = [(section, list(part)) for section, part in groupby(keys, lambda key: key.partition(".")[0])]
        for section, part in groups:
            if len(groups) > 1 or self.tabs.disabled:
                first = "" if self.shown.children else "-first"
                await self.shown.mount(Label(section, classes=f"section {first}", markup=False))
            for key in part:
                await self.shown.mount(SettingRow(key, self.edits))
        if not keys:
            await self.shown.mount(Label("there is no such setting", classes="section", markup=False))

    def _say(self) -> None:
        parts = [f"{self.edits.count('session')} for this session", f"{self.edits.count('file')} for config.toml"]
        wrong = self.edits.problems
        told = " and ".join(part for part in parts if not part.startswith("0 "))
        nothing = f"values of the file go to {self.edits.config.file}"
        text = f"changes: {told}; Ctrl+S keeps them" if told else nothing
        self.state.set_class(bool(wrong), "-wrong")
        self.state.update(f"{', '.join(wrong)} cannot be kept so" if wrong else text)

    @on(SettingRow.Edited)
    def _edited(self) -> None:
        for row in self.query(SettingRow):  # the problem of one may be solved by another
            row.show()
        self._say()

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_page(self, step: int) -> None:
        """Go to another page."""
        self.finder.value = ""
        names = list(PAGES)
        self.tabs.active = names[(names.index(self.page) + step) % len(names)].lower()

    def action_find(self) -> None:
        self.finder.focus()

    def action_move(self, step: int) -> None:
        """Go to the next setting or the one before; above the first is what finds them."""
        stops: list[Widget] = [self.finder, *(row.editor for row in self.query(SettingRow))]
        row = self._row()
        at = stops.index(row.editor) if row else 0
        stops[max(0, min(at + step, len(stops) - 1))].focus()

    def action_scroll(self, pages: int) -> None:
        scroll = self.shown.scroll_page_down if pages > 0 else self.shown.scroll_page_up
        scroll(animate=False)

    def _row(self) -> SettingRow | None:
        ancestors = self.focused.ancestors_with_self if self.focused else ()
        return next((one for one in ancestors if isinstance(one, SettingRow)), None)

    def action_turn(self) -> None:
        if row := self._row():
            row.turn()

    def action_reset(self) -> None:
        if row := self._row():
            row.reset()

    async def action_save(self) -> None:
        """Give back the changes; a setting that cannot be so is gone to instead."""
        if wrong := self.edits.problems:
            await self._go_to(wrong[0])
        else:
            changed = self.edits.result()
            self.dismiss(changed if changed.for_file or changed.for_session else None)

    async def _go_to(self, key: str) -> None:
        if key not in self._keys:
            self.finder.value = ""
            self.tabs.active = next(name.lower() for name, of in PAGES.items() if key.partition(".")[0] in of)
            if rows := self._begin_rows():
                await rows.wait()
        next(row for row in self.query(SettingRow) if row.key == key).editor.focus()

    def action_leave(self) -> None:
        """Close, after a question if something was changed."""
        count = self.edits.count("session") + self.edits.count("file")
        if not count:
            self.dismiss(None)
            return
        things = "1 change" if count == 1 else f"{count} changes"
        question = YesNo(f"Leave without keeping {things}?", "Ctrl+S keeps what was changed.", yes="Leave", no="Stay")
        self.app.push_screen(question, self._left)

    def _left(self, leaves: bool | None) -> None:
        if leaves:
            self.dismiss(None)


def check_keys(config: Config) -> None:
    """Raise ConfigError if `tui.keys` names a binding that is nowhere: the program would not begin with it."""
    if config.tui.keys:
        from kvchat.tui.app import ChatApp
        from kvchat.tui.chat import ChatScreen
        from kvchat.tui.prompt import Prompt

        checked(config.tui.keys, [*Prompt.BINDINGS, *ChatScreen.BINDINGS, *ChatApp.BINDINGS])
