"""A list of equally high rows that draws only those that are to be seen: ten thousand cost no more than ten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.content import Content
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.visual import Visual

from kvchat.terminal import neutralise

Draw = Callable[[int, int], Sequence[Content]]
"""The lines of a row, from its number and the columns there are."""

WIDTHS = [(0, "-narrow"), (110, "-wide")]
"""Columns from which a screen has these classes; a wide one has room for a preview at the right."""

MARK = "❯ ", "  "
"""Before the first line of the chosen row, and before every other line."""


class Rows(ScrollView, can_focus=False):
    """The rows, of which one is chosen. It takes no keys: the screen tells it where to go.

    Args:
        height: lines of a row.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"rows--row", "rows--chosen", "rows--mark"}
    DEFAULT_CSS = """
    Rows {
        height: 1fr;
        scrollbar-size-vertical: 1;

        & > .rows--chosen { background: $accent 15%; }
        & > .rows--mark { color: $accent; text-style: bold; }
    }
    """

    @dataclass
    class Highlighted(Message):
        """Another row is chosen, or the same one after all were replaced; None if there is none."""

        index: int | None

    @dataclass
    class Pressed(Message):
        """A row was clicked on."""

        index: int

    def __init__(self, height: int = 2, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.row_height = height
        self.count = 0
        self.chosen: int | None = None
        self._draw: Draw = lambda index, width: ()
        self._drawn: dict[tuple[int, bool], list[Strip]] = {}

    def show(self, count: int, draw: Draw, chosen: int = 0) -> None:
        """Replace all rows."""
        self.count, self._draw = count, draw
        self.virtual_size = Size(0, count * self.row_height)
        self.chosen = None
        self.scroll_to(y=0, animate=False, immediate=True)
        self.redraw()
        self.choose(chosen)
        if not count:
            self.post_message(self.Highlighted(None))

    def choose(self, index: int) -> None:
        """Go to a row, or to the nearest one that there is."""
        if not self.count:
            return
        index = min(max(index, 0), self.count - 1)
        if index != self.chosen:
            self.chosen = index
            self.post_message(self.Highlighted(index))
            self.refresh()
        self.call_after_refresh(self._follow)

    def move(self, rows: int) -> None:
        """Go so many rows down, or up if it is negative."""
        self.choose((self.chosen or 0) + rows)

    def page(self, pages: int) -> None:
        """Go so many screens down, or up."""
        self.move(pages * max(1, self.size.height // self.row_height - 1))

    def redraw(self) -> None:
        """Draw anew what is to be seen."""
        self._drawn.clear()
        self.refresh()

    def _follow(self) -> None:
        if self.chosen is not None:
            row = Region(0, self.chosen * self.row_height, 1, self.row_height)
            self.scroll_to_region(row, animate=False, force=True)

    def on_resize(self, _: events.Resize) -> None:
        self.redraw()
        self.call_after_refresh(self._follow)

    def notify_style_update(self) -> None:
        self._drawn.clear()
        super().notify_style_update()

    def on_click(self, event: events.Click) -> None:
        index = (event.y + self.scroll_offset.y) // self.row_height
        if index < self.count:
            self.choose(index)
            self.post_message(self.Pressed(index))

    def render_line(self, y: int) -> Strip:
        index, line = divmod(y + self.scroll_offset.y, self.row_height)
        if index >= self.count:
            return Strip.blank(self.size.width, self.rich_style)
        key = index, index == self.chosen
        if key not in self._drawn:
            if len(self._drawn) > 1000:
                self._drawn.clear()
            self._drawn[key] = self._strips(*key)
        return self._drawn[key][line]

    def _strips(self, index: int, is_chosen: bool) -> list[Strip]:
        width = self.scrollable_content_region.width
        style = self.get_visual_style("rows--chosen" if is_chosen else "rows--row")
        drawn = [*self._draw(index, max(0, width - 3)), *[Content("")] * self.row_height][: self.row_height]
        strips = []
        for number, content in enumerate(drawn):
            mark = Content.styled(MARK[not is_chosen or number > 0], self.get_visual_style("rows--mark"))
            line = (mark + content).truncate(width, ellipsis=True)
            strip, *_ = Visual.to_strips(self, line, width, 1, style)
            strips.append(strip.adjust_cell_length(width, style.rich_style))
        return strips


def one_line(text: str) -> str:
    """`text` without anything that a terminal obeys, on one line; as long as it was but for carriage returns."""
    return neutralise(text).replace("\n", " ").replace("\t", " ")


def lit(text: str, places: Sequence[int], style: str, found: str) -> Content:
    """Text on one line in `style`, its characters at `places` in `found`."""
    content = Content.styled(text, style)
    for place in places:
        content = content.stylize(found, place, place + 1)
    return content


def spread(left: Content, right: Content, width: int) -> Content:
    """One line with a text at either end; the left one is cut if there is no room for both."""
    room = max(0, width - right.cell_length - 1)
    return left.truncate(room, ellipsis=True, pad=True) + " " + right
