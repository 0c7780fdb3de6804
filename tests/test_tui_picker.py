"""The session picker, driven by keys, over a fake engine."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from textual.events import Paste
from textual.pilot import Pilot

from kvchat.errors import InputError, SessionExists
from kvchat.store.records import Message, SearchHit, SessionInfo
from kvchat.tui.asking import Fields, Line, YesNo
from kvchat.tui.entries import FOUND, marked
from kvchat.tui.finding import ORDERS, Letters, Query, select
from kvchat.tui.picker import Picked, SessionPicker
from kvchat.tui.rows import Rows
from tests.tui_host import NARROW, WIDE, Host, hosting, wait_until

NOW = datetime.now(UTC)
HOSTILE = "\x1b]0;owned\x07[bold red]x[/]\u202e\x9b2J\r\nend"
SAFE = "␛]0;owned␇[bold red]x[/]��2J end"


def info(name: str, title: str = "", **rest: Any) -> SessionInfo:
    hours = rest.pop("hours", 1)
    stamp = (NOW - timedelta(hours=hours)).isoformat()
    what = {"tip": "t", "created": stamp, "updated": stamp, "num_turns": 3, "num_tokens": 4100, "nbytes": 3_200_000}
    return SessionInfo(**{"id": 1, "name": name, "model": "tiny", "fingerprint": {}, "title": title, **what, **rest})


def new(**values: Any) -> SessionInfo:
    return info(**{"stored": 1.0, "settings": {}, **values})


class FakeEngine:
    """Sessions in a list; every call must come from a thread."""

    def __init__(self, *infos: SessionInfo) -> None:
        self.all = list(infos)
        self.searched: list[str] = []
        self.hits: list[SearchHit] = []
        self.ready = threading.Event()
        self.ready.set()

    def _called(self) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert self.ready.wait(10)

    def sessions(self) -> list[SessionInfo]:
        self._called()
        return list(self.all)

    def search(self, text: str) -> list[SearchHit]:
        self._called()
        self.searched.append(text)
        return self.hits

    def delete(self, name: str) -> None:
        self._called()
        self.all = [one for one in self.all if one.name != name]

    def rename(self, name: str, new: str) -> None:
        self._called()
        if any(one.name == new for one in self.all):
            raise SessionExists(f"a session named {new!r} is there already")
        self._replace(name, name=new)

    def retitle(self, name: str, title: str) -> None:
        self._called()
        self._replace(name, title=title)

    def tag(self, name: str, tags: list[str]) -> None:
        self._called()
        if any(len(tag) > 64 for tag in tags):
            raise InputError("a tag has at most 64 characters")
        self._replace(name, tags=tuple(tags))

    def _replace(self, which: str, **values: Any) -> None:
        self.all = [replace(one, **values) if one.name == which else one for one in self.all]

    def preview(self, name: str) -> list[Message]:
        self._called()
        said = ("user", f"question of {name}"), ("assistant", f"answer of {name} {HOSTILE}")
        return [Message(str(n), None, role, text, (), (0, 0)) for n, (role, text) in enumerate(said)]  # type: ignore[arg-type]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(
        new(name="a", title="Trip to Lisbon", hours=2, tags=("travel",), num_branches=2),
        new(name="b", title="Rust lifetimes", hours=50, tags=("work", "rust"), num_turns=40),
        new(name="c", title="Garden in winter", hours=400, nbytes=90_000_000),
    )


@asynccontextmanager
async def picking(
    engine: FakeEngine, size: tuple[int, int] = NARROW, **how: Any
) -> AsyncIterator[tuple[SessionPicker, Pilot[None]]]:
    picker = SessionPicker(engine, "a", **how)  # type: ignore[arg-type]
    async with hosting(picker, size) as (_, pilot):
        try:
            if engine.ready.is_set():
                await wait_until(lambda: (picker._is_complete and picker.rows.chosen is not None) or not engine.all)
            yield picker, pilot
        finally:
            engine.ready.set()


def results(picker: SessionPicker) -> list[Picked | None]:
    assert isinstance(picker.app, Host)
    return picker.app.results


def text(picker: SessionPicker) -> str:
    assert isinstance(picker.app, Host)
    return picker.app.shown


def names(picker: SessionPicker) -> list[str]:
    return [one.name for one in picker._found]  # type: ignore[union-attr]


def fill(picker: SessionPicker, *values: str) -> None:
    for line, value in zip(picker.app.screen.query(Line), values, strict=True):
        line.value = value


async def test_all_sessions_are_shown_with_their_facts_and_enter_opens_one(engine: FakeEngine) -> None:
    async with picking(engine) as (picker, pilot):
        await wait_until(lambda: "● Trip to Lisbon" in text(picker))
        shown = text(picker)
        assert "❯ ● Trip to Lisbon" in shown and "2 h" in shown and "2 d" in shown and "16 d" in shown
        assert "a · 3 turns · 4100 tokens · 3.2 MB · 2 branches" in shown and "#work #rust" in shown
        assert "3 sessions · 96.4 MB of KV on disk · last used first" in shown
        await pilot.press("down", "down", "up", "enter")
        assert results(picker) == [Picked("b")]


async def test_letters_filter_and_are_highlighted(engine: FakeEngine) -> None:
    async with picking(engine) as (picker, pilot):
        await pilot.press(*"rslf")
        await wait_until(lambda: names(picker) == ["b"])
        assert "1 of 3 session" in text(picker) and "Trip" not in text(picker)
        (drawn, *_) = picker.rows._draw(0, 60)
        lit = {drawn.plain[span.start : span.end] for span in drawn.spans if span.style == FOUND}
        assert lit == {"R", "s", "l", "f"}
        await pilot.press("enter")
        assert results(picker) == [Picked("b")]


async def test_a_tag_filters_and_orders_change(engine: FakeEngine) -> None:
    async with picking(engine) as (picker, pilot):
        await pilot.press(*"#ru")
        await wait_until(lambda: names(picker) == ["b"])
        await pilot.press("ctrl+u")
        await wait_until(lambda: names(picker) == ["a", "b", "c"])
        orders = []
        for _ in ORDERS:
            await pilot.press("ctrl+o")
            orders.append("".join(names(picker)))
        assert orders == ["cba", "bac", "cab", "abc"]


async def test_what_was_said_is_searched_in_a_thread_and_found_words_are_marked(engine: FakeEngine) -> None:
    engine.hits = [
        SearchHit("b", 7, "assistant", "the borrow checker", ((4, 10),)),
        SearchHit("c", None, "user", "borrow a spade", ((0, 6),)),
    ]
    async with picking(engine) as (picker, pilot):
        await pilot.press("slash", *"borrow")
        found = ("2 messages in 2 sessions", "Rust lifetimes", "model · turn 7", "you · on an old branch")
        await wait_until(lambda: all(words in text(picker) for words in found))
        assert engine.searched[-1] == "borrow"
        drawn = picker.rows._draw(0, 60)[1]
        assert [drawn.plain[span.start : span.end] for span in drawn.spans if span.style == FOUND] == ["borrow"]
        await pilot.press("enter")
        assert results(picker) == [Picked("b", "open", 7)]


async def test_a_key_turns_the_search_on_and_off_and_tags_narrow_it(engine: FakeEngine) -> None:
    engine.hits = [SearchHit(name, 1, "user", "seed", ((0, 4),)) for name in "abc"]
    async with picking(engine) as (picker, pilot):
        picker.query_line.value = "seed #work"
        await pilot.press("ctrl+f")
        await wait_until(lambda: "1 message in 1 session ·" in text(picker))
        assert engine.searched[-1] == "seed"
        await pilot.press("ctrl+f")
        await wait_until(lambda: "No session is called that" in text(picker))


async def test_it_may_begin_with_a_search(engine: FakeEngine) -> None:
    engine.hits = [SearchHit("b", 7, "assistant", "borrow it", ((0, 6),))]
    async with picking(engine, query="/borrow") as (picker, _):
        await wait_until(lambda: "borrow it" in text(picker))
        assert {*engine.searched} == {"borrow"} and picker.query_line.value == "/borrow"


async def test_deleting_asks_first_and_the_open_session_stays(engine: FakeEngine) -> None:
    async with picking(engine) as (picker, pilot):
        await pilot.press("ctrl+d")
        assert "this session is open" in text(picker)
        await pilot.press("down", "ctrl+d")
        await wait_until(lambda: isinstance(picker.app.screen, YesNo))
        assert "Delete “Rust lifetimes”?" in text(picker) and "b: 40 turns" in text(picker)
        await pilot.press("enter")  # the button that is chosen at first keeps it
        await wait_until(lambda: picker.app.screen is picker)
        assert len(engine.all) == 3
        await pilot.press("ctrl+d")
        await wait_until(lambda: isinstance(picker.app.screen, YesNo))
        await pilot.press("y")
        await wait_until(lambda: names(picker) == ["a", "c"] and "deleted b" in text(picker))
        assert picker.rows.chosen == 1 and results(picker) == []


async def test_title_name_and_tags_are_changed_in_place(engine: FakeEngine) -> None:
    async with picking(engine) as (picker, pilot):
        await pilot.press("down", "f2")
        await wait_until(lambda: isinstance(picker.app.screen, Fields))
        fill(picker, "Borrowing", "b2")
        await pilot.press("enter")
        await wait_until(lambda: "Borrowing" in text(picker) and "b2 · 40 turns" in text(picker))
        await wait_until(lambda: picker.rows.chosen == 1)
        await pilot.press("ctrl+t")
        await wait_until(lambda: isinstance(picker.app.screen, Fields))
        fill(picker, "#new old")
        await pilot.press("enter")
        await wait_until(lambda: "#new #old" in text(picker))
        assert engine.all[1].tags == ("new", "old") and engine.all[1].name == "b2"


async def test_a_name_that_is_taken_is_one_line_and_nothing_is_lost(engine: FakeEngine) -> None:
    async with picking(engine) as (picker, pilot):
        await pilot.press("f2")
        await wait_until(lambda: isinstance(picker.app.screen, Fields))
        await pilot.press("tab", "ctrl+u", "b", "enter")
        await wait_until(lambda: "a session named 'b' is there already" in text(picker))
        assert picker.state.has_class("-error") and names(picker) == ["a", "b", "c"]


async def test_the_preview_is_there_when_there_is_room(engine: FakeEngine) -> None:
    async with picking(engine, WIDE, preview=engine.preview) as (picker, pilot):
        await wait_until(lambda: "question of a" in text(picker))
        await pilot.press("down")
        await wait_until(lambda: "question of b" in text(picker) and "question of a" not in text(picker))
        assert "100% of its KV is saved" in text(picker)
        await pilot.resize_terminal(*NARROW)
        await wait_until(lambda: "question of b" not in text(picker))
        assert "Rust lifetimes" in text(picker)


async def test_an_empty_store_says_how_to_begin() -> None:
    async with picking(FakeEngine()) as (picker, pilot):
        await wait_until(lambda: "There are no sessions yet. Ctrl+N begins one." in text(picker))
        await pilot.press("enter", "ctrl+d", "f2", "ctrl+t", "down")
        assert results(picker) == [] and picker.app.screen is picker
        picker.query_line.value = "my trip"
        await pilot.press("ctrl+n")
        assert results(picker) == [Picked("my trip", "new")]


async def test_while_the_engine_is_busy_known_sessions_are_shown(engine: FakeEngine) -> None:
    engine.ready.clear()
    async with picking(engine) as (picker, _):
        assert "while the model is busy" in text(picker)
        engine.ready.set()
        await wait_until(lambda: "Garden in winter" in text(picker))
    engine.ready.clear()
    async with picking(engine, known=engine.all[:2]) as (picker, pilot):
        await wait_until(lambda: "Rust lifetimes" in text(picker))
        engine.ready.set()
        await wait_until(lambda: "Garden in winter" in text(picker))
        await pilot.press("escape")
        assert results(picker) == [None]


async def test_hostile_names_titles_tags_and_hits_are_inert() -> None:
    engine = FakeEngine(new(name=HOSTILE, title=HOSTILE, tags=("[blink]\x1b[5m",)))
    engine.hits = [SearchHit(HOSTILE, 1, "user", HOSTILE, ((0, 4), (9, 14)))]
    async with picking(engine, WIDE, preview=engine.preview) as (picker, pilot):
        await wait_until(lambda: f"question of {SAFE[:9]}" in text(picker))
        shown = text(picker)
        assert f"❯ {SAFE}" in shown and "#[blink]␛[5m" in shown and f"answer of {SAFE[:9]}" in shown
        for keys in (["ctrl+d"], ["f2"], ["ctrl+t"]):
            await pilot.press(*keys)
            await wait_until(lambda: picker.app.screen is not picker)
            await pilot.pause()
            shown += text(picker)
            await pilot.press("escape")
            await wait_until(lambda: picker.app.screen is picker)
        await pilot.press("slash", "x")
        await wait_until(lambda: "1 message" in text(picker))
        shown += text(picker)
        assert shown.count("[bold red]x[/]") > 8
        assert not any(char in shown for char in "\x1b\x07\x9b\u202e\r")


async def test_what_is_pasted_into_a_field_is_made_safe() -> None:
    async with picking(FakeEngine()) as (picker, _):
        picker.query_one(Line).post_message(Paste("a\x1b[2J\u202eb"))
        await wait_until(lambda: picker.query_one(Line).value == "a␛[2J�b")


async def test_unchanged_fields_are_not_written_back_made_safe() -> None:
    engine = FakeEngine(new(name=HOSTILE, title=HOSTILE))
    async with picking(engine) as (picker, pilot):
        await pilot.press("f2")
        await wait_until(lambda: isinstance(picker.app.screen, Fields))
        await pilot.press("ctrl+u", "x", "enter")
        await wait_until(lambda: picker.app.screen is picker and engine.all[0].title == "x")
        assert engine.all[0].name == HOSTILE


async def test_of_ten_thousand_rows_only_those_to_be_seen_are_drawn() -> None:
    engine = FakeEngine(*(new(name=f"s{number}", title=f"title {number}") for number in range(10_000)))
    async with picking(engine) as (picker, pilot):
        drawn = set[int]()
        draw = picker.rows._draw
        picker.rows._draw = lambda index, width: [*draw(index, width), *(drawn.add(index) or ())]  # type: ignore[func-returns-value]
        picker.rows.redraw()
        await pilot.press("pagedown", "ctrl+end")
        await wait_until(lambda: 9999 in drawn)
        await wait_until(lambda: "❯ title 9999" in text(picker))
        assert len(drawn) < 100
        picker.query_one(Rows).choose(5)
        await wait_until(lambda: "❯ title 5 " in text(picker))


async def test_a_click_opens() -> None:
    engine = FakeEngine(new(name="a", hours=1), new(name="b", hours=2))
    async with picking(engine) as (picker, pilot):
        await pilot.click(Rows, offset=(5, 3))
        await wait_until(lambda: results(picker) == [Picked("b")])


def test_queries_are_taken_apart() -> None:
    assert Query.parse(" Trip #Work lis ") == Query(("trip", "lis"), ("work",), None)
    assert Query.parse("/say this #a") == Query((), ("a",), "say this")
    assert Query.parse("/") == Query((), (), "")
    assert Query.parse("#") == Query()


def test_the_best_comes_first_and_no_word_takes_long() -> None:
    infos = [new(name="x", title="a t r i p", hours=1), new(name="y", title="trip", hours=9)]
    assert [one.name for one in select(infos, Query.parse("trip"), ORDERS[0])] == ["y", "x"]
    assert [one.name for one in select(infos, Query.parse("trip"), ORDERS[1])] == ["x", "y"]
    many = [new(name="z", title="ab" * 30)]
    # Compared one by one, the ways to find this would not be through in a year.
    assert select(many, Query.parse("a" * 25), ORDERS[0]) == many
    assert select(many, Query.parse("b" * 5000), ORDERS[0]) == []
    assert Letters(["i"]).places("İIx") == [1]


def test_spans_of_a_snippet_keep_their_place_when_it_is_made_safe() -> None:
    content = marked("a\r\nb\x1bword", ((5, 9),))
    assert content.plain == "a b␛word"
    assert [content.plain[span.start : span.end] for span in content.spans if span.style == FOUND] == ["word"]
