"""The conversation on the screen: a window of it is mounted, its place is kept, and keys act on the marked message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.screen import ModalScreen
from textual.widgets import Input

from kvchat.errors import InputError
from kvchat.tui.answer import Answer
from kvchat.tui.items import MoreBelow, Question
from kvchat.tui.plain_text import Note
from kvchat.tui.transcript import Transcript
from tests.tui_host import wait_until

ANSWER = "Answer {0}.\n\n```python\nvalue = {0}\n```\n\n```\nplain {0}\n```"


def messages(turns: int) -> list[Any]:
    def all_of_them() -> Iterator[Any]:
        yield SimpleNamespace(role="system", content="")
        for turn in range(1, turns + 1):
            yield SimpleNamespace(role="user", content=f"question {turn}.")
            yield SimpleNamespace(role="assistant", content=ANSWER.format(turn))

    return list(all_of_them())


class Host(App[None]):
    CSS = "Transcript { height: 1fr; } Input { height: 1; border: none; }"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def compose(self) -> ComposeResult:
        yield Transcript()
        yield Input()

    def on_transcript_chosen(self, event: Transcript.Chosen) -> None:
        self.told.append((event.action, event.turn))

    def on_transcript_left(self) -> None:
        self.query_one(Input).focus()

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def rows(self) -> list[str]:
        """What is on the screen, without the scrollbar."""
        strips = self.screen._compositor.render_strips()
        return ["".join(part.text for part in strip)[:58].rstrip() for strip in strips]

    @property
    def shown(self) -> str:
        return "\n".join(self.rows)


@asynccontextmanager
async def showing(turns: int, rows: int = 20) -> AsyncIterator[tuple[Host, Transcript, Pilot[None]]]:
    host = Host()
    async with host.run_test(size=(60, rows)) as pilot:
        await host.transcript.show(messages(turns))
        await pilot.pause()
        yield host, host.transcript, pilot


def mounted(transcript: Transcript) -> list[int]:
    """The turns whose questions are mounted."""
    return [question.turn for question in transcript.query(Question) if question.display]


async def settled(transcript: Transcript, pilot: Pilot[None]) -> None:
    await pilot.pause()
    await wait_until(lambda: not transcript._is_shifting)
    await pilot.pause()


async def test_a_long_session_mounts_its_end_only() -> None:
    async with showing(5000) as (host, transcript, _):
        await wait_until(lambda: "plain 5000" in host.shown)
        assert mounted(transcript)[-1] == 5000 and len(transcript.children) <= Transcript.WINDOW + 1
        assert transcript.following and not transcript.query(MoreBelow)


async def test_a_tall_screen_is_filled_and_there_is_a_page_above_it() -> None:
    async with showing(100, rows=150) as (_, transcript, pilot):
        await wait_until(lambda: transcript.max_scroll_y >= transcript.page)
        await settled(transcript, pilot)
        assert transcript.following and len(transcript.children) > Transcript.WINDOW + Transcript.STEP


async def test_no_message_is_styled_anew_when_another_is_mounted() -> None:
    async with showing(8) as (_, transcript, _):
        assert transcript.query(Answer) and not any(child._has_order_style for child in transcript.query("*"))


async def test_scrolling_up_mounts_more_and_drops_what_is_far_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transcript, "WINDOW", 12)
    monkeypatch.setattr(Transcript, "STEP", 4)
    async with showing(24) as (host, transcript, pilot):
        for _ in range(8):
            transcript.scroll_page_up()
            await settled(transcript, pilot)
        turns = mounted(transcript)
        assert turns == list(range(turns[0], turns[-1] + 1)) and turns[-1] < 24
        assert len(transcript.children) <= Transcript.WINDOW + 2 * Transcript.STEP + 1
        assert "more below" in host.shown
        for _ in range(14):
            transcript.scroll_page_down()
            await settled(transcript, pilot)
        assert transcript.following and "plain 24" in host.shown and "more below" not in host.shown


async def test_what_is_read_stays_where_it_is_while_the_window_moves() -> None:
    async with showing(100) as (host, transcript, pilot):
        transcript.scroll_page_up()
        await settled(transcript, pilot)
        before, first = host.rows[:18], transcript._first
        await transcript._shift(-1)
        await pilot.pause()
        assert transcript._first < first and host.rows[:18] == before
        await transcript.add(Note("new"))
        assert transcript.following


async def test_a_page_down_does_not_pass_what_has_only_just_been_mounted() -> None:
    async with showing(20) as (host, transcript, pilot):
        await transcript.to_beginning()
        await settled(transcript, pilot)
        while len(transcript._items) - transcript._last > Transcript.STEP:
            transcript.scroll_page_down()
            await settled(transcript, pilot)
        transcript.scroll_to(y=transcript.max_scroll_y)
        await transcript._shift(1)
        assert transcript.is_whole
        transcript.scroll_page_down()
        assert not transcript.following
        await settled(transcript, pilot)
        assert "plain 20" not in host.shown
        while not transcript.following:
            transcript.scroll_page_down()
            await settled(transcript, pilot)
        assert "plain 20" in host.shown


async def test_home_and_end_go_all_the_way() -> None:
    async with showing(100) as (host, transcript, pilot):
        transcript.focus()
        await pilot.press("home")
        await wait_until(lambda: "question 1." in host.shown)
        await settled(transcript, pilot)
        assert mounted(transcript)[0] == 1 and 100 not in mounted(transcript) and not transcript.following
        await pilot.press("end")
        await wait_until(lambda: "plain 100" in host.shown and transcript.following)


async def test_a_screen_that_lay_over_it_and_is_gone_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with showing(100) as (host, transcript, pilot):
        await settled(transcript, pilot)
        over = ModalScreen[None]()
        await host.push_screen(over)
        monkeypatch.setattr(over, "_invoke_later", lambda *_: None)  # what it was to call is lost with it
        transcript.action_scroll_home()
        await wait_until(lambda: not transcript._is_shifting)
        host.pop_screen()
        await wait_until(lambda: "question 1." in host.shown)


async def test_the_end_is_followed_until_the_user_scrolls_up() -> None:
    async with showing(30) as (host, transcript, pilot):
        answer = Answer()
        await transcript.add(Question("more?"), answer)
        for number in range(30):
            await answer.grow(f"line {number}\n\n")
        await answer._due()
        await pilot.pause()
        assert "line 29" in host.shown
        transcript.scroll_page_up()
        await settled(transcript, pilot)
        before = host.rows[:18]
        await answer.grow("line 30\n\n" * 10)
        await answer._due()
        await pilot.pause()
        assert host.rows[:18] == before and "more below" in host.shown
        await pilot.click(MoreBelow)
        await wait_until(lambda: "line 30" in host.shown and "more below" not in host.shown)


async def test_an_answer_goes_on_while_other_messages_are_shown() -> None:
    async with showing(100) as (host, transcript, pilot):
        answer = Answer()
        await transcript.add(Question("now?"), answer)
        await answer.grow("It is")
        await transcript.to_beginning()
        await pilot.pause()
        assert answer.is_attached and not answer.display and mounted(transcript)[0] == 1
        await answer.grow(" time.")
        await answer.finish(answer.text)
        await transcript.mount(Note("sealed"))
        assert "sealed" not in host.shown
        await transcript.to_end()
        await wait_until(lambda: "It is time." in host.shown and "sealed" in host.shown)
        assert [type(child) for child in transcript.children if not isinstance(child, MoreBelow)][-3:] == [
            *(Question, Answer, Note)
        ]


async def test_a_note_stays_below_the_answer_that_goes_on_when_the_user_was_elsewhere() -> None:
    async with showing(100) as (_, transcript, pilot):
        await transcript.add(Question("now?"), Answer())
        await transcript.mount(Note("a notice"))
        await transcript.to_beginning()
        await settled(transcript, pilot)
        await transcript.to_end()
        await settled(transcript, pilot)
        shown = [type(child) for child in transcript.children if not isinstance(child, MoreBelow)]
        assert shown[-3:] == [Question, Answer, Note] and mounted(transcript)[-1] == 101


async def test_a_key_while_the_window_is_left_loses_no_message() -> None:
    async with showing(100) as (host, transcript, pilot):
        await settled(transcript, pilot)
        leaving = asyncio.create_task(transcript.to_beginning())
        while not leaving.done():
            assert transcript.turn == 100  # as keys ask for it
            await asyncio.sleep(0)
        await settled(transcript, pilot)
        assert [item.text for item in transcript._items] == [one.content for one in messages(100) if one.content]
        await transcript.to_end()
        await wait_until(lambda: "plain 100" in host.shown)


async def test_what_others_mount_and_remove_is_taken_over() -> None:
    async with showing(3) as (_, transcript, pilot):
        question, answer = Question("a"), Answer("b")
        await transcript.add(question, answer)
        assert (question.turn, answer.turn, transcript.turn) == (4, 4, 4)
        assert transcript.last_reply() == [answer]
        await transcript.remove_children([question, answer])
        await transcript.mount(Note("c"))
        assert transcript.turn == 3
        await transcript.remove_children()
        await pilot.pause()
        assert transcript.turn == 0 and not transcript.children
        await transcript.add(Question("d"))
        assert transcript.turn == 1


async def test_keys_mark_a_message_and_say_what_to_do_with_its_turn() -> None:
    async with showing(20) as (host, transcript, pilot):
        transcript.focus()
        await pilot.press("up", "i")
        assert host.told == [("inspect", 20)]
        await pilot.press("up", "up", "up", "e", "f")
        assert host.told[1:] == [("edit", 19), ("fork", 19)]
        marked = transcript.query_one(".-marked")
        assert isinstance(marked, Question) and marked.text == "question 19." and marked.text in host.shown
        await pilot.press("escape")
        assert host.query_one(Input).has_focus and not transcript.query(".-marked")


@pytest.mark.parametrize(
    ("keys", "copied"),
    [
        (["c"], ANSWER.format(20)),
        (["up", "up", "up", "c"], ANSWER.format(19)),
        (["q"], "question 20."),
        (["1"], "value = 20"),
        (["up", "up", "up", "2"], "plain 19"),
    ],
)
async def test_answers_code_and_questions_are_copied(keys: list[str], copied: str) -> None:
    async with showing(20) as (host, transcript, pilot):
        transcript.focus()
        await pilot.press(*keys)
        assert host.clipboard == copied


async def test_copying_works_without_the_focus_and_says_what_is_missing() -> None:
    async with showing(2) as (host, transcript, pilot):
        assert transcript.copy("code") == host.clipboard == "plain 2"
        with pytest.raises(InputError, match="2 blocks of code"):
            transcript.copy("code", 3)
        transcript.focus()
        await pilot.press("9")
        assert host.clipboard == "plain 2" and len(host._notifications) == 1
        await transcript.show([])
        with pytest.raises(InputError, match="no answer to copy"):
            transcript.copy()


async def test_what_is_copied_cannot_drive_a_terminal_and_is_whole() -> None:
    async with showing(1) as (host, transcript, _):
        await transcript.add(Answer("\x1b[201~" + "x" * 9000))
        assert transcript.copy() == host.clipboard == "␛[201~" + "x" * 9000


async def test_reasoning_opens_by_a_key() -> None:
    async with showing(1) as (host, transcript, pilot):
        await transcript.add(Answer("<think>\nhidden words\n</think>\nSeen."))
        transcript.focus()
        await pilot.press("t")
        await wait_until(lambda: "hidden words" in host.shown)


@pytest.mark.parametrize("turn", [1, 2500, 4990, 5000])
async def test_it_goes_to_a_turn_of_a_long_session(turn: int) -> None:
    async with showing(5000) as (host, transcript, pilot):
        await transcript.go_to(turn)
        await settled(transcript, pilot)
        await wait_until(lambda: f"question {turn}." in host.shown)
        assert len(transcript.children) <= Transcript.WINDOW + 2 * Transcript.STEP + 1
        if turn < 5000:
            await wait_until(lambda: f"question {turn}." in "".join(host.rows[:2]))
            assert not transcript.following
        await transcript.add(Note("new"))
        await wait_until(lambda: "new" in host.shown)
        assert transcript.following


async def test_it_stays_where_it_is_if_there_is_no_such_turn() -> None:
    async with showing(3) as (_, transcript, pilot):
        await transcript.go_to(None)
        await transcript.go_to(4)
        await settled(transcript, pilot)
        assert transcript.following and not transcript.query(".-found")
