"""Prose in an answer: Markdown that is added to, of which only the last block is read again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from markdown_it.token import Token
from textual.widget import Widget
from textual.widgets import Markdown

from kvchat.tui.lines import NOTHING, Line, Lines
from kvchat.tui.markdown_lines import blocks, lines_of, parser


class Table(Markdown):
    """A table, which needs columns; always given whole."""

    DEFAULT_CSS = """
    Table { padding: 0; margin: 0; }
    Table > MarkdownTable { margin: 0; }
    """

    def __init__(self, text: str) -> None:
        super().__init__(text, parser_factory=parser, open_links=False)


class Prose:
    """Paragraphs, headings, lists, quotes and tables.

    All but tables is one widget of lines for as long as no table comes. The widgets stand in the answer itself: one
    around them would be laid out and painted too.

    Args:
        mount: puts a widget below all others; on return it is there.
    """

    def __init__(self, mount: Callable[[Widget], Awaitable[None]]) -> None:
        self._mount = mount
        self._parser = parser()
        self._whole = ""
        self._begin()

    def _begin(self) -> None:
        self._tail = ""  # of the source: the last block, which may still change, and what follows it
        self._text: Lines | None = None  # the last part, if it is no table
        self._num_settled = 0  # its lines that are not of the last block
        self._table: Table | None = None  # the last part, if it is one
        self._mounted: list[Lines | Table] = []

    async def add(self, text: str) -> None:
        """Add to the text; on return it is shown."""
        self._whole += text
        self._tail += text
        found = blocks(self._parser.parse(self._tail))
        if not found:
            return
        source = self._tail.split("\n")
        await self._show_all(found, source)
        self._tail = "\n".join(source[_begin(found[-1]) :])

    async def finish(self) -> None:
        """Nothing more comes. Links may lead where is said only now, so all is read again if any do."""
        if "]:" in self._whole:
            whole, self._whole = self._whole, ""
            for part in self._mounted:
                await part.remove()
            self._begin()
            await self.add(whole)

    async def _show_all(self, found: Sequence[Sequence[Token]], source: Sequence[str]) -> None:
        """Show blocks in place of the one that was the last; all but the last stay as they are from now on."""
        lines: list[Line] = []
        num_settled = 0
        for number, block in enumerate(found):
            if block[0].type == "table_open":
                await self._show_lines(lines, len(lines))
                lines, num_settled = [], 0
                end = block[0].map[1] if block[0].map else len(source)
                await self._show_table("\n".join(source[_begin(block) : end]), goes_on=number == 0)
                continue
            self._table = None
            if lines or self._num_settled:
                lines.append(Line(NOTHING))
            lines += lines_of(block)
            num_settled = len(lines) if number < len(found) - 1 else num_settled
        await self._show_lines(lines, num_settled)

    async def _show_lines(self, lines: Sequence[Line], num_settled: int) -> None:
        if self._text is None:
            if not lines:
                return
            self._text = Lines(words=True)
            self._text.put(0, lines)
            await self._put(self._text)
        elif lines or self._num_settled:
            self._text.put(self._num_settled, lines)
        else:  # what was there became a table
            self._mounted.remove(self._text)
            await self._text.remove()
            self._text = None
        self._num_settled += num_settled

    async def _show_table(self, source: str, *, goes_on: bool) -> None:
        if self._table is not None and goes_on:
            await self._table.update(source)
        else:
            self._table = Table(source)
            await self._put(self._table)
        self._text, self._num_settled = None, 0

    async def _put(self, part: Lines | Table) -> None:
        self._mounted.append(part)
        await self._mount(part)


def _begin(block: Sequence[Token]) -> int:
    """The line of the source where a block begins."""
    return block[0].map[0] if block[0].map else 0
