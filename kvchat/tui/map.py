"""The segment map on the screen: how much of each turn memory holds, and where the rest lies.

With the keyboard on it, arrows choose a turn, of which the border tells, and Enter inspects it.
"""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Label

from kvchat.figures import size
from kvchat.segment_cells import Cell, cells
from kvchat.segment_map import GLYPHS, Line, Style, draw, turns_across

if TYPE_CHECKING:
    from kvchat.handle import Session

STYLES: dict[Style, str] = {
    "memory": "$success",
    "part": "$primary",
    "host": "$warning",
    "disk": "$foreground-muted",
    "text": "$error",
    "tail": "$text-accent",
    "mark": "bold $text-warning",
    "episode": "bold",
    "chosen": "bold $text-accent",
    "dim": "$foreground-muted",
    "plain": "",
}


class SegmentMap(VerticalScroll):
    """The map of the open session, hidden until it is asked for. Long ones show their end, and can be scrolled."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "choose(-1)", "Turn before", show=False, id="map.before"),
        Binding("right", "choose(1)", "Turn after", show=False, id="map.after"),
        Binding("up", "choose_row(-1)", "Row above", show=False, id="map.above"),
        Binding("down", "choose_row(1)", "Row below", show=False, id="map.below"),
        Binding("home", "choose(-1000000)", "First turn", show=False, id="map.first"),
        Binding("end", "choose(1000000)", "Newest turn", show=False, id="map.newest"),
        Binding("enter", "inspect", "Inspect", id="map.inspect"),
        Binding("escape", "leave", "Back", id="map.leave"),
    ]

    @dataclass
    class Inspect(Message):
        """The user wants to see this turn closely; 1 = the first."""

        turn: int

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, can_focus=True)
        self._stats: Mapping[str, Any] | None = None
        self._found: Sequence[Cell] = ()
        self._episodes: Sequence[Mapping[str, Any]] = ()
        self._named: tuple[str, int] = ("", 0)
        self._chosen = 0
        """The turn that was chosen last; 0: none yet."""

    def compose(self) -> ComposeResult:
        yield Label("", id="cells", markup=False)

    # -- figures -----------------------------------------------------------------------------------------------------

    def toggle(self) -> bool:
        """Show it or hide it; whether it is to be seen now."""
        self.display = not self.display
        self._draw()
        return bool(self.display)

    async def update(self, chat: Session, stats: Mapping[str, Any]) -> None:
        """Show these figures; episodes are sorted anew only when there are a quarter more turns, for it takes time."""
        if self._stats is None or self._stats["name"] != stats["name"]:
            self._chosen = 0
        self._stats, self._found = stats, cells(stats)
        self._draw()
        name, turns = self._named
        if self.display and (name != chat.name or not turns <= stats["num_turns"] < turns + max(1, turns // 4)):
            self._named = chat.name, stats["num_turns"]
            self._episodes = await to_thread(chat.episodes)
            self._draw()

    @property
    def turn(self) -> int:
        """The chosen turn: the newest until another is chosen."""
        newest = max(1, self._stats["num_turns"]) if self._stats else 1
        return min(self._chosen, newest) if self._chosen else newest

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_choose(self, turns: int) -> None:
        """Choose a turn so many further on, or the last one there is."""
        if self._stats is not None:
            self._chosen = min(max(1, self.turn + turns), max(1, self._stats["num_turns"]))
            self._draw()

    def action_choose_row(self, rows: int) -> None:
        """Choose the turn that stands so many rows below; on a map of one row, scroll."""
        across = turns_across(self._stats, self._width) if self._stats is not None else []
        at = max((number for number, row in enumerate(across) if row[0] <= self.turn), default=0)
        if not 0 <= at + rows < len(across):
            self.scroll_relative(y=rows, animate=False)
            return
        here = max(place for place, first in enumerate(across[at]) if first <= max(self.turn, across[at][0]))
        row = across[at + rows]
        self._chosen = row[min(here, len(row) - 1)]
        self._draw()

    def action_inspect(self) -> None:
        if self._stats is not None and self._stats["num_turns"]:
            self.post_message(self.Inspect(self.turn))

    def action_leave(self) -> None:
        """Go on to what stands below the map."""
        self.screen.focus_next()

    # -- drawing -----------------------------------------------------------------------------------------------------

    def watch_has_focus(self, has_focus: bool) -> None:
        super().watch_has_focus(has_focus)
        self._draw()

    def on_resize(self, _: events.Resize) -> None:
        self._draw()

    @property
    def _width(self) -> int:
        return self.scrollable_content_region.width or self.size.width or 80

    def _draw(self) -> None:
        if not self.display or self._stats is None:
            return
        chosen = self.turn if self.has_focus else 0
        lines = draw(self._stats, self._episodes, self._width, chosen)
        self.border_title = Content(told(self._stats, self._found, chosen) if chosen else "segments")
        self.border_subtitle = Content("←→ turn · Enter inspects · Esc back" if chosen else "Tab: choose a turn")
        self.query_one("#cells", Label).update(as_content(lines))
        at = next((number for number, line in enumerate(lines) if _is_chosen(line)), None)
        if at is None:
            self.call_after_refresh(self.scroll_end, animate=False)
        else:
            self.call_after_refresh(self._reveal, at)

    def _reveal(self, line: int) -> None:
        """Scroll so far that the chosen turn's row and its mark are to be seen."""
        top, height = round(self.scroll_y), self.scrollable_content_region.height
        if not top < line < top + height - 1:
            self.scroll_to(y=max(0, line - height // 2), animate=False)


def told(stats: Mapping[str, Any], found: Sequence[Cell], turn: int) -> str:
    """One turn in figures: its own where they are known, else those of its segment."""
    own = next((one for one in stats.get("turns", ()) if one["turn"] == turn), None)
    cell = next((one for one in found if one.first <= turn <= one.last), None)
    parts = [f"turn {turn}"]
    if own:
        parts += [f"{own['tokens']} tokens"]
    elif cell:
        parts += [f"{cell.end - cell.start} tokens"]
    parts += [_where(cell)] if cell else []
    if own:
        parts += [f"{size(own['bytes_in_memory'])} in memory", f"{size(own['bytes_on_disk'])} on disk"]
    return " · ".join(parts)


def _where(cell: Cell) -> str:
    shared = f" (of turns {cell.turns})" if cell.first != cell.last else ""
    return (f"{cell.held:.0%} in memory" if cell.tier == "part" else GLYPHS[cell.kind][2]) + shared


def _is_chosen(line: Line) -> bool:
    return any(span.style == "chosen" and span.text.strip() for span in line)


def as_content(lines: Sequence[Line]) -> Content:
    """Lines in the colours of the theme; nothing in them is markup."""
    parts: list[str | tuple[str, str]] = []
    for number, line in enumerate(lines):
        parts += ["\n"] if number else []
        parts += [(span.text, STYLES[span.style]) if STYLES[span.style] else span.text for span in line]
    return Content.assemble(*parts)
