"""The segment map on the chat screen, and what else it says of a conversation that outgrows its window."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvchat.events import Delta, Notice, Timings, TurnDone, Usage
from kvchat.tui.bars import StatusBar
from kvchat.tui.plain_text import Note
from tests.test_segment_map import MIXED, many, segment
from tests.tui_parts import NARROW, FakeSession, FakeWorker, chat, enter, screen, texts, wait_until

REBASED = "the model's window of 8192 tokens was full: the conversation goes on at position 5120 [b]x[/b]"


class LongSession(FakeSession):
    """A session of many segments, re-based once `offset` is not 0."""

    def __init__(self, worker: FakeWorker, name: str) -> None:
        super().__init__(worker, name)
        self.segments, self.offset, self.seen = list[dict[str, Any]](MIXED), 0, 4012
        self.named = [{"name": "dogs park", "turns": (1, 2, 3)}, {"name": "lisbon [red]train", "turns": (4, 5, 6)}]
        self.asked: list[threading.Thread] = []

    def episodes(self) -> list[dict[str, Any]]:
        self.asked.append(threading.current_thread())
        return self.named

    def stats(self) -> dict[str, Any]:
        moved = {"offset": self.offset, "position": self.seen - self.offset, "rebased": self.offset > 0}
        return super().stats() | moved | {"segments": self.segments, "num_seen": self.seen, "num_tokens": self.seen}


def answered(text: str, recalled: tuple[int, ...], prompt: int = 3953) -> list[Any]:
    usage = Usage(prompt, prompt - 41, 41, 59, recalled)
    return [Delta(text), TurnDone(text, usage, Timings(0.0, 0.1, ()), "stop")]


@pytest.fixture
def worker() -> FakeWorker:
    worker = FakeWorker()
    worker.all["trip"] = LongSession(worker, "trip")
    return worker


def session(worker: FakeWorker) -> LongSession:
    found = worker.all["trip"]
    assert isinstance(found, LongSession)
    return found


@pytest.mark.parametrize("key", ["f3", "ctrl+g"])
async def test_a_key_shows_the_map_and_hides_it(worker: FakeWorker, key: str) -> None:
    async with chat(worker) as (app, pilot):
        assert "in memory  ░" not in screen(app) and session(worker).asked == []
        await pilot.press(key)
        await wait_until(lambda: "█ in memory  ░ on disk  × text only" in screen(app))
        assert app.prompt.has_focus
        await wait_until(lambda: "a dogs park (3)  b lisbon [red]train (3)" in screen(app))
        assert threading.main_thread() not in session(worker).asked
        await pilot.press(key)
        await wait_until(lambda: "dogs park" not in screen(app))


async def test_the_map_can_be_asked_for_while_the_model_answers(worker: FakeWorker) -> None:
    session(worker).gate.clear()
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "hello", wait=False)
        await enter(app, pilot, "/map", wait=False)
        await wait_until(lambda: "░ on disk" in screen(app))
        session(worker).gate.set()
        await wait_until(lambda: not app.jobs.busy)


async def test_the_map_follows_each_turn_and_names_are_sorted_anew_only_now_and_then(worker: FakeWorker) -> None:
    trip = session(worker)
    for turn in range(8):
        trip.say("user", f"question {turn}")
        trip.say("assistant", "answer")
    async with chat(worker) as (app, pilot):
        await pilot.press("f3")
        await wait_until(lambda: len(trip.asked) == 1 and "░ on disk" in screen(app))
        trip.segments = [segment(0, "disk", turns=[1, 9])]
        await enter(app, pilot, "one")
        await wait_until(lambda: "in memory" not in screen(app).split("segments")[1].split("newest")[0])
        assert len(trip.asked) == 1
        await enter(app, pilot, "two")
        await wait_until(lambda: len(trip.asked) == 2)


async def test_a_long_map_takes_a_part_of_the_screen_and_shows_its_end(worker: FakeWorker) -> None:
    session(worker).segments = many(3000)
    async with chat(worker, size=NARROW) as (app, pilot):
        await pilot.press("f3")
        await wait_until(lambda: "^ recalled" in screen(app) or "a dogs park" in screen(app))
        assert app.segment_map.size.height <= 8 and app.prompt.has_focus
        await pilot.resize_terminal(100, 40)
        await wait_until(lambda: app.segment_map.size.height > 8)
        longest = max(len(line.rstrip()) for line in screen(app).splitlines())
        assert longest <= 100


async def test_names_on_the_map_can_neither_be_markup_nor_drive_the_terminal(worker: FakeWorker) -> None:
    session(worker).named = [{"name": "[b]x[/b]\x1b[2J\nsecond line", "turns": (1,)}]
    async with chat(worker) as (app, pilot):
        await pilot.press("f3")
        await wait_until(lambda: "a [b]x[/b]␛[2J second line (1)" in screen(app))
        assert "\x1b" not in screen(app)


async def test_the_turn_line_says_what_was_recalled(worker: FakeWorker) -> None:
    trip = session(worker)
    trip.script = answered("yes", (100, 300))
    async with chat(worker) as (app, pilot):
        trip.sealed.clear()
        await enter(app, pilot, "what was it?")
        assert texts(app, Note)[-1] == "cached 3912 · prefilled 41 · recalled 2 segments · sealing…"
        trip.sealed.set()
        await wait_until(lambda: "recalled turns 3-4, 7-8 · kept" in texts(app, Note)[-1])


async def test_the_meter_is_of_the_window_and_a_rebase_is_told_in_the_status_line(worker: FakeWorker) -> None:
    trip = session(worker)
    trip.seen, trip.offset = 231_012, 225_802
    async with chat(worker) as (app, pilot):
        await wait_until(lambda: "5210 / 8192 in the window, 231k in all" in screen(app))
        trip.script = [Notice(REBASED), *answered("yes", (), prompt=235_000)]
        trip.seen, trip.offset = 235_059, 229_939
        trip.sealed.clear()
        await enter(app, pilot, "go on")
        status = app.query_one(StatusBar)
        assert "goes on at position 5120 [b]x[/b]" in str(status.query_one("#told").render())
        assert REBASED in texts(app, Note)
        assert "5210 / 8192" in screen(app)  # more than the window: what it was until the figures come
        trip.sealed.set()
        await wait_until(lambda: "5120 / 8192 in the window, 235k in all" in screen(app))
        trip.script = None
        await enter(app, pilot, "and on")
        assert str(status.query_one("#told").render()) == "KV 18 MB · disk 4.1 MB · keep 0.5"


async def test_stats_tell_the_window_from_the_whole(worker: FakeWorker) -> None:
    trip = session(worker)
    trip.seen, trip.offset = 231_012, 225_802
    async with chat(worker) as (app, pilot):
        await enter(app, pilot, "/stats")
        assert "5210 of 8192 tokens in the window, 231012 in all (re-based)" in texts(app, Note)[-1]
