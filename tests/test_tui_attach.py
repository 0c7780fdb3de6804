"""Attaching a document: naming a file, completing its name, pasting, and what is said before it is taken in."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from textual import events
from textual.pilot import Pilot
from textual.widgets import Input

from kvchat.documents import MOST_BYTES
from kvchat.errors import InputError
from kvchat.tui.attach import Attachment, AttachScreen
from kvchat.tui.path_input import PathInput
from tests.tui_host import Host, hosting, wait_until

POEM = "The tide comes in.\nThe tide goes out.\n"


class Count:
    """A token a word; waits for its gate, in a thread."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.counted: list[str] = []
        self.error: Exception | None = None

    def __call__(self, text: str) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert self.gate.wait(10)
        if self.error:
            raise self.error
        self.counted.append(text)
        return len(text.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "poem.txt").write_text(POEM)
    (tmp_path / "poetry").mkdir()
    (tmp_path / "poetry" / "ode.txt").write_text("Season of mists")
    (tmp_path / ".hidden").write_text("x")
    return tmp_path


def value(host: Host) -> str:
    return host.modal.query_one(PathInput).value


def title(host: Host) -> Input:
    return host.modal.query_one("#title", Input)


async def paste(host: Host, text: str) -> None:
    host.modal.query_one(PathInput).post_message(events.Paste(text))


async def put(host: Host, pilot: Pilot[None], path: str) -> None:
    host.modal.query_one(PathInput).value = path
    await pilot.pause()


# -- files -----------------------------------------------------------------------------------------------------------


async def test_a_file_is_weighed_before_it_is_attached(folder: Path) -> None:
    count = Count()
    count.gate.clear()
    async with hosting(AttachScreen(count, room=100)) as (host, pilot):
        assert "Type the name of a file" in host.shown
        await pilot.press(*"poem.txt")
        await wait_until(lambda: "38 B · 3 lines · counting tokens…" in host.shown)
        assert "The tide goes out." in host.shown and "fits" not in host.shown
        count.gate.set()
        await wait_until(lambda: "8 tokens" in host.shown and "fits: 100 tokens are free" in host.shown)
        assert title(host).value == "poem.txt"
        await pilot.press("enter")
        await wait_until(lambda: host.results == [Attachment("poem.txt", POEM)])


async def test_a_path_given_is_read_at_once(folder: Path) -> None:
    async with hosting(AttachScreen(Count(), str(folder / "poem.txt"))) as (host, pilot):
        await wait_until(lambda: "8 tokens" in host.shown)
        assert "free" not in host.shown
        await pilot.press("enter")
        await wait_until(lambda: host.results == [Attachment("poem.txt", POEM)])


async def test_enter_while_tokens_are_counted_attaches_when_they_are(folder: Path) -> None:
    count = Count()
    count.gate.clear()
    async with hosting(AttachScreen(count, "poem.txt")) as (host, pilot):
        await wait_until(lambda: "counting" in host.shown)
        await pilot.press("enter")
        assert host.results == []
        count.gate.set()
        await wait_until(lambda: host.results == [Attachment("poem.txt", POEM)])


async def test_what_the_window_has_no_room_for_is_said(folder: Path) -> None:
    async with hosting(AttachScreen(Count(), "poem.txt", room=5, window=8)) as (host, pilot):
        await wait_until(lambda: "more than the 5 tokens that are free: older turns leave the window" in host.shown)
        await pilot.press("enter")
        await wait_until(lambda: len(host.results) == 1)


async def test_what_no_window_holds_is_said_to_come_in_parts(folder: Path) -> None:
    async with hosting(AttachScreen(Count(), "poem.txt", room=5, window=7)) as (host, _):
        await wait_until(lambda: "longer than the window of 7 tokens: it comes in parts" in host.shown)
        assert "never sees all of it" in " ".join(host.shown.split()) and "older turns" not in host.shown


async def test_escape_leaves_it(folder: Path) -> None:
    count = Count()
    count.gate.clear()
    async with hosting(AttachScreen(count, "poem.txt")) as (host, pilot):
        await wait_until(lambda: "counting" in host.shown)
        await pilot.press("escape")
        await wait_until(lambda: host.results == [None])
        count.gate.set()


async def test_a_title_of_the_users_own_is_kept(folder: Path) -> None:
    async with hosting(AttachScreen(Count(), "poem.txt")) as (host, pilot):
        await wait_until(lambda: "8 tokens" in host.shown)
        title(host).value = "my  poem"
        await put(host, pilot, "poetry/ode.txt")
        await wait_until(lambda: "3 tokens" in host.shown)
        await pilot.press("enter")
        await wait_until(lambda: host.results == [Attachment("my poem", "Season of mists")])


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("binary", b"ab\0cd", "not text: byte 2 is 0x00"),
        ("latin", "für".encode("latin-1"), "not UTF-8 text: byte 1 is 0xfc"),
        ("empty", b" \n", "the document is empty"),
        ("large", b"x" * (MOST_BYTES + 1), "a document has at most 16 MiB"),
        ("missing", None, "No such file or directory"),
        ("[b]missing[/b]", None, "[b]missing[/b]: No such file or directory"),
    ],
)
async def test_a_file_that_cannot_be_attached_is_one_line(
    folder: Path, name: str, content: bytes | None, line: str
) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    async with hosting(AttachScreen(Count(), name)) as (host, pilot):
        await pilot.press("enter")
        await wait_until(lambda: line in host.shown)
        assert host.results == []
        await put(host, pilot, "poem.txt")
        await wait_until(lambda: "8 tokens" in host.shown and line not in host.shown)


async def test_a_name_in_the_making_is_no_error(folder: Path) -> None:
    async with hosting(AttachScreen(Count())) as (host, pilot):
        await pilot.press(*"poem.t")
        await wait_until(lambda: "Type the name" not in host.shown)
        assert "No such file" not in host.shown


@pytest.mark.parametrize(
    ("error", "line"),
    [(InputError("the session is closed"), "the session is closed"), (ValueError("odd"), "internal error: ValueError")],
)
async def test_tokens_that_cannot_be_counted_are_one_line(folder: Path, error: Exception, line: str) -> None:
    count = Count()
    count.error = error
    async with hosting(AttachScreen(count, "poem.txt")) as (host, _):
        await wait_until(lambda: line in host.shown)


# -- completion ------------------------------------------------------------------------------------------------------


async def test_tab_completes_as_far_as_it_is_clear_then_goes_through_the_names(folder: Path) -> None:
    async with hosting(AttachScreen(Count())) as (host, pilot):
        await pilot.press("p", "tab")
        await wait_until(lambda: value(host) == "poe")
        await wait_until(lambda: "poem.txt  poetry/" in host.shown)
        await put(host, pilot, "")
        await put(host, pilot, "poe")
        await pilot.press("tab")
        await wait_until(lambda: value(host) == "poem.txt")
        await pilot.press("tab")
        await wait_until(lambda: value(host) == "poetry/")
        await pilot.press(*"o", "tab")
        await wait_until(lambda: value(host) == "poetry/ode.txt")
        await pilot.press("tab")
        await wait_until(lambda: title(host).has_focus)


async def test_hidden_files_are_proposed_only_if_asked_for(folder: Path) -> None:
    async with hosting(AttachScreen(Count())) as (host, pilot):
        await pilot.press("tab")
        await wait_until(lambda: value(host) == "poe")
        assert ".hidden" not in host.shown
        await put(host, pilot, ".h")
        await pilot.press("tab")
        await wait_until(lambda: value(host) == ".hidden")


async def test_the_home_folder_and_one_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "poetry"))
    async with hosting(AttachScreen(Count())) as (host, pilot):
        await pilot.press("~", "tab")
        await wait_until(lambda: value(host) == "~/")
        await pilot.press("tab")
        await wait_until(lambda: value(host) == "~/ode.txt")
        await wait_until(lambda: "3 tokens" in host.shown)
        await put(host, pilot, "nowhere/x")
        await pilot.press("tab")
        await wait_until(lambda: title(host).has_focus)


@pytest.mark.parametrize("raw", ["evil\x1b[2Jname.txt", "two\nlines.txt", "wrong\udcffbyte.txt", "[red]x[/red].txt"])
async def test_odd_names_are_completed_shown_harmlessly_and_found(folder: Path, raw: str) -> None:
    odd = folder / "odd"
    odd.mkdir()
    try:
        (odd / raw).write_text("strange")
    except OSError:
        pytest.skip("this file system has no such names")
    async with hosting(AttachScreen(Count())) as (host, pilot):
        await put(host, pilot, "odd/")
        await pilot.press("tab")
        await wait_until(lambda: "1 token" in host.shown)
        assert "\x1b" not in host.shown and "\udcff" not in host.shown
        await pilot.press("enter")
        await wait_until(lambda: len(host.results) == 1)
        assert host.results[0].text == "strange" and "\x1b" not in host.results[0].title


# -- pastes ----------------------------------------------------------------------------------------------------------


async def test_a_pasted_name_is_typed_and_pasted_text_is_the_document(folder: Path) -> None:
    async with hosting(AttachScreen(Count(), room=10**6)) as (host, pilot):
        await paste(host, "poem.txt\n")
        await wait_until(lambda: value(host) == "poem.txt" and "8 tokens" in host.shown)
        text = "\n  Minutes of May\n" + "word\n" * 300_000
        await paste(host, text)
        await wait_until(lambda: "1.5 MB · 300003 lines · 300003 tokens" in host.shown)
        assert title(host).value == "Minutes of May" and title(host).has_focus
        await pilot.press("enter")
        await wait_until(lambda: host.results == [Attachment("Minutes of May", text)])


@pytest.mark.parametrize("pasted", ["'two words.txt'", "two\\ words.txt", "two words.txt", " two words.txt "])
async def test_a_file_dropped_on_the_terminal_is_found(folder: Path, pasted: str) -> None:
    (folder / "two words.txt").write_text("found it")
    async with hosting(AttachScreen(Count())) as (host, _):
        await paste(host, pasted)
        await wait_until(lambda: value(host) == "two words.txt" and "2 tokens" in host.shown)


async def test_a_text_given_is_weighed_at_once() -> None:
    text = "\x1b]0;owned\x07 [b]bold[/b] " + "x" * 1_000_000
    async with hosting(AttachScreen(Count(), text=text)) as (host, pilot):
        await wait_until(lambda: "3 tokens" in host.shown)
        assert "\x1b" not in host.shown and "[b]bold[/b]" in host.shown and "File" not in host.shown
        await pilot.press("enter")
        await wait_until(lambda: len(host.results) == 1)
        assert host.results[0].text == text


async def test_a_blank_text_is_not_attached() -> None:
    async with hosting(AttachScreen(Count(), text=" \n \n")) as (host, pilot):
        await wait_until(lambda: "the document is empty" in host.shown)
        await pilot.press("enter")
        await pilot.pause()
        assert host.results == []


async def test_the_arrow_keys_go_between_the_fields(folder: Path) -> None:
    async with hosting(AttachScreen(Count())) as (host, pilot):
        await pilot.press("down")
        assert title(host).has_focus
        await pilot.press("up")
        assert host.modal.query_one(PathInput).has_focus and os.getcwd() == str(folder)
