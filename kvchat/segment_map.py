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
from kvchat.terminal import neutralise

Style = Literal["memory", "part", "disk", "text", "tail", "mark", "episode", "dim", "plain"]

NARROWEST, WIDEST = 40, 240
"""Columns that a map is drawn for, whatever there are."""
LEAST_BAR = 3
"""Columns of a bar; where there is less for each segment they are cells."""
LETTERS = string.ascii_lowercase + string.ascii_uppercase
GLYPHS: dict[str, tuple[str, Style, str]] = {
    "whole": ("█", "memory", "all in memory"),
    "most": ("▓", "part", "half or more in memory"),
    "least": ("▒", "part", "less in memory"),
    "disk": ("·", "disk", "on disk only"),
    "rest": ("░", "disk", "on disk"),
    "text": ("×", "text", "text only"),
    "tail": ("+", "tail", "newest, not sealed yet"),
}
ASCII = str.maketrans({"█": "#", "▓": "%", "▒": "=", "░": "-", "×": "x", "·": ".", "…": "~"})
"""For terminals that know no other characters."""
COLOURS: dict[Style, str] = {
    "memory": "32",
    "part": "36",
    "disk": "34",
    "text": "31",
    "tail": "35",
    "mark": "1;33",
    "episode": "1",
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


@dataclass(frozen=True, slots=True)
class Cell:
    """A segment, or tokens of which there is none.

    start, end   its tokens
    first, last  its turns
    tier         memory, part, disk or text, as figures have it, or tail: exact in memory, not sealed yet
    held         part of its KV that is in memory, 0 to 1
    stored       part that is in the store
    position     where the network sees it now, None if it does not
    episode      number of the episode that most of its turns are of, None if that is not known
    """

    start: int
    end: int
    first: int
    last: int
    tier: str
    held: float
    stored: float
    position: int | None
    recalled: bool
    nbytes: int = 0
    disk: int = 0
    episode: int | None = None

    @property
    def kind(self) -> str:
        """Its key in GLYPHS."""
        if self.tier != "part":
            return {"memory": "whole"}.get(self.tier, self.tier)
        return "most" if self.held >= 0.5 else "least"

    @property
    def turns(self) -> str:
        """Their numbers."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def cells(stats: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]] = ()) -> list[Cell]:
    """All tokens of a conversation, from its figures and episodes, in their order."""
    about = {turn: number for number, episode in enumerate(episodes) for turn in episode["turns"]}
    found, total = [_cell(segment, about) for segment in stats["segments"]], stats["num_tokens"]
    seen, newest = stats.get("num_seen", 0), max(1, stats["num_turns"])
    end = found[-1].end if found else 0
    if seen > end:
        first = min(newest, found[-1].last + 1) if found else 1
        about_it = _most(about, first, newest)
        found.append(Cell(end, seen, first, newest, "tail", 1.0, 0.0, end - stats["offset"], False, episode=about_it))
    end = max(end, seen)
    if total > end:
        found.append(Cell(end, total, newest, newest, "text", 0.0, 0.0, None, False))
    return found


def _cell(segment: Mapping[str, Any], about: Mapping[int, int]) -> Cell:
    (first, last), there = segment["turns"], segment["tier"] in ("memory", "part")
    tier = "tail" if segment["kind"] == "open" and there else segment["tier"]
    total = segment.get("rows_total", 0)
    held = 1.0 if segment["tier"] == "memory" else segment["rows"] / total if total else 0.0
    whole = segment["stored_chunks"] / max(1, segment["num_chunks"])
    return Cell(
        segment["start"],
        segment["end"],
        first,
        last,
        tier,
        held,
        segment["rows_stored"] / total if total else whole,
        segment["position"],
        segment["recalled"],
        segment.get("bytes_in_memory", 0),
        segment["bytes_on_disk"],
        _most(about, first, last),
    )


def _most(about: Mapping[int, int], first: int, last: int) -> int | None:
    """The episode of most of these turns; the earliest of several."""
    found = [about[turn] for turn in range(first, last + 1) if turn in about]
    return max(dict.fromkeys(found), key=found.count) if found else None


def heading(stats: Mapping[str, Any], width: int = 80) -> list[Line]:
    """What a map stands below: whose it is, and the whole in figures."""
    name: Line = (Span(clip(one_line(str(stats["name"])), width), "episode"),)
    parts = [clip(one_line(part), width) for line in summary(stats) for part in line.split(" · ")]
    return [name, *_flow([(Span(part, "dim"),) for part in parts], width, " · ")]


def draw(stats: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]] = (), width: int = 80) -> list[Line]:
    """The map for so many columns, and what its signs mean."""
    found, width = cells(stats, episodes), min(max(width, NARROWEST), WIDEST)
    if not found:
        return [(Span("nothing is there yet", "dim"),)]
    label = len(f"turn {found[-1].first}") + 1
    rows = _rows(found, width - label)
    lines = [line for row in rows for line in _drawn(row, label)]
    return [*lines, *_legend(rows, width), *_names(found, episodes, width)]


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


def _drawn(row: Sequence[Bar], label: int) -> list[Line]:
    """A row, and below it which turns the bars have, what was recalled, and where another episode begins."""
    gap = " " if _is_bars(row) else ""
    begin = Span(f"turn {row[0][0].first}".ljust(label), "dim")
    lines: list[Line] = [(begin, *(span for cell, columns in row for span in (*_shaded(cell, columns), Span(gap))))]
    letters, before = list[str](), None
    for cell, _ in row:
        letters.append("" if cell.episode == before else _letter(cell.episode))
        before = cell.episode
    turns = [_fitting((cell.turns, str(cell.first)), columns) if gap else "" for cell, columns in row]
    marks = ["^" if cell.recalled else "" for cell, _ in row]
    below: list[tuple[list[str], Style]] = [(turns, "dim"), (marks, "mark"), (letters, "episode")]
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
    stored = max(held, min(columns, round(columns * cell.stored)))
    kinds = [("whole", held), ("rest", stored - held), ("text", columns - stored)]
    return [Span(GLYPHS[kind][0] * count, GLYPHS[kind][1]) for kind, count in kinds if count]


def _letter(episode: int | None) -> str:
    if episode is None:
        return "."
    return LETTERS[episode] if episode < len(LETTERS) else "*"


def _is_bars(row: Sequence[Bar]) -> bool:
    return any(columns > 1 for _, columns in row)


def _legend(rows: Sequence[Sequence[Bar]], width: int) -> list[Line]:
    """What the signs in use mean."""
    used = {span.text[:1] for row in rows for cell, columns in row for span in _shaded(cell, columns)}
    items: list[Line] = [
        (Span(glyph, style), Span(f" {'in memory' if glyph == '█' and _is_bars(rows[0]) else meaning}", "dim"))
        for glyph, style, meaning in GLYPHS.values()
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
    while text and columns_of(text) > width - 1:
        text = text[:-1]
    return f"{text}…"
