"""A map of a conversation: one cell or bar a segment, which says how much of it memory holds and where the rest lies.

Figures go in, lines come out; what shows them gives each style its colour. Without colour the characters say it all.
Names come from people and models: control characters in them lose their effect here.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unicodedata import combining, east_asian_width

from kvchat.figures import summary
from kvchat.segment_cells import Cell, cells
from kvchat.terminal import neutralise

Style = Literal["memory", "part", "host", "disk", "text", "tail", "mark", "episode", "chosen", "dim", "plain"]

NARROWEST, WIDEST = 40, 240
"""Columns that a map is drawn for, whatever there are."""
LEAST_BAR = 3
"""Columns of a bar; where there is less for each segment they are cells."""
LETTERS = string.ascii_lowercase + string.ascii_uppercase
GLYPHS: dict[str, tuple[str, Style, str]] = {
    "whole": ("█", "memory", "all in memory"),
    "most": ("▓", "part", "half or more in memory"),
    "least": ("▒", "part", "less in memory"),
    "host": ("◦", "host", "in host memory"),
    "disk": ("·", "disk", "on disk only"),
    "rest": ("░", "disk", "on disk"),
    "text": ("×", "text", "text only"),
    "tail": ("+", "tail", "newest, not sealed yet"),
}
ASCII = str.maketrans({"█": "#", "▓": "%", "▒": "=", "░": "-", "×": "x", "·": ".", "◦": "o", "…": "~"})
"""For terminals that know no other characters."""
COLOURS: dict[Style, str] = {
    "memory": "32",
    "part": "36",
    "host": "33",
    "disk": "34",
    "text": "31",
    "tail": "35",
    "mark": "1;33",
    "episode": "1",
    "chosen": "1;35",
    "dim": "2",
    "plain": "",
}
"""As terminals number them."""


@dataclass(frozen=True, slots=True)
class Span:
    """Text of one style."""

    text: str
    style: Style = "plain"


Line = tuple[Span, ...]


def heading(stats: Mapping[str, Any], width: int = 80) -> list[Line]:
    """What a map stands below: whose it is, and the whole in figures."""
    name: Line = (Span(clip(one_line(str(stats["name"])), width), "episode"),)
    parts = [clip(one_line(part), width) for line in summary(stats) for part in line.split(" · ")]
    return [name, *_flow([(Span(part, "dim"),) for part in parts], width, " · ")]


def draw(
    stats: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]] = (), width: int = 80, chosen: int = 0
) -> list[Line]:
    """The map for so many columns, what its signs mean, and where turn `chosen` is, if that is one."""
    found, width = cells(stats, episodes), min(max(width, NARROWEST), WIDEST)
    if not found:
        return [(Span("nothing is there yet", "dim"),)]
    label = _label(found)
    rows = _rows(found, width - label)
    lines = [line for row in rows for line in _drawn(row, label, chosen)]
    memory = "GPU memory" if stats.get("device") == "cuda" else "memory"
    return [*lines, *_legend(rows, width, memory), *_names(found, episodes, width)]


def turns_across(stats: Mapping[str, Any], width: int = 80) -> list[list[int]]:
    """The turns that each row of the map for so many columns shows, by the first of each cell."""
    found, width = cells(stats), min(max(width, NARROWEST), WIDEST)
    return [[cell.first for cell, _ in row] for row in _rows(found, width - _label(found))] if found else []


def _label(found: Sequence[Cell]) -> int:
    return len(f"turn {found[-1].first}") + 1


Bar = tuple[Cell, int]
"""A cell and its columns."""


def _rows(found: Sequence[Cell], room: int) -> list[list[Bar]]:
    """One row of bars, by their lengths in tokens, if each can have some columns; else rows of cells."""
    spare = room - (LEAST_BAR + 1) * len(found)
    if spare >= 0:
        whole, row = max(1, found[-1].end - found[0].start), list[Bar]()
        for cell in found:
            low, high = (spare * (place - found[0].start) // whole for place in (cell.start, cell.end))
            row.append((cell, LEAST_BAR + high - low))
        return [row]
    return [[(cell, 1) for cell in found[low : low + room]] for low in range(0, len(found), room)]


def _drawn(row: Sequence[Bar], label: int, chosen: int) -> list[Line]:
    """A row, and below it which turns the bars have, what is chosen or recalled, and where another episode begins."""
    gap = " " if _is_bars(row) else ""
    begin = Span(f"turn {row[0][0].first}".ljust(label), "dim")
    lines: list[Line] = [(begin, *(span for cell, columns in row for span in (*_shaded(cell, columns), Span(gap))))]
    letters, before = list[str](), None
    for cell, _ in row:
        letters.append("" if cell.episode == before else _letter(cell.episode))
        before = cell.episode
    turns = [_fitting((cell.turns, str(cell.first)), columns) if gap else "" for cell, columns in row]
    marks = ["^" if cell.recalled else "" for cell, _ in row]
    picked = next((cell for cell, _ in row if cell.first <= chosen <= cell.last), None)
    picks = ["▲".center(columns) if cell is picked else "" for cell, columns in row]
    below: list[tuple[list[str], Style]] = [(picks, "chosen"), (turns, "dim"), (marks, "mark"), (letters, "episode")]
    for words, style in below:
        text = "".join(word.ljust(columns + len(gap)) for word, (_, columns) in zip(words, row, strict=True))
        if text.strip():
            lines.append((Span(" " * label), Span(text.rstrip(), style)))
    return lines


def _fitting(words: Iterable[str], columns: int) -> str:
    """The first that is short enough."""
    return next((word for word in words if len(word) <= columns), "")


def _shaded(cell: Cell, columns: int) -> Iterable[Span]:
    """One character, or a bar: what is in memory, what only the store has, what is text only."""
    glyph, style, _ = GLYPHS[cell.kind]
    if columns == 1 or cell.tier in ("tail", "text"):
        return [Span(glyph * columns, style)]
    held = round(columns * cell.held)
    held = min(max(held, cell.held > 0), columns - (cell.held < 1))
    host = max(held, min(columns, round(columns * cell.host)))
    stored = max(host, min(columns, round(columns * cell.stored)))
    kinds = [("whole", held), ("host", host - held), ("rest", stored - host), ("text", columns - stored)]
    return [Span(GLYPHS[kind][0] * count, GLYPHS[kind][1]) for kind, count in kinds if count]


def _letter(episode: int | None) -> str:
    if episode is None:
        return "."
    return LETTERS[episode] if episode < len(LETTERS) else "*"


def _is_bars(row: Sequence[Bar]) -> bool:
    return any(columns > 1 for _, columns in row)


def _legend(rows: Sequence[Sequence[Bar]], width: int, memory: str) -> list[Line]:
    """What the signs in use mean; `memory` is what the network reads."""
    used = {span.text[:1] for row in rows for cell, columns in row for span in _shaded(cell, columns)}
    items: list[Line] = [
        (Span(glyph, style), Span(f" {told.replace('in memory', f'in {memory}')}", "dim"))
        for glyph, style, meaning in GLYPHS.values()
        for told in ["in memory" if glyph == "█" and _is_bars(rows[0]) else meaning]
        if glyph in used
    ]
    if any(cell.recalled for row in rows for cell, _ in row):
        items.append((Span("^", "mark"), Span(" recalled for the newest answer", "dim")))
    return _flow(items, width)


def _names(found: Sequence[Cell], episodes: Sequence[Mapping[str, Any]], width: int) -> list[Line]:
    """The episodes by their letters."""
    items = []
    for number in dict.fromkeys(cell.episode for cell in found if cell.episode is not None):
        turns = len(episodes[number]["turns"])
        name = one_line(str(episodes[number]["name"])) or "no name"
        told = f" {clip(name, width - 14)} ({turns})"
        items.append((Span(_letter(number), "episode"), Span(told)))
    return _flow(items, width)


def _flow(items: Sequence[Line], width: int, between: str = "  ") -> list[Line]:
    """Items one after the other, in as many lines as that takes."""
    lines: list[list[Span]] = []
    used = width
    for item in items:
        needed = sum(columns_of(span.text) for span in item)
        if used + len(between) + needed > width:
            lines.append([*item])
            used = needed
        else:
            lines[-1] += [Span(between, "dim"), *item]
            used += len(between) + needed
    return [tuple(line) for line in lines]


def to_text(lines: Sequence[Line], colour: bool = False, encoding: str = "utf-8") -> str:
    """Lines for a terminal or a pipe that takes `encoding`."""
    told = ["".join(_painted(span) if colour else span.text for span in line).rstrip() for line in lines]
    text = "\n".join(told)
    try:
        "█▓▒░×".encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(ASCII)
    return text.encode(encoding, "replace").decode(encoding)


def _painted(span: Span) -> str:
    code = COLOURS[span.style]
    return f"\x1b[{code}m{span.text}\x1b[0m" if code else span.text


def one_line(text: str) -> str:
    """`text` on one line, harmless."""
    return " ".join(neutralise(text).split())


def columns_of(text: str) -> int:
    """What text takes on a terminal."""
    return sum(0 if combining(char) else 1 + (east_asian_width(char) in "WF") for char in text)


def clip(text: str, width: int) -> str:
    """`text` if it fits, else its beginning."""
    if columns_of(text) <= width:
        return text
    end = used = 0
    while (used := used + columns_of(text[end])) < width:
        end += 1
    return f"{text[:end]}…"
