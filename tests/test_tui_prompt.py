"""The input: several lines, what was sent before, large pastes, and the list of completions."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.pilot import Pilot
from textual.widgets import OptionList

from kvchat.errors import StoreError
from kvchat.tui.commands import COMMANDS
from kvchat.tui.completion import Completer, matching, paths
from kvchat.tui.popup import Popup
from kvchat.tui.prompt import Prompt
from tests.tui_host import wait_until


class Host(App[None]):
    CSS = "Prompt { height: auto; max-height: 10; border: round white; dock: bottom; }"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []
        self.names = ["trip", "work", "tax \x1b[2J"]
        self.gate = threading.Event()
        self.gate.set()

    def compose(self) -> ComposeResult:
        yield VerticalScroll(can_focus=True)
        yield Prompt(completer=Completer(COMMANDS, {"resume": self.sessions, "attach": paths}))

    def on_mount(self) -> None:
        self.prompt.focus()

    def sessions(self, typed: str) -> list[str]:
        assert threading.current_thread() is not threading.main_thread()
        self.gate.wait(10)
        return self.names

    def on_prompt_submitted(self, event: Prompt.Submitted) -> None:
        self.told.append(event.text)

    def on_prompt_pasted(self, event: Prompt.Pasted) -> None:
        self.told.append(event)

    def on_option_list_option_selected(self) -> None:
        self.told.append("the list of completions is nobody else's business")

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def listed(self) -> list[str]:
        """The lines that are proposed."""
        return [one.line for popup in self.screen.query(Popup) if popup.display for one in popup.candidates]

    @property
    def shown(self) -> str:
        return "\n".join("".join(part.text for part in strip) for strip in self.screen._compositor.render_strips())


@asynccontextmanager
async def typing() -> AsyncIterator[tuple[Host, Prompt, Pilot[None]]]:
    host = Host()
    async with host.run_test(size=(80, 24)) as pilot:
        yield host, host.prompt, pilot


async def test_enter_sends_and_another_key_begins_a_line() -> None:
    async with typing() as (host, prompt, pilot):
        await pilot.press(*"one", "ctrl+j", *"two", "enter", "enter")
        assert host.told == ["one\ntwo"] and prompt.text == ""


async def test_arrows_at_the_edges_bring_back_what_was_sent_and_what_was_being_written() -> None:
    async with typing() as (_, prompt, pilot):
        prompt.remember(["first", "two\nlines", "two\nlines"])
        await pilot.press(*"draft", "up")
        assert prompt.text == "two\nlines"
        await pilot.press("up")
        assert prompt.text == "two\nlines" and prompt.cursor_location == (0, 3)
        await pilot.press("up", "up")
        assert prompt.text == "first"
        await pilot.press("down", "down", "down")
        assert prompt.text == "draft"
        prompt.forget()
        await pilot.press("up")
        assert prompt.text == "draft"


async def test_an_arrow_moves_within_a_long_line_before_it_leaves_it() -> None:
    async with typing() as (_, prompt, pilot):
        prompt.remember(["sent"])
        prompt.put("word " * 40)
        await pilot.pause()
        await pilot.press("up")
        assert prompt.text == "word " * 40 and prompt.cursor_location[1] < 200


@pytest.mark.parametrize("text", ["line\n" * (Prompt.MOST_LINES + 1), "x" * 1_000_000, "\r" * 50])
async def test_a_large_paste_is_offered_and_not_typed(text: str) -> None:
    async with typing() as (host, prompt, pilot):
        await pilot.press("a")
        host.post_message(events.Paste(text))
        await wait_until(lambda: host.told)
        assert host.told == [Prompt.Pasted(text)] and prompt.text == "a"


async def test_a_small_paste_is_typed_and_cannot_drive_the_terminal() -> None:
    async with typing() as (host, prompt, _):
        host.post_message(events.Paste("a\x1b[2J\nb"))
        await wait_until(lambda: "␛[2J" in host.shown)
        assert prompt.text == "a\x1b[2J\nb" and "\x1b" not in host.shown


async def test_a_slash_lists_commands_with_what_they_take_and_tab_takes_one() -> None:
    async with typing() as (host, prompt, pilot):
        await pilot.press("/", "r", "e")
        await wait_until(lambda: host.listed == ["/resume ", "/rename ", "/rewind ", "/retry"])
        assert "/rename NEW" in host.shown and "rename this session" in host.shown
        await pilot.press("down", "down", "up", "tab")
        assert prompt.text == "/rename " and prompt.has_focus
        await wait_until(lambda: host.listed == [])


async def test_enter_takes_what_is_only_begun_and_sends_what_is_whole() -> None:
    async with typing() as (host, prompt, pilot):
        await pilot.press("/", "h", "e")
        await wait_until(lambda: host.listed[:1] == ["/help"])
        await pilot.press("enter")
        assert host.told == ["/help"] and prompt.text == "" and host.listed == []
        await pilot.press(*"/fork")
        await pilot.press("enter")
        assert host.told == ["/help", "/fork"]


async def test_arguments_come_from_the_source_of_the_command() -> None:
    async with typing() as (host, prompt, pilot):
        await pilot.press(*"/resume ")
        await wait_until(lambda: host.listed == ["/resume trip", "/resume work"])  # one name cannot be typed
        await pilot.press("down", "enter")
        assert host.told == ["/resume work"] and prompt.text == ""


async def test_a_source_that_waits_keeps_nobody_waiting_and_is_asked_once() -> None:
    async with typing() as (host, prompt, pilot):
        host.gate.clear()
        prompt.put("/resume ")
        await pilot.press(*"wo")
        assert prompt.text == "/resume wo" and host.listed == []
        host.gate.set()
        await wait_until(lambda: host.listed == ["/resume work"])


async def test_escape_closes_the_list_and_tab_opens_it_again() -> None:
    async with typing() as (host, prompt, pilot):
        await pilot.press("/", "m")
        await wait_until(lambda: host.listed)
        await pilot.press("escape")
        assert host.listed == [] and prompt.text == "/m" and prompt.has_focus
        await pilot.press("tab")
        await wait_until(lambda: host.listed)
        await pilot.press("escape", "a")
        await wait_until(lambda: host.listed == ["/map"])
        await pilot.press("shift+tab")
        await wait_until(lambda: host.listed == [])


async def test_a_click_takes_a_candidate_and_nobody_else_hears_of_it() -> None:
    async with typing() as (host, prompt, pilot):
        await pilot.press("/", "r", "e")
        await wait_until(lambda: host.listed)
        await pilot.pause()
        await pilot.click(Popup, offset=(3, 2))  # the frame counts
        assert prompt.text == "/rename " and prompt.has_focus and host.told == []
        assert isinstance(host.screen.query_one(Popup), OptionList)


async def test_messages_are_not_completed() -> None:
    async with typing() as (host, _, pilot):
        await pilot.press(*"//re")
        await pilot.pause()
        assert host.listed == []
        assert Completer(COMMANDS, {}).candidates("/re\nx") == []


def test_what_begins_alike_comes_before_what_has_it_inside() -> None:
    assert matching("Re", ["are", "rest", "RED", "x"]) == ["rest", "RED", "are"]


def test_paths_are_completed_and_folders_go_on(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for name in ("novel.txt", ".hidden", "b"):
        (tmp_path / name).touch()
    assert paths(f"{tmp_path}/no") == [f"{tmp_path}/notes/", f"{tmp_path}/novel.txt"]
    assert paths(f"{tmp_path}/.h") == [f"{tmp_path}/.hidden"]
    assert paths(f"{tmp_path}/none/x") == paths("a\0b/") == []


def test_a_source_that_fails_proposes_nothing() -> None:
    def fails(typed: str) -> list[str]:
        raise StoreError("the store is locked")

    assert Completer(COMMANDS, {"resume": fails}).candidates("/resume x") == []
