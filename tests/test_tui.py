"""The chat screen, driven by keys, over a fake engine: turns, from the message to the numbers below the answer."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest

from kvchat.errors import CapacityError, ModelError
from kvchat.events import Delta, Event, Notice, Progress, Timings, TurnDone, Usage
from kvchat.tui.answer import Answer
from kvchat.tui.items import Question
from kvchat.tui.numbers import Speed, speed_of
from kvchat.tui.plain_text import Note
from tests.tui_parts import NARROW, FakeSession, FakeWorker, chat, done, enter, idle, screen, texts, wait_until, words

__all__ = ["NARROW", "FakeSession", "FakeWorker", "chat", "enter", "screen", "texts", "wait_until"]


async def test_two_turns_are_streamed_in_full() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await enter(app, pilot, "one two three")
        await enter(app, pilot, "and four")
        assert texts(app, Question) == ["one two three", "and four"]
        assert texts(app, Answer) == ["echo: one two three", "echo: and four"]
        assert [answer.source for answer in app.query(Answer)] == texts(app, Answer)
        assert app.prompt.text == ""


async def test_text_is_on_the_screen_before_the_answer_is_complete() -> None:
    worker = FakeWorker("trip")

    def slow() -> Iterator[Event]:
        yield Delta("```python\nx = 1\n")
        assert release.wait(10)
        yield Delta("y = 2\n```\n")
        yield done("```python\nx = 1\ny = 2\n```\n")

    release = threading.Event()
    worker.all["trip"].script = slow()  # type: ignore[assignment]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "code", wait=False)
        await wait_until(lambda: "x = 1" in screen(app))
        release.set()
        await idle(app)
        await wait_until(lambda: "y = 2" in screen(app))
        assert "```" not in screen(app)


async def test_the_numbers_of_a_turn_come_at_once_and_those_of_the_seal_after_it() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        worker.all["trip"].sealed.clear()
        await enter(app, pilot, "hello")
        assert texts(app, Note)[-1] == "cached 3912 · prefilled 41 · sealing…"
        worker.all["trip"].sealed.set()
        expected = "cached 3912 · prefilled 41 · kept 1204/3953 pairs · 18 MB · sealed 0.4 s"
        await wait_until(lambda: texts(app, Note)[-1] == expected)
        await wait_until(lambda: "4012 / 8192 tokens" in screen(app))


async def test_typing_and_queueing_work_while_the_engine_is_silent() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "first", wait=False)
        await pilot.press(*"second")
        assert app.prompt.text == "second"
        await pilot.press("enter")
        await enter(app, pilot, "third", wait=False)
        assert "next: second" in screen(app) and "then: third" in screen(app) and app.prompt.text == ""
        worker.all["trip"].gate.set()
        await wait_until(lambda: len(texts(app, Answer)) == 3 and not app.jobs.busy)
        assert texts(app, Question) == ["first", "second", "third"]
        assert "next:" not in screen(app)


async def test_of_many_waiting_messages_the_first_and_the_newest_are_shown() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].gate.clear()
    async with chat(worker) as (app, pilot):
        for number in range(8):
            await enter(app, pilot, f"message {number}\nof two lines", wait=False)
        shown = [line.split("  ")[1] for line in screen(app).splitlines() if "of two lines" in line]
        assert "next: message 1 of two lines" in screen(app) and "then: message 7 of two lines" in screen(app)
        assert "3 more" in screen(app) and len(shown) >= 4


async def test_escape_takes_back_waiting_messages_then_stops_the_answer() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        worker.all["trip"].gate.clear()
        await enter(app, pilot, "long story", wait=False)
        await enter(app, pilot, "next one", wait=False)
        await enter(app, pilot, "another", wait=False)
        await pilot.press("escape")
        assert app.prompt.text == "another" and app.jobs.busy and "next: next one" in screen(app)
        app.prompt.text = "a draft"
        await pilot.press("escape")
        assert app.prompt.text == "next one\na draft" and app.jobs.busy
        await pilot.press("escape")
        await idle(app)
        assert app.prompt.text == "next one\na draft"
        assert any(note.startswith("stopped · cached") for note in texts(app, Note))


async def test_what_waits_returns_when_the_answer_fails() -> None:
    worker = FakeWorker("trip")
    trip = worker.all["trip"]
    trip.script = [RuntimeError("boom")]
    trip.gate.clear()
    async with chat(worker) as (app, pilot):
        for text in ("one", "two", "three"):
            await enter(app, pilot, text, wait=False)
        trip.gate.set()
        await idle(app)
        assert app.prompt.text == "two\nthree\none" and app.waiting.texts == []


async def test_a_message_typed_before_the_model_is_loaded_is_sent_afterwards() -> None:
    worker = FakeWorker("trip")
    worker.ready.clear()
    async with chat(worker, wait=False) as (app, pilot):
        await wait_until(lambda: worker.connected)
        worker.listener(Progress("download", 40_000_000, 98_000_000))
        await wait_until(lambda: "downloading the model 40 of 98 MB" in screen(app))
        await enter(app, pilot, "hello", wait=False)
        assert texts(app, Question) == []
        worker.ready.set()
        await wait_until(lambda: texts(app, Answer) == ["echo: hello"])


async def test_progress_and_notices_are_shown() -> None:
    worker = FakeWorker("trip")
    release = threading.Event()

    def slow() -> Iterator[Event]:
        yield Progress("prefill", 100, 4000)
        yield Notice("turn 3 was [b]damaged[/b] and is computed again")
        assert release.wait(10)
        yield from words("fine")

    worker.all["trip"].script = slow()  # type: ignore[assignment]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await wait_until(lambda: "reading 100 of 4000 tokens" in screen(app))
        assert "turn 3 was [b]damaged[/b] and is computed again" in texts(app, Note)
        assert len(app.app._notifications) == 1
        release.set()
        await idle(app)
        await wait_until(lambda: "reading" not in screen(app))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CapacityError("the message has 9000 tokens, the window has room for 180"), "the message has 9000 tokens"),
        (RuntimeError("out of memory"), "internal error: RuntimeError: out of memory"),
    ],
)
async def test_a_message_that_was_not_sent_returns_to_the_input(error: Exception, line: str) -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].script = [error]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "precious words")
        assert app.prompt.text == "precious words"
        assert texts(app, Question) == texts(app, Answer) == []
        assert texts(app, Note)[-1].startswith(line)
        worker.all["trip"].script = None
        await pilot.press("enter")
        await wait_until(lambda: texts(app, Answer) == ["echo: precious words"])


async def test_a_message_that_was_saved_before_the_error_stays_and_can_be_answered() -> None:
    worker = FakeWorker("trip")
    worker.all["trip"].saves_first = True
    worker.all["trip"].script = [RuntimeError("boom")]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "precious words")
        assert texts(app, Question) == ["precious words"] and app.prompt.text == ""
        assert any("/retry" in note for note in texts(app, Note))


async def test_a_model_that_cannot_be_loaded_is_one_line_and_nothing_typed_is_lost() -> None:
    worker = FakeWorker("trip")
    worker.ready.clear()
    worker.error = ModelError("there is no model 'x'")
    async with chat(worker, wait=False) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        worker.ready.set()
        await idle(app)
        assert texts(app, Note)[-1] == "there is no model 'x'" and app.prompt.text == "hello"
        await pilot.press("enter")
        assert app.prompt.text == "hello" and "no session is open" in texts(app, Note)[-1]


async def test_resuming_shows_the_history_and_closes_the_other_session() -> None:
    worker = FakeWorker("trip", "work")
    worker.all["work"].say("system", "be brief")
    worker.all["work"].say("user", "how much?")
    worker.all["work"].say("assistant", "**ten**")
    async with chat(worker) as (app, pilot):
        await pilot.press("ctrl+l", "down", "enter")
        await wait_until(lambda: not app.jobs.busy and app.session_name == "work")
        assert (texts(app, Note), texts(app, Question)) == (["system: be brief"], ["how much?"])
        assert texts(app, Answer) == ["**ten**"] and "**" not in screen(app)
        assert worker.all["trip"].closed and "work · tiny" in screen(app)
        assert app.prompt.has_focus


async def test_a_long_history_shows_its_newest_messages_and_the_others_on_request() -> None:
    worker = FakeWorker("trip")
    for turn in range(60):
        worker.all["trip"].say("user", f"question {turn}")
        worker.all["trip"].say("assistant", f"answer {turn}")
    async with chat(worker) as (app, _):
        await wait_until(lambda: "answer 59" in screen(app))
        assert texts(app, Question)[-1] == "question 59" and len(texts(app, Question)) < 30
        app.transcript.action_scroll_home()
        await wait_until(lambda: "question 0 " in screen(app))


async def test_what_the_model_says_cannot_drive_the_terminal_nor_the_markup() -> None:
    worker = FakeWorker("trip")
    text = "\x1b]0;owned\x07 and [red]this[/red] <think>too</think>\x9b2J"
    worker.all["trip"].script = [Delta(text[:1]), Delta(text[1:]), done(text)]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello [link=x]\x1b[2J")
        await wait_until(lambda: "␛]0;owned␇ and [red]this[/red] <think>too</think>�2J" in screen(app))
        assert "hello [link=x]␛[2J" in screen(app)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", screen(app).replace("\n", ""))


async def test_a_message_may_have_several_lines() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        await pilot.press("a", "ctrl+j", "b", "enter")
        await wait_until(lambda: texts(app, Question) == ["a\nb"])


async def test_a_message_is_edited_and_its_turn_said_anew() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        for text in ("one", "two", "three"):
            await enter(app, pilot, text)
        app.prompt.text = "a draft"
        app.action_command("/edit 2")
        await idle(app)
        assert app.prompt.text == "two"
        await wait_until(lambda: "editing turn 2" in screen(app))
        await enter(app, pilot, "two, but better")
        assert worker.all["trip"].asked == [("edit", 2, "two, but better")]
        assert texts(app, Question) == ["one", "two, but better"]
        assert texts(app, Answer) == ["echo: one", "echo: two, but better"]
        assert app.prompt.text == "a draft" and "editing" not in screen(app)


async def test_escape_leaves_the_edited_message_as_it_is() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")
        app.prompt.text = "a draft"
        await pilot.press("ctrl+e")
        await wait_until(lambda: app.prompt.text == "one")
        await pilot.press("x", "escape")
        assert app.prompt.text == "a draft" and texts(app, Question) == ["one"] and not worker.all["trip"].asked


async def test_a_click_on_a_message_edits_it() -> None:
    async with chat(FakeWorker("trip")) as (app, pilot):
        for text in ("one", "two"):
            await enter(app, pilot, text)
        await pilot.click(app.transcript.query(Question).first())
        await wait_until(lambda: app.prompt.text == "one" and app.editing and app.editing.turn == 1)


async def test_an_edit_that_fails_shows_what_was_there_and_gives_the_text_back() -> None:
    worker = FakeWorker("trip")
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "one")

        def edit(turn: int, text: str) -> Iterator[Event]:
            raise CapacityError("the window has no room for 9000 tokens")

        worker.all["trip"].edit = edit  # type: ignore[method-assign]
        await pilot.press("ctrl+e")
        await wait_until(lambda: app.prompt.text == "one")
        await enter(app, pilot, "one and much more")
        assert texts(app, Question) == ["one"] and texts(app, Answer) == ["echo: one"]
        assert app.prompt.text == "one and much more" and "no room" in texts(app, Note)[-1]


async def test_a_cut_answer_goes_on_where_it_ended() -> None:
    worker = FakeWorker("trip")
    trip = worker.all["trip"]
    trip.script = [Delta("```python\nx = 1\n"), done("```python\nx = 1\n", "length")]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "code")
        assert any(note.startswith("cut at max_new_tokens") for note in texts(app, Note))
        trip.script = [Delta("y = 2\n```\n"), done("y = 2\n```\n")]
        await enter(app, pilot, "/continue")
        assert texts(app, Answer) == ["```python\nx = 1\ny = 2\n```\n"]
        await wait_until(lambda: "y = 2" in screen(app) and "```" not in screen(app))
        assert not any(note.startswith("cut at") for note in texts(app, Note))
        trip.script = [RuntimeError("boom")]
        await enter(app, pilot, "/continue")
        assert len(texts(app, Answer)) == 1 and "boom" in texts(app, Note)[-1]


async def test_the_speed_is_told_while_an_answer_is_written_and_after_it() -> None:
    worker = FakeWorker("trip")
    release = threading.Event()

    def slow() -> Iterator[Event]:
        yield from (Delta("one "), Delta("two "))
        assert release.wait(10)
        yield TurnDone("one two ", Usage(3953, 3912, 41, 3), Timings(0.0, 0.5, (0.125, 0.125)), "stop")

    worker.all["trip"].script = slow()  # type: ignore[assignment]
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await wait_until(lambda: "answering… " in screen(app) and "tokens/s · first text" in screen(app))
        release.set()
        await idle(app)
        await wait_until(lambda: "8.0 tokens/s · first text 0.5 s" in screen(app))


def test_the_speed_counts_tokens_after_the_first() -> None:
    speed = Speed(began=10.0)
    assert str(speed) == ""
    for now in (12.0, 12.5, 13.0):
        speed.count(now)
    assert str(speed) == "2.0 tokens/s · first text 2.0 s"
    assert speed_of(Timings(0.0, 2.0, ())) == "first text 2.0 s"


async def test_the_meters_say_where_the_kv_lies() -> None:
    async with chat(FakeWorker("trip")) as (app, _):
        await wait_until(lambda: "KV 18 MB · disk 4.1 MB · keep 0.5" in screen(app))
