"""Rows of plain or coloured text that can be added to at any length: only what is new is laid out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.cells import get_character_cell_size
from textual.content import Content
from textual.geometry import Size
from textual.selection import Selection
from textual.strip import Strip
from textual.style import Style
from textual.widget import Widget

TAB = 4
NOTHING = Content("")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text, and what stands before its first row and before the others."""

    text: Content
    first: Content = NOTHING
    rest: Content = NOTHING

    def is_same(self, other: Line) -> bool:
        """Looks the same: Content counts as equal whatever its colours."""
        return self.text.is_same(other.text) and (self.first, self.rest) == (other.first, other.rest)


class Lines(Widget):
    """Text that grows at its end, wrapped to the width: between words if `words` is set, else anywhere.

    The text must be neutralised already.
    """

    def __init__(self, text: str = "", *, words: bool = False, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self._words = words
        self._lines: list[Line] = []
        self._rows: list[tuple[int, int, int]] = []  # the line, its first character of the row, and one past the last
        self._width = 0
        self._is_open = False  # the last line's end has not come
        self.add(text)

    @property
    def num_lines(self) -> int:
        """Lines of the text, before they are wrapped."""
        return len(self._lines)

    @property
    def plain(self) -> str:
        """The text as it is laid out."""
        return "\n".join(line.text.plain for line in self._lines)

    def add(self, text: str) -> None:
        """Add text at the end, which may begin in the middle of a line and end in one."""
        if not text:
            return
        first, *others = text.split("\n")
        changed = len(self._lines)
        if self._is_open and self._lines:
            changed -= 1
            first = self._lines.pop().text.plain + first
        pieces = [first, *others]
        self._is_open = bool(pieces[-1])
        self._lines += [Line(Content(piece.expandtabs(TAB))) for piece in (pieces if self._is_open else pieces[:-1])]
        self._lay_out(changed)

    def put(self, first: int, lines: Iterable[Line]) -> None:
        """Show these lines in place of all from number `first` on."""
        fresh = list(lines)
        old = self._lines[first:]
        pairs = enumerate(zip(old, fresh, strict=False))
        same = next((n for n, (one, other) in pairs if not one.is_same(other)), min(len(old), len(fresh)))
        if same < max(len(old), len(fresh)):
            self._lines[first + same :] = fresh[same:]
            self._lay_out(first + same)

    def _lay_out(self, first: int) -> None:
        """Show the lines from `first` on anew."""
        before = len(self._rows)
        self._wrap(first)
        if self.is_attached:
            # Before the first layout nobody knows how wide it is.
            self.refresh(layout=len(self._rows) != before or not self._width)

    def _wrap(self, first: int) -> None:
        while self._rows and self._rows[-1][0] >= first:
            self._rows.pop()
        if not self._width:
            return
        for number in range(first, len(self._lines)):
            line = self._lines[number]
            room = max(1, self._width - max(line.first.cell_length, line.rest.cell_length))
            starts = row_starts(line.text.plain, room, self._words)
            ends = [*starts[1:], len(line.text)]
            self._rows += [(number, start, end) for start, end in zip(starts, ends, strict=True)]

    # -- Textual's side ----------------------------------------------------------------------------------------------

    def get_content_width(self, container: Size, viewport: Size) -> int:
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        if width != self._width and width > 0:
            self._width = width
            self._wrap(0)
        return len(self._rows)

    def render_line(self, y: int) -> Strip:
        style = self.visual_style
        width = self.size.width
        if y >= len(self._rows):
            return Strip.blank(width, style.rich_style)
        number, start, end = self._rows[y]
        line = self._lines[number]
        text = Strip(self._selected(number)[start:end].render_segments(style)).apply_offsets(start, number)
        before = line.rest if start else line.first
        strip = Strip.join([Strip(before.render_segments(style)), text]) if before else text
        return strip.adjust_cell_length(width, style.rich_style)

    def _selected(self, number: int) -> Content:
        """A line with what the mouse selected of it."""
        line, selection = self._lines[number].text, self.text_selection
        if selection is None or (span := selection.get_span(number)) is None:
            return line
        start, end = span
        mark = Style.from_styles(self.screen.get_component_styles("screen--selection"))
        return line.stylize(mark, start, len(line) if end == -1 else end)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        return selection.extract(self.plain), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()


def row_starts(text: str, width: int, words: bool) -> list[int]:
    """Where each row of a line begins, if no row may be wider than `width` cells."""
    if len(text) <= width and text.isascii():
        return [0]
    starts, column, word = [0], 0, 0
    for place, character in enumerate(text):
        size = get_character_cell_size(character)
        if column + size > width and place:
            starts.append(word if words and word > starts[-1] else place)
            column = sum(map(get_character_cell_size, text[starts[-1] : place]))
        column += size
        if character == " ":
            word = place + 1
    return starts
