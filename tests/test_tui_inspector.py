"""The inspector: one turn's heads, scores and words, and the way to its neighbours."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from textual.content import Content

from kvchat.errors import InputError
from kvchat.inspecting import Bin
from kvchat.tui.inspection import KEPT, SHADES, STEPS, heat, histogram, shades, words
from kvchat.tui.inspector import Inspector
from tests.fake_inspection import inspection, token
from tests.tui_host import NARROW, WIDE, Host, hosting, wait_until


def rows(content: Content) -> list[str]:
    return content.plain.split("\n")


def styles(content: Content, part: str) -> set[str]:
    """Of the spans that lie over `part`."""
    at = content.plain.index(part)
    return {str(span.style) for span in content.spans if span.start <= at < span.end}


class Turns:
    """Gives turns, each when its gate is opened; remembers who asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def __call__(self, turn: int) -> Any:
        self.asked.append(turn)
        self.threads.add(threading.current_thread())
        assert self.gate.wait(10)
        if self.error:
            raise self.error
        return inspection(turn, kept=1000 + turn)


def is_there(host: Host, turn: int) -> bool:
    return f"{1000 + turn} of 3953 pairs kept" in host.shown and "reading" not in host.shown


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_the_heat_map_has_a_row_a_head_and_a_cell_a_layer() -> None:
    found = inspection(1, heat=((0.0, 1.0), (0.5, 0.02), (0.99, 0.5)))
    lines = rows(heat(found, 80))
    assert lines[0].split() == ["layer", "0"]
    assert lines[1] == "head 0  ···▄▄▄▇▇▇  50%"
    assert lines[2] == "head 1  ███▁▁▁▄▄▄  51%"
    assert STEPS in lines[3]


@pytest.mark.parametrize(
    ("layers", "heads", "width"), [(30, 3, 76), (80, 8, 76), (126, 8, 76), (48, 32, 116), (1, 1, 20)]
)
def test_the_heat_map_of_any_model_fits_and_shows_all_heads(layers: int, heads: int, width: int) -> None:
    lines = rows(heat(inspection(1, heat=((1.0,) * heads,) * layers), width))
    assert max(map(len, lines)) <= max(width, 60)
    assert sum(line.startswith("head") for line in lines) % heads == 0
    cells = sum(line.count("█") for line in lines[:-1])
    assert cells % (layers * heads) == 0 and cells >= layers * heads


def test_the_histogram_says_where_the_cut_is() -> None:
    bins = [Bin(place / 10, place / 10 + 0.1, 10 * (place + 1), place >= 6) for place in range(10)]
    content = histogram(inspection(1, histogram=bins), 60)
    lines = rows(content)
    assert lines[-1].split() == ["╌", "evicted", "━", "kept", "by", "score"]
    assert lines[-2].split() == ["0", "cut", "0.6", "1"]
    axis = lines[-3].strip()
    assert axis == 30 * "╌" + "┃" + 19 * "━"
    assert lines[0].split()[0] == "100" and lines[0].rstrip().endswith(" ████")
    heights = [sum(line[8 + 5 * place] != " " for line in lines[:6]) for place in range(10)]
    assert heights == sorted(heights) and heights[0] == 1 and heights[-1] == 6


def test_scores_that_are_kept_in_some_heads_only_are_one_bar() -> None:
    bins = [Bin(0.0, 0.5, 80, False), Bin(0.0, 0.5, 20, True), Bin(0.5, 1.0, 50, True)]
    lines = rows(histogram(inspection(1, histogram=bins), 60))
    assert lines[-3].strip() == 8 * "╌" + "┃" + 7 * "━" and lines[0].split()[0] == "100"


@pytest.mark.parametrize(
    ("bins", "axis"),
    [([Bin(0, 1, 5, True)], 8 * "━"), ([Bin(0, 1, 5, False)], 8 * "╌")],
)
def test_there_is_no_cut_where_all_is_kept_or_nothing(bins: list[Bin], axis: str) -> None:
    lines = rows(histogram(inspection(1, histogram=bins), 60))
    assert lines[-3].strip() == axis and "cut" not in lines[-2]


def test_tokens_are_dimmed_by_how_much_of_them_is_kept_then_by_score() -> None:
    some = [token("x", kept=kept, score=score) for kept, score in ((0.1, 0.2), (0.6, 0.9), (0.1, 0.8), (0.2, 0.5))]
    assert shades([*some, token("x", kept=0.0, protected=True)]) == [0, KEPT, 1, 2, KEPT]
    gone = [token("x", kept=0.0, score=place / 8) for place in range(8)]
    assert shades(gone) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert shades([token("x", kept=0.0, score=None)] * 3) == [0, 0, 0]
    assert shades([token("x", kept=1.0, score=0.0), token("x", kept=1.0, score=None)]) == [KEPT, KEPT]
    assert shades([]) == []


def test_words_keep_their_order_and_shades_and_are_never_markup() -> None:
    said = (
        token("keep ", kept=1.0),
        token("[b]mid[/b] ", kept=0.3, score=0.8),
        token("low\x1b[2J ", kept=0.0, score=0.05),
        token("first\n", protected=True),
        token("Yes", "assistant", kept=0.05, score=0.1),
    )
    content = words(inspection(1, tokens=said), marked=False)
    assert "user\nkeep [b]mid[/b] low␛[2J first\n\nassistant\nYes" in content.plain
    assert styles(content, "keep") == {SHADES[KEPT]} and styles(content, "[b]mid") == {SHADES[2]}
    assert styles(content, "low␛") == {SHADES[0]} and "underline" in "".join(styles(content, "first"))
    marked = words(inspection(1, tokens=said), marked=True).plain
    assert "keep ‹[b]mid[/b] ›«low␛[2J »first\n\nassistant\n«Yes»" in marked


def test_a_turn_of_very_many_tokens_is_shown_as_far_as_it_helps() -> None:
    content = words(inspection(1, tokens=[token("w ")] * 20_007), marked=False)
    assert "… and 7 more tokens" in content.plain and content.plain.count("w ") < 20_010


def test_what_is_not_known_is_said() -> None:
    bare = inspection(1, heat=(), histogram=(), tokens=(), kept=0, pairs=0)
    assert "none of its KV" in heat(bare, 80).plain
    assert "no scores" in histogram(bare, 80).plain


# -- the screen ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [NARROW, WIDE])
async def test_a_turn_is_shown_with_its_figures(size: tuple[int, int]) -> None:
    turns = Turns()
    async with hosting(Inspector(turns, 3, 12), size) as (host, _):
        await wait_until(lambda: is_there(host, 3))
        assert "turn 3 of 12" in host.shown
        assert "53 tokens · 4 protected · in memory in part" in host.shown
        assert "18.0 MB in memory · 4.1 MB on disk · codec k8v4 · scorer snapkv" in host.shown
        assert "head 2" in host.shown and "cut 0.5 " in host.shown
        assert threading.main_thread() not in turns.threads


async def test_on_a_small_screen_the_words_are_reached_by_scrolling() -> None:
    async with hosting(Inspector(Turns(), 1, 1)) as (host, pilot):
        await wait_until(lambda: is_there(host, 1))
        assert "museum" not in host.shown
        host.animation_level = "none"
        await pilot.press("end")
        await wait_until(lambda: "museum" in host.shown and "evicted: low score" in host.shown)
        assert "[b]park[/b]" in host.shown


async def test_left_and_right_go_to_the_neighbours_and_no_further() -> None:
    turns = Turns()
    async with hosting(Inspector(turns, 2, 3)) as (host, pilot):
        await wait_until(lambda: is_there(host, 2))
        await pilot.press("right")
        await wait_until(lambda: is_there(host, 3))
        await pilot.press("right", "left", "left", "left")
        await wait_until(lambda: is_there(host, 1))
        assert "turn 1 of 3" in host.shown and turns.asked[:2] == [2, 3] and set(turns.asked) <= {1, 2, 3}


async def test_keys_are_served_while_a_turn_is_read_and_only_the_last_one_is_shown() -> None:
    turns = Turns()
    turns.gate.clear()
    async with hosting(Inspector(turns, 1, 50)) as (host, pilot):
        await wait_until(lambda: "turn 1 of 50 · reading…" in host.shown)
        await pilot.press(*["right"] * 7)
        await wait_until(lambda: "turn 8 of 50 · reading…" in host.shown)
        turns.gate.set()
        await wait_until(lambda: is_there(host, 8))
        assert turns.asked == [1, 8]


async def test_escape_closes_even_while_a_turn_is_read() -> None:
    turns = Turns()
    turns.gate.clear()
    async with hosting(Inspector(turns, 1, 2)) as (host, pilot):
        await wait_until(lambda: turns.asked)
        await pilot.press("escape")
        await wait_until(lambda: host.results == [None])
        turns.gate.set()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("turn 2 is not there [b]"), "turn 2 is not there [b]"),
        (ZeroDivisionError("by zero"), "internal error: ZeroDivisionError: by zero"),
    ],
)
async def test_an_error_is_a_line_and_other_turns_can_still_be_seen(error: Exception, line: str) -> None:
    turns = Turns()
    turns.error = error
    async with hosting(Inspector(turns, 2, 3)) as (host, pilot):
        await wait_until(lambda: line in host.shown and "reading" not in host.shown)
        turns.error = None
        await pilot.press("right")
        await wait_until(lambda: is_there(host, 3) and line not in host.shown)


async def test_m_puts_brackets_around_evicted_words() -> None:
    async with hosting(Inspector(Turns(), 1, 1), WIDE) as (host, pilot):
        await wait_until(lambda: is_there(host, 1))
        assert "‹" not in host.shown
        await pilot.press("m")
        await wait_until(lambda: "‹evicted›" in host.shown and "«" in host.shown)
        await pilot.press("m")
        await wait_until(lambda: "‹" not in host.shown)


async def test_without_colours_brackets_are_there_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with hosting(Inspector(Turns(), 1, 1), WIDE) as (host, _):
        await wait_until(lambda: "‹evicted›" in host.shown)


async def test_brackets_come_with_a_theme_without_shades_and_go_if_they_are_not_wanted() -> None:
    async with hosting(Inspector(Turns(), 1, 1), WIDE) as (host, pilot):
        await wait_until(lambda: is_there(host, 1) and "‹" not in host.shown)
        host.theme = "ansi-dark"
        await wait_until(lambda: "‹evicted›" in host.shown)
        await pilot.press("m")
        await wait_until(lambda: "‹" not in host.shown)


async def test_it_is_drawn_anew_for_another_size() -> None:
    async with hosting(Inspector(Turns(), 1, 1), WIDE) as (host, pilot):
        await wait_until(lambda: is_there(host, 1))
        await pilot.resize_terminal(50, 20)
        await wait_until(lambda: host.shown.count("head 0") == 2 and "layer   15" in host.shown)
