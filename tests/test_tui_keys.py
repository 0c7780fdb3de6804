"""Keys of the chat screen, drafts, themes and the list of sessions, over a fake engine."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from textual.color import Color
from textual.filter import Monochrome
from textual.theme import Theme

from kvchat.config import Config
from kvchat.errors import ConfigError, StoreError
from kvchat.events import Notice
from kvchat.sections import TuiConfig
from kvchat.tui.app import ChatApp
from kvchat.tui.chat import ChatScreen
from kvchat.tui.drafts import Drafts
from kvchat.tui.items import Question
from kvchat.tui.plain_text import Note
from kvchat.tui.session_list import age
from kvchat.tui.themes import THEMES
from tests.tui_parts import NARROW, WIDE, FakeSession, FakeWorker, chat, done, enter, idle, screen, texts, wait_until


async def test_page_keys_scroll_the_transcript_while_the_input_has_the_focus() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].say("user", "line\n" * 200)
    async with chat(worker) as (app, pilot):
        await wait_until(lambda: app.transcript.scroll_y > 0 and app.transcript.is_vertical_scroll_end)
        await pilot.press("pageup")
        await wait_until(lambda: not app.transcript.is_vertical_scroll_end)
        await pilot.press("pagedown")
        await wait_until(lambda: app.transcript.is_vertical_scroll_end)


async def test_a_narrow_terminal_hides_the_session_list_until_it_is_asked_for() -> None:
    worker = FakeWorker("trip", "work")
    async with chat(worker, size=NARROW) as (app, pilot):
        assert not app.sessions.display
        await enter(app, pilot, "hello " * 40)
        await pilot.press("ctrl+l")
        assert app.sessions.display and app.sessions.has_focus
        await pilot.press("down", "enter")
        await wait_until(lambda: not app.jobs.busy and app.session_name == "work")
        assert not app.sessions.display
        await pilot.resize_terminal(*WIDE)
        await wait_until(lambda: app.sessions.display)


def test_age_is_told_in_its_largest_unit() -> None:
    now = datetime.now(UTC)
    spans = {"now": 5, "4 min": 250, "2 h": 7300, "3 d": 3 * 86400 + 5}
    assert {age((now - timedelta(seconds=s)).isoformat()) for s in spans.values()} == set(spans)


async def test_keys_change_what_is_kept_step_by_step_and_the_map_follows() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await wait_until(lambda: "disk 4.1 MB · keep 0.5 " in screen(app))
        await pilot.press("ctrl+down")
        await wait_until(lambda: "disk 4.1 MB · keep 0.3 " in screen(app))
        await pilot.press("ctrl+up")
        await wait_until(lambda: "disk 4.1 MB · keep 0.5 " in screen(app))
        for _ in range(4):
            await pilot.press("ctrl+up")
        await wait_until(lambda: "disk 4.1 MB · keep 1 " in screen(app))
        ratios = [settings["compress.keep_ratio"] for _, settings in worker.all["trip"].asked]
        assert ratios[:2] == [0.3, 0.5] and ratios[-1] == 1.0


async def test_keeping_less_waits_for_the_answer() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await pilot.press("ctrl+down")
        assert "when the model is idle" in texts(app, Note)[-1] and worker.all["trip"].asked == []


@pytest.fixture
def quick_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drafts, "AFTER_S", 0.01)


@pytest.mark.usefixtures("quick_drafts")
async def test_what_is_typed_is_saved_and_is_back_on_return() -> None:
    worker = FakeWorker("trip", "work")
    async with chat(worker) as (app, pilot):
        await pilot.press(*"half a")
        await wait_until(lambda: worker.all["trip"].draft == "half a")
        app.action_command("/resume work")
        await idle(app)
        assert app.prompt.text == ""
        await pilot.press(*"other")
        app.action_command("/resume trip")
        await idle(app)
        assert app.prompt.text == "half a" and worker.all["work"].draft == "other"
        await pilot.press("enter")
        await wait_until(lambda: texts(app, Question) == ["half a"] and worker.all["trip"].draft == "")


@pytest.mark.usefixtures("quick_drafts")
async def test_an_edited_message_is_no_draft() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        await pilot.press(*"unsent", "ctrl+e")
        await wait_until(lambda: app.prompt.text == "one")
        await pilot.press("x")
        await wait_until(lambda: worker.all["trip"].draft == "unsent")


async def test_what_was_typed_last_is_saved_on_quit_and_the_worker_closed() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await pilot.press(*"half a", "ctrl+q")
        chatting = app.app
        assert isinstance(chatting, ChatApp)
        await wait_until(lambda: not chatting.is_running)
    await asyncio.to_thread(chatting.leave, True)
    assert worker.all["trip"].draft == "half a" and worker.closed


async def test_messages_that_wait_are_saved_on_quit_too() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "first", wait=False)
        await enter(app, pilot, "second", wait=False)
        await pilot.press(*"third", "ctrl+q")
        chatting = app.app
        assert isinstance(chatting, ChatApp)
        await wait_until(lambda: not chatting.is_running)
    await asyncio.to_thread(chatting.leave, True)
    assert worker.all["trip"].draft == "second\nthird"


@pytest.mark.usefixtures("quick_drafts")
async def test_a_message_that_waits_is_a_draft_until_it_is_sent() -> None:
    worker = FakeWorker("trip")
    trip = worker.all["trip"]
    trip.gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "first", wait=False)
        await enter(app, pilot, "second", wait=False)
        await wait_until(lambda: trip.draft == "second")
        trip.gate.set()
        await wait_until(lambda: texts(app, Question) == ["first", "second"] and trip.draft == "")


async def test_editing_ends_when_another_session_is_opened() -> None:
    worker = FakeWorker("trip", "work")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        await pilot.press(*"unsent", "ctrl+e")
        await wait_until(lambda: app.prompt.text == "one")
        app.action_command("/resume nowhere")
        await idle(app)
        assert app.prompt.text == "unsent" and app.editing is None
        await pilot.press("up")
        assert app.prompt.text == "one"
        await pilot.press("down", "ctrl+e")
        await wait_until(lambda: app.prompt.text == "one")
        app.action_command("/resume work")
        await idle(app)
        assert worker.all["trip"].draft == "unsent" and app.prompt.text == "" and not app.prompt.border_title
        assert app.drafts.latest == ""


@pytest.fixture
def only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved because time passes."""
    monkeypatch.setattr(Drafts, "AFTER_S", 1000.0)


def busy(session: FakeSession, times: int) -> Callable[[str], None]:
    """`set_draft` of a store that another process writes to for so many attempts."""
    left = iter(range(times))

    def set_draft(text: str) -> None:
        if next(left, None) is not None:
            raise StoreError("another process writes to the store")
        session.draft = text

    return set_draft


@pytest.mark.usefixtures("quick_drafts")
async def test_a_draft_that_could_not_be_saved_is_saved_later(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker("trip")
    monkeypatch.setattr(Drafts, "AGAIN_S", 0.02)
    monkeypatch.setattr(worker.all["trip"], "set_draft", busy(worker.all["trip"], 3))
    async with chat(worker) as (app, pilot):
        await pilot.press(*"half")
        await wait_until(lambda: worker.all["trip"].draft == "half")
        assert "another process writes" in texts(app, Note)[-1]


@pytest.mark.usefixtures("only_told")
async def test_a_session_is_not_left_before_its_draft_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker("trip", "work")
    trip, work = worker.all["trip"], worker.all["work"]
    work.draft = "other"
    async with chat(worker) as (app, pilot):
        monkeypatch.setattr(trip, "set_draft", busy(trip, 1))
        await pilot.press(*"half")
        app.action_command("/resume work")
        await idle(app)
        assert app.session_name == "trip" and app.prompt.text == "half" and work.closed and not trip.closed
        app.action_command("/resume work")
        await idle(app)
        assert app.session_name == "work" and app.prompt.text == "other" and trip.draft == "half"


@pytest.mark.usefixtures("quick_drafts")
async def test_what_is_typed_while_a_session_is_opened_takes_no_draft_away(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker("trip", "work")
    trip, work, told = worker.all["trip"], worker.all["work"], threading.Event()
    work.draft = "other"
    opened = worker.open

    def slow(*args: Any, **how: Any) -> Any:
        assert told.wait(30)
        return opened(*args, **how)

    async with chat(worker) as (app, pilot):
        monkeypatch.setattr(worker, "open", slow)
        await pilot.press(*"half")
        app.action_command("/resume work")
        await wait_until(lambda: not app.prompt.text)
        await pilot.press(*"more")
        await wait_until(lambda: trip.draft == "half\nmore")  # killed now, it would be there
        told.set()
        await idle(app)
        assert app.prompt.text == "other\nmore" and trip.draft == "half"
        await wait_until(lambda: work.draft == "other\nmore")


@pytest.mark.usefixtures("only_told")
async def test_what_cannot_be_saved_on_quit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker("trip")
    monkeypatch.setattr(worker.all["trip"], "set_draft", busy(worker.all["trip"], 1))
    async with chat(worker) as (app, pilot):
        await pilot.press(*"half a", "ctrl+q")
        chatting = app.app
        assert isinstance(chatting, ChatApp)
        await wait_until(lambda: not chatting.is_running)
    with pytest.raises(StoreError, match="not saved: half a"):
        await asyncio.to_thread(chatting.leave, True)
    assert worker.closed


async def test_a_session_that_cannot_be_opened_leaves_the_input_as_it_is() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await pilot.press(*"half a")
        app.action_command("/resume nowhere")
        await idle(app)
        assert app.prompt.text == "half a" and app.session_name == "trip"


def keyed(**keys: str) -> Config:
    return Config(tui=TuiConfig(keys=keys))


async def test_a_keymap_gives_an_action_other_keys() -> None:
    worker = FakeWorker("trip")
    async with chat(worker, config=keyed(map="f12", stop="ctrl+x")) as (app, pilot):
        await pilot.press("f3")
        assert not app.segment_map.display
        await pilot.press("f12")
        assert app.segment_map.display
        assert "f12 Map" in screen(app)


def test_an_unknown_binding_is_one_line_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"tui.keys: there is no binding 'fly'; known: .*map.*prompt.send") as raised:
        ChatApp(FakeWorker("trip").connect, keyed(fly="f12"))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_every_binding_has_an_id_of_its_own() -> None:
    bindings = [*ChatScreen.BINDINGS, *ChatApp.BINDINGS]
    ids = [binding.id for binding in bindings]  # type: ignore[union-attr]
    assert all(ids) and len({*ids}) == len(ids)


async def test_a_theme_that_is_not_there_counts_as_the_default() -> None:
    async with chat(FakeWorker("trip"), config=Config(tui=TuiConfig(theme="mauve"))) as (app, _):
        assert app.app.theme == "kvchat-dark"


async def test_no_color_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with chat(FakeWorker("trip")) as (app, pilot):
        await enter(app, pilot, "hello")
        assert app.app.no_color and any(isinstance(one, Monochrome) for one in app.app.get_line_filters())


def contrast(one: str, other: str) -> float:
    """Of WCAG, from 1 to 21."""
    light, dark = sorted((luminance(Color.parse(one)), luminance(Color.parse(other))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: Color) -> float:
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color.normalized]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_text_in_every_theme_can_be_read(theme: Theme) -> None:
    least = 7.0 if theme.name == "kvchat-contrast" else 4.5
    for ground in (theme.background, theme.surface, theme.panel):
        for ink in (theme.foreground, theme.accent, theme.success, theme.warning, theme.error):
            assert ground and ink and contrast(ink, ground) >= least, (ink, ground)


async def test_a_title_that_the_model_gives_is_shown_at_once() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello")
        worker.titles["trip"] = "Two greetings"
        await wait_until(lambda: screen(app).count("Two greetings") == 2)


async def test_a_key_opens_and_closes_all_reasoning_that_to_come_too() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].script = [done("<think>\nso it is\n</think>\nYes.")]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        assert "so it is" not in screen(app)
        await pilot.press("f6")
        await wait_until(lambda: screen(app).count("so it is") == 1)
        await enter(app, pilot, "two")
        await wait_until(lambda: screen(app).count("so it is") == 2)
        await pilot.press("f6")
        await wait_until(lambda: "so it is" not in screen(app))


async def test_keys_go_to_the_first_message_and_the_last_and_what_was_asked_for_is_gone_to() -> None:
    worker = FakeWorker("trip")
    for turn in range(20):
        worker.all["trip"].say("user", f"question {turn}.")
        worker.all["trip"].say("assistant", "a line\n\n" * 6)
    async with chat(worker) as (app, pilot):
        await pilot.press("ctrl+home")
        await wait_until(lambda: "question 0." in screen(app) and "more below" in screen(app))
        await pilot.press("ctrl+end")
        await wait_until(lambda: "question 19." in screen(app) and "more below" not in screen(app))
        for line in ("/tag", "/nonsense", "/retry"):
            await pilot.press("ctrl+home")
            await wait_until(lambda: "question 0." in screen(app))
            await enter(app, pilot, line)
            await wait_until(lambda: app.transcript.following)
            app.prompt.clear()
        assert texts(app, Question)[-1] == "question 19."
        await enter(app, pilot, "/one")
        await enter(app, pilot, "/two")
        await wait_until(lambda: "/two" in screen(app).split("╰")[0] and "command /one" not in screen(app))
        await pilot.press("ctrl+home")
        await wait_until(lambda: "question 0." in screen(app))
        worker.listener(Notice("by the way"))
        await wait_until(lambda: "by the way" in screen(app))
        assert not app.transcript.following


async def test_a_narrow_title_bar_still_names_the_session() -> None:
    async with chat(FakeWorker("trip"), size=(40, 12)) as (app, pilot):
        await enter(app, pilot, "hello")
        await wait_until(lambda: re.match(r" trip +4012 / 8192 tokens\s", screen(app)))
        await pilot.resize_terminal(*WIDE)
        await wait_until(lambda: re.match(r" kvchat  trip · tiny +4012 / 8192 tokens ━", screen(app)))
