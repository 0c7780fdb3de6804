"""The help screen: keys as they are now, commands, and what is to be seen."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.pilot import Pilot
from textual.widgets import TextArea

from kvchat.segment_map import GLYPHS
from kvchat.tui.commands import COMMANDS, Command
from kvchat.tui.keys import HelpScreen, spelled
from kvchat.tui.legend import BRANCHES, METERS, TURN_LINE, layout
from tests.tui_host import NARROW, Host, wait_until

OWN: list[BindingType] = [
    Binding("f3,ctrl+g", "show_map", "Show the map", id="map"),
    Binding("ctrl+n", "begin", "Begin anew", id="new"),
    ("f9", "act", "[bold red]Act"),
]


class Below(Host):
    """Has keys of its own below the help."""

    BINDINGS: ClassVar[list[BindingType]] = OWN

    def __init__(self, modal: HelpScreen, keymap: Mapping[str, str]) -> None:
        super().__init__(modal)
        self.set_keymap(keymap)

    def compose(self) -> ComposeResult:
        yield TextArea()

    def on_mount(self) -> None:
        self.query_one(TextArea).focus()
        self.call_after_refresh(super().on_mount)


@asynccontextmanager
async def helping(
    keymap: Mapping[str, str] | None = None,
    commands: Mapping[str, Command] = COMMANDS,
    size: tuple[int, int] = (100, 50),
) -> AsyncIterator[tuple[Below, Pilot[None]]]:
    host = Below(HelpScreen(OWN, commands), keymap or {})
    async with host.run_test(size=size) as pilot:
        await wait_until(lambda: host.is_back and "Show the map" in host.shown)
        yield host, pilot


def rows(host: Below) -> list[str]:
    """The lines between the field and the footer, without blanks around and doubled."""
    return [" ".join(line.split()) for line in host.shown.split("\n")[3:-1] if line.strip()]


def find(host: Below, words: str) -> None:
    assert isinstance(host.modal, HelpScreen)
    host.modal.line.value = words


async def test_keys_are_shown_as_they_are_now() -> None:
    async with helping() as (host, _):
        assert "F3, Ctrl+G Show the map" in rows(host) and "Ctrl+N Begin anew" in rows(host)
    async with helping({"map": "f10", "new": "ctrl+b,alt+n"}) as (host, _):
        assert "F10 Show the map" in rows(host) and "Ctrl+B, Alt+N Begin anew" in rows(host)
        assert "F3" not in host.shown and "Ctrl+N" not in host.shown


async def test_a_key_that_the_input_takes_is_not_promised() -> None:
    async with helping({"map": "f7"}) as (host, _):
        assert "— Show the map (no key does it just now)" in rows(host) and "F3" not in host.shown


async def test_keys_of_the_input_that_has_the_focus_are_there_too() -> None:
    async with helping() as (host, _):
        find(host, "undo")
        await wait_until(lambda: "Ctrl+Z, Super+Z Undo" in rows(host))
        assert "Keys while typing" in rows(host)


async def test_every_command_is_there_with_its_usage() -> None:
    async with helping(size=(100, 200)) as (host, _):
        for name, command in COMMANDS.items():
            assert " ".join(f"/{name} {command.argument} {command.help}".split()) in rows(host)


async def test_meters_the_map_and_the_turn_line_are_explained() -> None:
    async with helping(size=(160, 200)) as (host, _):
        for section in (METERS, TURN_LINE, BRANCHES):
            assert all(row.left.plain in host.shown and row.right in host.shown for row in section.rows)
        for glyph, _style, meaning in GLYPHS.values():
            assert f"{glyph * 3} {meaning}" in rows(host)


async def test_a_word_narrows_it_down_and_its_absence_is_said() -> None:
    async with helping() as (host, pilot):
        await pilot.press(*"cached")
        await wait_until(lambda: [row.split()[0] for row in rows(host)][:2] == ["The", "cached"])
        assert "Show the map" not in host.shown
        find(host, "zebra")
        await wait_until(lambda: rows(host) == ["Nothing here has these words."])


@pytest.mark.parametrize("key", ["escape", "f1"])
async def test_it_scrolls_by_keys_in_a_small_terminal_and_closes(key: str) -> None:
    async with helping(size=NARROW) as (host, pilot):
        assert "Keys while typing" not in host.shown
        await pilot.press("pagedown", "down")
        await wait_until(lambda: "Show the map" not in host.shown)
        await pilot.press("ctrl+end")
        await wait_until(lambda: "palette" in host.shown)
        await pilot.press("ctrl+home")
        await wait_until(lambda: "Show the map" in host.shown)
        await pilot.press(key)
        assert host.results == [None]


async def test_commands_and_descriptions_are_inert() -> None:
    bad = {"x\x1b[2J": Command("[red]Y[/]", "[bold]\u202ebold\x07")}
    async with helping(commands=bad) as (host, _):
        assert "/x␛[2J [red]Y[/] [bold]�bold␇" in rows(host) and "F9 [bold red]Act" in rows(host)
        assert not any(char in host.shown for char in "\x1b\x07\u202e")


def test_what_is_long_goes_on_below_itself() -> None:
    lines = layout([TURN_LINE], ["sealed"], 60).plain.split("\n")
    assert lines[0] == "The line below an answer"
    assert lines[1].startswith("  sealing…, sealed 0.4 s  the turn")
    assert lines[2].startswith(" " * 26) and max(map(len, lines)) <= 60


@pytest.mark.parametrize(
    ("key", "expected"),
    [("ctrl+n", "Ctrl+N"), ("question_mark", "?"), ("pageup", "PageUp"), ("ctrl+shift+up", "Ctrl+Shift+Up")],
)
def test_keys_are_spelled_as_on_keyboards(key: str, expected: str) -> None:
    assert spelled(key) == expected
