"""Screens over the chat: that keys open them, and that what they give back is done. Each has tests of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from textual import events
from textual.screen import Screen

from kvchat.config import Config
from kvchat.tui.attach import AttachScreen
from kvchat.tui.branch_tree import BranchTree
from kvchat.tui.chat import ChatScreen
from kvchat.tui.inspector import Inspector
from kvchat.tui.items import Question
from kvchat.tui.keys import HelpScreen
from kvchat.tui.picker import SessionPicker
from kvchat.tui.plain_text import Note
from kvchat.tui.settings import SettingsScreen
from tests.tui_parts import FakeWorker, chat, enter, idle, screen, texts, wait_until


async def opened(app: ChatScreen, kind: type[Screen[Any]]) -> None:
    await wait_until(lambda: isinstance(app.app.screen, kind))


async def test_the_picker_opens_another_session() -> None:
    async with chat(FakeWorker("trip", "work")) as (app, pilot):
        await pilot.press("ctrl+r")
        await opened(app, SessionPicker)
        await pilot.press(*"work")
        await wait_until(lambda: "trip" not in screen(app).split("work", 1)[1])
        await pilot.press("enter")
        await wait_until(lambda: app.session_name == "work" and not app.jobs.busy)


async def test_a_found_message_is_shown_in_its_session() -> None:
    worker = FakeWorker("trip", "work")
    for turn in range(1, 41):
        worker.all["work"].say("user", f"question {turn} of many")
        worker.all["work"].say("assistant", "a word\n\n" * 5)
    async with chat(worker) as (app, pilot):
        for words in ("question 7", "question 33"):  # in another session, then in the open one
            app.ask_for(f"/search {words}")
            await pilot.press("enter")
            await opened(app, SessionPicker)
            await wait_until(lambda words=words: f"{words} of" in screen(app).partition("messages")[0])  # type: ignore[misc]
            await pilot.press("enter")
            await wait_until(lambda words=words: f"▌ {words} of many" in screen(app))  # type: ignore[misc]
            assert app.session_name == "work" and not app.transcript.following


async def test_the_picker_shows_the_end_of_the_marked_session() -> None:
    worker = FakeWorker("trip", "work")
    worker.all["work"].say("user", "who was it?")
    async with chat(worker, size=(120, 30)) as (app, pilot):
        await pilot.press("ctrl+r")
        await opened(app, SessionPicker)
        await pilot.press("down")
        await wait_until(lambda: "who was it?" in screen(app))


async def test_the_picker_can_be_opened_while_the_model_answers() -> None:
    worker = FakeWorker("trip", "work")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await enter(app, pilot, "/sessions", wait=False)
        await opened(app, SessionPicker)
        await pilot.press("escape")
        await opened(app, ChatScreen)
        assert app.jobs.busy and app.session_name == "trip"


async def test_a_branch_is_chosen_from_the_tree() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await pilot.press("f5")
        await opened(app, BranchTree)
        await wait_until(lambda: "second" in screen(app))
        await pilot.press("home", "down")
        await wait_until(lambda: "all of m3" in screen(app))
        await pilot.press("enter")
        await wait_until(lambda: worker.all["trip"].asked == [("switch", "m3")])
        await idle(app)


async def test_the_inspector_looks_at_the_last_turn_or_at_a_marked_one() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        for text in ("one", "two", "three"):
            await enter(app, pilot, text)
        await pilot.press("f4")
        await opened(app, Inspector)
        await wait_until(lambda: "turn 3 of 3" in screen(app))
        await pilot.press("escape")
        app.action_command("/inspect 2")
        await wait_until(lambda: "turn 2 of 3" in screen(app))


async def test_a_marked_message_is_edited_forked_and_left() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        for text in ("one", "two"):
            await enter(app, pilot, text)
        app.transcript.focus()
        await pilot.press("up", "up", "up")
        await pilot.press("f")
        await wait_until(lambda: app.prompt.text == "/fork 1 " and app.prompt.has_focus)
        app.prompt.clear()
        app.transcript.focus()
        await pilot.press("e")
        await wait_until(lambda: app.editing is not None)
        await pilot.press("escape")
        app.transcript.focus()
        await pilot.press("escape")
        await wait_until(lambda: app.prompt.has_focus)


async def test_a_document_is_attached_and_a_long_paste_is_offered_as_one(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("so many words")
    async with chat(FakeWorker("trip")) as (app, pilot):
        await wait_until(lambda: app.room is not None)  # it is told how many tokens are free
        await enter(app, pilot, f"/attach {file}", wait=False)
        await opened(app, AttachScreen)
        await wait_until(lambda: "13 tokens" in screen(app) and "4180 tokens are free" in screen(app))
        await pilot.press("enter")
        await wait_until(lambda: texts(app, Question) == ["notes.txt: so many words"])
        await idle(app)
        app.prompt.post_message(events.Paste("line\n" * 100))
        await opened(app, AttachScreen)


async def test_help_shows_keys_and_commands() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await pilot.press("f1")
        await opened(app, HelpScreen)
        await wait_until(lambda: "Ctrl+R" in screen(app))
        await pilot.press(*"rewind")
        await wait_until(lambda: "take back the last N turns" in screen(app))


async def test_settings_are_kept_in_the_file_and_with_the_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text("# mine\n[tui]\nkeys = {map = 'f12'}\n")
    worker = FakeWorker("trip")
    async with chat(worker, config=Config.load(file)) as (app, pilot):
        await pilot.press("f2")
        await opened(app, SettingsScreen)
        await pilot.press("escape")
        await opened(app, ChatScreen)
        app.jobs.beside(app.take_over({"tui.theme": "kvchat-light"}, {"generate.seed": 7}))
        await wait_until(lambda: app.app.theme == "kvchat-light")
        await wait_until(lambda: worker.all["trip"].settings == {"generate.seed": 7})
        assert "kvchat-light" in file.read_text() and "# mine" in file.read_text()
        await pilot.press("f12")
        assert app.segment_map.display


def test_the_screen_is_read_without_torch_and_without_the_other_screens() -> None:
    later = "{'torch', 'tomlkit', 'pygments', 'markdown_it', 'pydantic_settings', 'kvchat.worker', 'kvchat.tui.picker'}"
    code = f"import sys, kvchat.tui.app; sys.exit(str({later} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr.strip() == "set()"


async def test_a_screen_does_not_keep_an_answer_from_being_shown() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await enter(app, pilot, "/help", wait=False)
        await opened(app, HelpScreen)
        worker.all["trip"].gate.set()
        await idle(app)
        await pilot.press("escape")
        await wait_until(lambda: "echo: hello" in screen(app) and not texts(app, Note)[-1].endswith("sealing…"))


async def test_screens_can_be_read_in_a_tiny_terminal() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].say("user", "one")
    worker.all["trip"].say("assistant", "first")
    async with chat(worker, size=(40, 12)) as (app, pilot):
        await pilot.press("f5")
        await wait_until(lambda: "first" in screen(app) and "here" in screen(app))
        await pilot.press("escape", "f1")
        await wait_until(lambda: "PageDown" in screen(app))
        assert re.search(r"PageDown +Page down", screen(app))
        await pilot.press("escape", "f3")
        await wait_until(lambda: "segments" in screen(app))
        assert app.segment_map.size.height >= 2 and app.prompt.region.bottom <= 11


async def test_an_answer_that_was_cut_is_told_of_when_its_session_is_opened() -> None:
    worker = FakeWorker("trip", "work")
    for name, reason in (("trip", "interrupted"), ("work", "stop")):
        worker.all[name].say("user", "one")
        worker.all[name].say("assistant", "half")
        worker.all[name].history[-1].finish_reason = reason
    async with chat(worker) as (app, pilot):
        assert "/continue" in texts(app, Note)[-1]
        await enter(app, pilot, "/resume work")
        assert not texts(app, Note)
