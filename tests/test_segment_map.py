"""The map of segments: figures in, lines or a page out."""

from __future__ import annotations

import html.parser
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvchat.figures import count, format_stats, meter, recalled
from kvchat.segment_map import COLOURS, GLYPHS, Line, cells, clip, columns_of, draw, heading, to_text, turns_across
from kvchat.segment_page import page

HELD = {"memory": 1.0, "disk": 0.0, "text": 0.0}


def segment(number: int, tier: str, held: float | None = None, **more: Any) -> dict[str, Any]:
    """Of 100 tokens and two turns."""
    held = HELD.get(tier, 0.5) if held is None else held
    start, stored = 100 * number, 0 if tier == "text" else 7
    return {
        "id": str(number),
        "start": start,
        "end": start + 100,
        "place": start,
        "kind": "text" if tier == "text" else "sealed",
        "turns": [2 * number + 1, 2 * number + 2],
        "codec": "k8v8",
        "num_chunks": 7,
        "stored_chunks": stored,
        "chunks_held": round(7 * held),
        "tier": tier,
        "position": start if held else None,
        "recalled": False,
        "rows": round(1000 * held),
        "rows_total": 1000,
        "rows_stored": 1000 if stored else 0,
        "bytes_in_memory": 10_000,
        "bytes_on_disk": 20_000,
        "seal_s": None,
    } | more


def figures(*segments: dict[str, Any], tail: int = 0, offset: int = 0, **more: Any) -> dict[str, Any]:
    """Of a session with these segments and so many tokens behind them."""
    total = (segments[-1]["end"] if segments else 0) + tail
    return {
        "name": "trip",
        "model": "tiny",
        "context_window": 8192,
        "num_turns": (segments[-1]["turns"][1] if segments else 0) + bool(tail),
        "num_seen": total,
        "num_tokens": total,
        "position": total - offset,
        "offset": offset,
        "rebased": offset > 0,
        "kv_budget": "4096 rows",
        "num_pairs": 5000,
        "num_kept": 1200,
        "keep_ratio": 0.5,
        "bytes_in_memory": 2e6,
        "bytes_on_disk": 4e6,
        "stored": 1.0,
        "store": {"bytes_in_use": 8_000_000, "disk_budget": 0, "bytes_free": 9_000_000_000, "min_free": 1 << 30},
        "segments": list(segments),
    } | more


def told(lines: list[Line]) -> str:
    return to_text(lines)


MIXED = [segment(0, "memory"), segment(1, "part", 0.7), segment(2, "part", 0.2), segment(3, "disk"), segment(4, "text")]


def many(number: int) -> list[dict[str, Any]]:
    tiers = ("disk", "disk", "part", "memory")
    return [segment(index, tiers[index % 4], recalled=index == 5) for index in range(number)]


def test_a_few_segments_are_bars_as_long_as_their_part_of_the_tokens() -> None:
    lines = told(draw(figures(*MIXED, tail=100), width=48)).splitlines()
    assert lines[0] == "turn 1  █████ ████░░ █░░░░░ ░░░░░ ×××××× ++++++"
    assert lines[1] == "        1-2   3-4    5-6    7-8   9-10   11"
    assert lines[2:] == ["█ in memory  ░ on disk  × text only", "+ newest, not sealed yet"]


def test_many_segments_are_cells_that_say_by_shading_how_much_is_held() -> None:
    crowd = [*MIXED, *(segment(number, "disk") for number in range(5, 40))]
    lines = told(draw(figures(*crowd, tail=9, in_host={"39": 6, "38": 2}), width=80)).splitlines()
    assert lines[0] == "turn 1  █▓▒·×" + 34 * "·" + "◦+"
    legend = " ".join(lines[1:])
    for glyph, _, meaning in GLYPHS.values():
        assert (f"{glyph} {meaning}" in legend) == (glyph != "░")


def test_a_bar_says_what_comes_back_from_host_memory() -> None:
    lines = told(draw(figures(segment(0, "part", 0.25), in_host={"0": 5}, device="cuda"), width=80)).splitlines()
    assert lines[0] == f"turn 1 {18 * '█'}{33 * '◦'}{21 * '░'}"
    assert lines[2] == "█ in GPU memory  ◦ in host memory  ░ on disk"


def test_a_chosen_turn_is_marked_in_its_row() -> None:
    stats = figures(*many(200))
    lines = told(draw(stats, width=80, chosen=146)).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("turn 143"))
    assert lines[at + 1] == " " * 9 + " ▲"
    assert sum("▲" in line for line in lines) == 1
    rows = turns_across(stats, 80)
    assert [row[0] for row in rows] == [1, 143, 285] and sum(map(len, rows)) == 200
    assert turns_across(figures()) == []


def test_cells_go_on_in_rows_that_begin_with_their_first_turn() -> None:
    lines = told(draw(figures(*many(200)), width=80)).splitlines()
    rows = [line for line in lines if line.startswith("turn")]
    assert [row.split()[1] for row in rows] == ["1", "143", "285"]
    assert sum(len(row) - 9 for row in rows) == 200
    assert lines[1] == " " * 14 + "^" and "^ recalled for the newest answer" in lines[-1] + lines[-2]


def test_tokens_without_a_segment_are_newest_or_text_only() -> None:
    found = cells(figures(segment(0, "disk"), tail=50, offset=90, num_tokens=180))
    assert [(cell.start, cell.end, cell.tier, cell.position) for cell in found] == [
        (0, 100, "disk", None),
        (100, 150, "tail", 10),
        (150, 180, "text", None),
    ]
    waiting = segment(0, "memory", kind="open")
    assert [cell.tier for cell in cells(figures(waiting))] == ["tail"]


def test_what_the_store_knows_alone_is_drawn_too() -> None:
    stored = [{key: value for key, value in one.items() if not key.startswith("rows")} for one in (MIXED[3], MIXED[4])]
    known = {key: figures()[key] for key in ("name", "model", "bytes_on_disk", "stored", "store")}
    stats = known | {"num_turns": 11, "num_tokens": 550, "segments": stored}
    for one in stored:
        del one["bytes_in_memory"]
    assert [cell.tier for cell in cells(stats)] == ["disk", "text", "text"]
    assert "░" in told([*heading(stats), *draw(stats)]) and "<table>" in page(stats)
    assert "nothing is there" in told(draw(stats | {"segments": [], "num_tokens": 0}))


def test_bars_show_what_the_store_has_given_up() -> None:
    half = segment(0, "part", 0.25, rows_stored=500)
    assert told(draw(figures(half), width=40)).splitlines()[0] == "turn 1 " + 8 * "█" + 8 * "░" + 16 * "×"


def test_something_in_memory_is_always_seen_and_so_is_something_missing() -> None:
    assert told(draw(figures(segment(0, "part", 0.001)))).startswith("turn 1 █░")
    assert told(draw(figures(segment(0, "part", 0.999)))).splitlines()[0].endswith("█░")


def test_episodes_are_lettered_where_they_begin_and_named_below() -> None:
    episodes = [{"name": "dogs park", "turns": (1, 2, 3, 7, 8)}, {"name": "", "turns": (4, 5, 6)}]
    lines = told(draw(figures(*MIXED[:4]), episodes, width=48)).splitlines()
    assert lines[2] == "       a                   b         a"
    assert lines[-1] == "a dogs park (5)  b no name (3)"
    assert [cell.episode for cell in cells(figures(*MIXED), episodes)] == [0, 0, 1, 0, None]


@given(
    st.lists(st.sampled_from(["memory", "part", "disk", "text"]), max_size=120),
    st.integers(0, 200),
    st.lists(st.text(max_size=60), max_size=60),
    st.integers(0, 50),
)
def test_no_line_is_wider_than_asked_and_nothing_in_it_drives_a_terminal(
    tiers: list[str], width: int, names: list[str], tail: int
) -> None:
    stats = figures(*(segment(number, tier) for number, tier in enumerate(tiers)), tail=tail)
    episodes = [{"name": name, "turns": (number + 1,)} for number, name in enumerate(names)]
    lines = [*heading(stats | {"name": "x".join(names)}, max(40, width)), *draw(stats, episodes, width)]
    plain = told(lines)
    assert all(columns_of(line) <= max(40, width) for line in plain.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", plain)
    assert re.sub(r"\x1b\[[0-9;]*m", "", to_text(lines, colour=True)) == "\n".join(
        "".join(span.text for span in line).rstrip() for line in lines
    ) or any(line and line[-1].text.endswith(" ") for line in lines)
    assert len([line for line in plain.splitlines() if line.startswith("turn")]) >= bool(tiers)


def test_colours_are_given_only_if_asked_for_and_other_terminals_get_ascii() -> None:
    lines = draw(figures(*MIXED, tail=9), width=60)
    assert "\x1b" not in to_text(lines) and f"\x1b[{COLOURS['memory']}m█" in to_text(lines, colour=True)
    assert to_text(lines, encoding="ascii").isascii() and "x" in to_text(lines, encoding="ascii")
    names = [{"name": "日本 trip", "turns": (1,)}]
    assert "?? trip" in to_text(draw(figures(*MIXED), names), encoding="ascii")


@pytest.mark.parametrize(("text", "width", "shown"), [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("日本語", 4, "日…")])
def test_long_names_are_cut_by_their_columns(text: str, width: int, shown: str) -> None:
    assert clip(text, width) == shown and columns_of(shown) <= width


class Checker(html.parser.HTMLParser):
    """What elements and attributes a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_stands_alone_and_takes_no_name_for_markup() -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=y>\x1b[2J"
    stats = figures(*MIXED, segment(5, "part", recalled=True), tail=9, name=hostile, model=hostile)
    text = page(stats, [{"name": hostile, "turns": (1, 2)}])
    checker = Checker()
    checker.feed(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(checker.tags)
    assert not [key for key, _ in checker.attributes if key in ("src", "href") or key.startswith("on")]
    assert "http:" not in text and "https:" not in text and "url(" not in text and "\x1b" not in text
    assert checker.tags.count("tr") == 8 and text.count('class="cell') == 7 and text.count("recalled for") == 1
    assert "20% in memory" in text and "&lt;script&gt;" in text


def test_the_meter_tells_the_window_from_the_whole() -> None:
    assert meter(4012, 0, 8192) == "4012 / 8192 tokens"
    assert meter(231_012, 225_802, 8192) == "5210 / 8192 in the window, 231k in all"
    assert [count(number) for number in (9999, 10_000, 999_499, 1_234_567)] == ["9999", "10k", "999k", "1.2M"]


def test_what_was_recalled_is_told_by_turns_once_they_are_known() -> None:
    segments = [segment(number, "disk") for number in range(20)]
    assert (
        recalled(()) == "" and recalled((100,)) == "recalled 1 segment" and recalled((100, 0)) == "recalled 2 segments"
    )
    assert recalled((100, 200, 500), segments) == "recalled turns 3-6, 11-12"
    assert recalled(range(0, 1000, 200), segments) == "recalled 10 turns"


def test_lines_of_stats_say_where_the_window_stands_and_fold_what_is_not_in_memory() -> None:
    moved = segment(5, "part", position=320, recalled=True)
    lines = format_stats(figures(MIXED[0], *(segment(n, "disk") for n in range(1, 5)), moved, offset=180)).splitlines()
    assert lines[1] == "12 turns, 420 of 8192 tokens in the window, 600 in all (re-based)"
    assert "(keep_ratio 0.50, kv_budget 4096 rows)" in lines[2]
    assert lines[4] == "  sealed turns 1-2: tokens 0-100, 1000/1000 rows, k8v8, 20.0 kB"
    assert lines[5] == "  4 segments on disk, turns 3-10: tokens 100-500, 80.0 kB"
    assert lines[6] == "  sealed turns 11-12: tokens 500-600, 500/1000 rows, k8v8, 20.0 kB, at 320, recalled"
