"""The map of segments with the keyboard on it: choosing a turn, what is told of it, and the way to the inspector."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import Input

from kvchat.tui.map import SegmentMap
from tests.test_segment_map import figures, many, segment
from tests.tui_host import wait_until


class FakeSession:
    name = "trip"

    def episodes(self) -> list[dict[str, Any]]:
        return []


class MapApp(App[None]):
    """A map above an input."""

    CSS = "SegmentMap { height: auto; max-height: 40%; display: none; border: round red; padding: 0 1; }"
    AUTO_FOCUS = "Input"

    def __init__(self) -> None:
        super().__init__()
        self.inspected: list[int] = []

    def compose(self) -> ComposeResult:
        yield SegmentMap(id="map")
        yield Input()

    def on_segment_map_inspect(self, event: SegmentMap.Inspect) -> None:
        self.inspected.append(event.turn)

    @property
    def map(self) -> SegmentMap:
        return self.query_one(SegmentMap)

    @property
    def shown(self) -> str:
        return "\n".join("".join(part.text for part in strip) for strip in self.screen._compositor.render_strips())


@asynccontextmanager
async def showing(stats: dict[str, Any], focus: bool = True) -> AsyncIterator[tuple[MapApp, Pilot[None]]]:
    app = MapApp()
    async with app.run_test(size=(80, 24)) as pilot:
        app.map.toggle()
        await app.map.update(FakeSession(), stats)  # type: ignore[arg-type]
        if focus:
            app.map.focus()
        await pilot.pause()
        yield app, pilot


THREE = [segment(0, "memory", turns=[1, 1]), segment(1, "part", 0.25, turns=[2, 2]), segment(2, "disk", turns=[3, 3])]
TURNS = [
    {"turn": turn, "tokens": 90 + turn, "rows": 90, "bytes_in_memory": 10_000 * turn, "bytes_on_disk": 20_000}
    for turn in (1, 2, 3)
]


async def test_without_the_keyboard_no_turn_is_chosen() -> None:
    async with showing(figures(*THREE), focus=False) as (app, _):
        await wait_until(lambda: "░ on disk" in app.shown)
        assert "▲" not in app.shown and "turn 3 ·" not in app.shown


async def test_arrows_choose_turns_and_a_line_tells_of_them() -> None:
    async with showing(figures(*THREE, turns=TURNS)) as (app, pilot):
        await wait_until(lambda: "turn 3 · 93 tokens · on disk only · 30.0 kB in memory · 20.0 kB on disk" in app.shown)
        await pilot.press("left")
        await wait_until(lambda: "turn 2 · 92 tokens · 25% in memory" in app.shown)
        await pilot.press("left", "left", "left")
        await wait_until(lambda: "turn 1 · 91 tokens · all in memory" in app.shown)
        first = app.shown.splitlines()
        mark = next(line for line in first if "▲" in line).index("▲")
        assert 10 < mark < 80 // 3 + 4
        await pilot.press("end")
        await wait_until(lambda: "turn 3 ·" in app.shown)
        await pilot.press("home", "right", "enter")
        await wait_until(lambda: app.inspected == [2])


async def test_escape_leaves_the_map_and_the_mark_goes() -> None:
    async with showing(figures(*THREE)) as (app, pilot):
        await wait_until(lambda: "▲" in app.shown)
        await pilot.press("escape")
        await wait_until(lambda: app.query_one(Input).has_focus and "▲" not in app.shown)
        assert app.map.display


async def test_the_choice_stays_where_it_is_while_the_map_follows() -> None:
    async with showing(figures(*THREE, turns=TURNS)) as (app, pilot):
        await pilot.press("home")
        await wait_until(lambda: "turn 1 · 91 tokens · all in memory" in app.shown)
        less = [segment(0, "part", 0.5, turns=[1, 1]), *THREE[1:], segment(3, "memory", turns=[4, 4])]
        await app.map.update(FakeSession(), figures(*less))  # type: ignore[arg-type]
        await wait_until(lambda: "turn 1 · 100 tokens · 50% in memory" in app.shown)
        other = figures(*THREE, name="another")
        await app.map.update(FakeSession(), other)  # type: ignore[arg-type]
        await wait_until(lambda: "turn 3 · 100 tokens" in app.shown)


async def test_up_and_down_go_between_the_rows_of_a_long_map_and_it_scrolls_along() -> None:
    async with showing(figures(*many(600))) as (app, pilot):
        app.animation_level = "none"
        newest = app.map.turn
        await wait_until(lambda: f"(of turns {newest - 1}-{newest})" in app.shown and "▲" in app.shown)
        before = app.map.turn
        await pilot.press("up")
        assert 100 < before - app.map.turn < 160
        await pilot.press("down")
        assert abs(before - app.map.turn) < 2
        await pilot.press("home")
        await wait_until(lambda: "turn 1 ·" in app.shown and "▲" in app.shown)
        for _ in range(3):
            await pilot.press("down")
        await wait_until(lambda: "▲" in app.shown)
        await pilot.press("up", "enter")
        await wait_until(lambda: app.inspected and 240 < app.inspected[0] < 290)


async def test_a_map_of_nothing_inspects_nothing() -> None:
    async with showing(figures() | {"num_turns": 0}) as (app, pilot):
        await pilot.press("left", "up", "enter")
        await pilot.pause()
        assert app.inspected == [] and "nothing is there yet" in app.shown
