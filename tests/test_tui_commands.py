"""Slash commands of the chat screen, over a fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from textual.command import CommandPalette
from textual.pilot import Pilot

from kvchat.errors import ModelError
from kvchat.events import Delta
from kvchat.tui.answer import Answer
from kvchat.tui.chat import ChatScreen
from kvchat.tui.commands import COMMANDS, help_text, parse, tags, turn_and_name
from kvchat.tui.first_run import FirstRun
from kvchat.tui.items import Question
from kvchat.tui.keys import HelpScreen
from kvchat.tui.plain_text import Note
from tests.tui_parts import FakeSession, FakeWorker, chat, done, enter, idle, screen, texts, wait_until


async def test_a_new_session_begins_empty_and_an_existing_name_is_refused() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].say("user", "old")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/new trip")
        assert "is there already" in texts(app, Note)[-1] and app.session_name == "trip"
        await pilot.press("ctrl+n")
        await wait_until(lambda: not app.jobs.busy and app.session_name != "trip")
        assert texts(app, Question) == [] and len(worker.all) == 2
        await enter(app, pilot, "/new with spaces")
        assert app.session_name == "with spaces"


async def test_commands_fork_rename_rewind_retry_and_count() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        await enter(app, pilot, "two")
        await enter(app, pilot, "/retry")
        assert texts(app, Answer) == ["echo: one", "echo: again two"]
        await enter(app, pilot, "/fork side")
        assert app.session_name == "side" and texts(app, Question) == ["one", "two"]
        await enter(app, pilot, "/rewind")
        assert app.prompt.text == "two" and texts(app, Question) == ["one"]
        await enter(app, pilot, "/rename trip")
        assert "is there already" in texts(app, Note)[-1]
        await enter(app, pilot, "/rename [b]x[/b]")
        await wait_until(lambda: screen(app).count("[b]x[/b]") == 2)
        await enter(app, pilot, "/stats")
        assert "kept 1204/3953 pairs · 18 MB in memory · 4.1 MB on disk" in texts(app, Note)[-1]
        assert worker.all["trip"].history[-1].content == "echo: again two"


async def test_a_failed_retry_leaves_the_former_answer() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        worker.all["trip"].script = [Delta("half"), RuntimeError("boom")]
        await enter(app, pilot, "/retry")
        assert texts(app, Answer) == ["echo: one"] and "boom" in texts(app, Note)[-1]


async def reading_elsewhere(app: ChatScreen, pilot: Pilot[None]) -> None:
    """Go to the first message; the last one is not mounted then."""
    await app.transcript.to_beginning()
    await wait_until(lambda: not app.transcript._is_shifting)
    await pilot.pause()
    assert not app.transcript.is_whole


def long(worker: FakeWorker) -> FakeSession:
    session = worker.all["trip"]
    for number in range(30):
        session.say("user", f"question {number}")
        session.say("assistant", f"answer {number}\n\n" * 5)
    return session


@pytest.mark.parametrize("fails", [False, True])
async def test_who_reads_elsewhere_meanwhile_finds_one_answer_after_a_retry(fails: bool) -> None:
    worker = FakeWorker("trip")
    trip = long(worker)
    trip.script = [RuntimeError("boom")] if fails else None
    trip.gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/retry", wait=False)
        await wait_until(lambda: app.jobs.answering)
        await reading_elsewhere(app, pilot)
        trip.gate.set()
        await idle(app)
        await app.transcript.to_end()
        found = texts(app, Answer)[-2:]
        assert found[0].startswith("answer 28")
        assert found[1].startswith("answer 29" if fails else "echo: again question 29")


async def test_who_reads_elsewhere_when_a_turn_fails_finds_what_is_saved() -> None:
    worker = FakeWorker("trip")
    trip = long(worker)
    trip.script = [RuntimeError("boom")]
    trip.gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await wait_until(lambda: app.jobs.answering)
        await reading_elsewhere(app, pilot)
        trip.gate.set()
        await idle(app)
        await app.transcript.to_end()
        assert texts(app, Question)[-1] == "question 29" and texts(app, Answer)[-1].startswith("answer 29")
        assert app.prompt.text == "hello" and texts(app, Note) == ["internal error: RuntimeError: boom"]


async def test_the_numbers_of_a_seal_come_to_who_reads_elsewhere() -> None:
    worker = FakeWorker("trip")
    trip = long(worker)
    async with chat(worker) as (app, pilot):
        await wait_until(lambda: "4012 / 8192 tokens" in screen(app))
        trip.sealed.clear()
        await enter(app, pilot, "hello")
        assert texts(app, Note)[-1].endswith("sealing…")
        await reading_elsewhere(app, pilot)
        trip.sealed.set()
        await wait_until(lambda: any("sealed 0.4 s" in note.text for note in app.transcript.query(Note)))
        await app.transcript.to_end()
        assert texts(app, Note)[-1].endswith("sealed 0.4 s")


async def test_an_answer_far_above_many_notes_goes_on() -> None:
    worker = FakeWorker("trip")
    long(worker)
    async with chat(worker) as (app, pilot):
        for number in range(6):
            app.note(f"note {number}", "-notice")  # goes nowhere
        await reading_elsewhere(app, pilot)
        await enter(app, pilot, "/continue")
        assert texts(app, Answer)[-1].startswith("answer 29") and texts(app, Answer)[-1].endswith("echo: more")
        assert len([text for text in texts(app, Answer) if text.startswith("answer 29")]) == 1


WRONG = [
    *("/frobnicate", "/quit now", "/help me", "/resume nowhere", "/fork", "/fork 0 side", "/fork [1] side", "/rename"),
    *("/rewind many", "/edit 9", "/edit x", "/inspect 3", "/set", "/set keep", "/set =3", "/export", "/export a.doc"),
    *("/search", "/theme mauve", "/copy", "/copy all", "/continue"),
]


async def test_a_wrong_command_is_a_one_line_hint() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        for line in WRONG:
            await app.transcript.remove_children()
            app.prompt.clear()
            await enter(app, pilot, line)
            await wait_until(lambda: app.query("Note.-error"))
            (note,) = app.query("Note.-error").results(Note)
            assert "\n" not in note.text and "internal error" not in note.text, line
            assert texts(app, Question) == []


async def test_commands_that_change_the_session_wait_for_the_answer() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await enter(app, pilot, "/new", wait=False)
        assert "has to wait" in texts(app, Note)[-1] and app.prompt.text == "/new"
        await enter(app, pilot, "/map", wait=False)
        assert app.segment_map.display


async def test_two_slashes_send_one() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await enter(app, pilot, "//help me")
        assert texts(app, Question) == ["/help me"]


async def test_quit_leaves_while_the_model_answers() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await enter(app, pilot, "/quit", wait=False)
        await wait_until(lambda: not app.app.is_running)
        assert worker.all["trip"].stopped.is_set()


def test_lines_are_read_as_commands() -> None:
    assert parse("/fork 3 my trip ") == ("fork", "3 my trip")
    assert [turn_and_name(text) for text in ("3 my trip", "2026", "my trip")] == [
        (3, "my trip"),
        (None, "2026"),
        (None, "my trip"),
    ]
    assert tags("+work home -old -none", ("old", "rome")) == ("home", "rome", "work")
    assert all(f"/{name}" in help_text() for name in COMMANDS)


async def test_every_command_is_done_by_something() -> None:
    async with chat(FakeWorker("trip")) as (app, _):
        assert [name for name in COMMANDS if not callable(getattr(app.commands, f"do_{name}", None))] == []


async def test_a_fork_of_a_turn_holds_the_turns_up_to_it() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        for text in ("one", "two", "three"):
            await enter(app, pilot, text)
        await enter(app, pilot, "/fork 2 my side")
        assert app.session_name == "my side" and texts(app, Question) == ["one", "two"]


async def test_titles_and_tags_are_set_and_shown() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/title Rome [b]by[/b] train")
        await wait_until(lambda: screen(app).count("Rome [b]by[/b] train") == 2)  # at the top and in the list
        await enter(app, pilot, "/title")
        assert texts(app, Note)[-1] == "Rome [b]by[/b] train"
        await enter(app, pilot, "/title -")
        assert worker.titles["trip"] == ""
        await enter(app, pilot, "/tag +rome work")
        assert worker.tags["trip"] == ("rome", "work")
        await enter(app, pilot, "/tag -work")
        assert worker.tags == {"trip": ("rome",)} and texts(app, Note)[-1] == "tags: rome"


async def test_settings_of_the_session_are_given_and_taken_away() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/set generate.temperature = 0")
        await enter(app, pilot, "/set generate.temperature=")
        await enter(app, pilot, "/keep 0.2")
        changes: list[dict[str, str | None]] = [
            {"generate.temperature": "0"},
            {"generate.temperature": None},
            {"compress.keep_ratio": "0.2"},
        ]
        assert [asked[1] for asked in worker.all["trip"].asked] == changes
        await wait_until(lambda: "disk 4.1 MB · keep 0.2 " in screen(app))


async def test_a_system_prompt_is_shown_and_another_begins_a_session() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].say("system", "be brief")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/system")
        assert texts(app, Note)[-1] == "system: be brief"
        await enter(app, pilot, "/system be long")
        assert worker.opened[-1] == {"system": "be long"} and app.session_name != "trip"


async def test_another_model_takes_the_session_over_and_a_missing_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        app.prompt.text = "a draft"
        app.action_command("/model large")
        await idle(app)
        assert worker.opened[-1] == {"model": "large", "rebuild": True}
        assert "trip · large" in screen(app) and texts(app, Question) == ["one"]
        assert app.prompt.text == "a draft"
        await enter(app, pilot, "/model")
        assert texts(app, Note)[-1] == "large, with a window of 8192 tokens"

        def fail(*_: Any, model: str, **how: Any) -> FakeSession:
            if model == "none":
                raise ModelError("there is no model 'none'")
            worker.all["trip"].closed = False
            return worker.all["trip"]

        monkeypatch.setattr(worker, "open", fail)
        await enter(app, pilot, "/model none")
        await wait_until(lambda: "there is no model 'none'" in texts(app, Note))
        assert app.session_name == "trip" and not worker.all["trip"].closed


async def test_a_session_is_exported_to_a_new_file(tmp_path: Path) -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await enter(app, pilot, "one")
        file = tmp_path / "trip.json"
        await enter(app, pilot, f"/export {file}")
        assert [message["content"] for message in json.loads(file.read_text())["messages"]] == ["one", "echo: one"]
        await enter(app, pilot, f"/export {file}")
        assert "is there already" in texts(app, Note)[-1]


async def test_words_are_found_in_all_sessions() -> None:
    worker = FakeWorker("trip", "work")
    worker.all["work"].say("user", "the [red]budget[/red]\nis ten")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/search budget", wait=False)
        await wait_until(lambda: "the [red]budget[/red] is ten" in screen(app))
        await pilot.press("enter")
        await wait_until(lambda: app.session_name == "work" and not app.jobs.busy)
        await enter(app, pilot, "/search nothing", wait=False)
        await wait_until(lambda: "No message has" in screen(app))


async def test_the_last_answer_or_its_code_is_copied() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].script = [done("Like this:\n```python\nx = 1\n```\nor\n~~~\ny = 2\nz = 3\n~~~\n")]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "code")
        await enter(app, pilot, "/copy code")
        assert app.app.clipboard == "y = 2\nz = 3" and "copied 2 lines" in screen(app)
        await pilot.press("ctrl+y")
        assert app.app.clipboard.startswith("Like this:")


async def test_the_screen_is_cleared_and_the_session_stays() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        await enter(app, pilot, "/clear")
        await wait_until(lambda: texts(app, Question) == [])
        assert len(worker.all["trip"].history) == 2


async def test_a_theme_is_chosen_by_name() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        assert app.app.theme == "kvchat-dark"
        await enter(app, pilot, "/theme kvchat-light")
        assert app.app.theme == "kvchat-light"


async def test_the_palette_has_every_command() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        listed = {one.title.split()[0] for one in app.app.get_system_commands(app)}
        assert listed == {f"/{name}" for name in COMMANDS}
        await pilot.press("ctrl+p")
        await wait_until(lambda: isinstance(app.app.screen, CommandPalette))
        await pilot.press(*"export")
        await wait_until(lambda: "/export FILE" in screen(app))
        await pilot.press("enter")
        await wait_until(lambda: app.prompt.text == "/export " and app.prompt.has_focus)
        await pilot.press("f1")
        await wait_until(lambda: isinstance(app.app.screen, HelpScreen))
        await pilot.press("ctrl+p")  # commands are of the chat
        assert isinstance(app.app.screen, HelpScreen)


async def test_a_branch_and_a_document_are_taken_in() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, _):
        app.switch("m7")
        await idle(app)
        assert worker.all["trip"].asked == [("switch", "m7")]
        app.attach("notes.txt", "so many words")
        await idle(app)
        assert texts(app, Question) == ["notes.txt: so many words"]
        assert texts(app, Note)[-1] == "notes.txt is attached, 13 tokens, 3 computed"


async def test_the_built_in_model_is_asked_for_before_it_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[str] = []
    monkeypatch.setattr("kvchat.builtin.is_missing", lambda name: not here)
    monkeypatch.setattr("kvchat.download.builtin_folder", lambda cache, listener: here.append("model"))
    async with chat(FakeWorker(), wait=False) as (app, pilot):
        await wait_until(lambda: isinstance(app.app.screen, FirstRun))
        await pilot.press("escape")
        await idle(app)
        assert "there is no model yet" in texts(app, Note)[-1] and app.chat is None
        await enter(app, pilot, "/new", wait=False)
        await wait_until(lambda: isinstance(app.app.screen, FirstRun))
        await pilot.press("enter")
        await idle(app)
        assert here and app.session_name
