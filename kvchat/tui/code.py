"""A block of code in an answer: plain while it is being written, coloured once it is complete."""

from __future__ import annotations

from asyncio import to_thread
from typing import ClassVar

from textual.content import Content

from kvchat.tui.lines import TAB, Line, Lines


class CodeBlock(Lines):
    """Code, framed by its language and the number by which it is copied.

    Args:
        info: what stands behind the fence; its first word is the language.
        number: which of its answer's blocks it is, from 1.
    """

    MOST_COLOURED: ClassVar[int] = 100_000
    """Characters of code that are coloured."""

    def __init__(self, info: str, number: int) -> None:
        super().__init__()
        words = info.strip("{}. ").split()
        self.language = words[0].lower() if words else ""
        self.number = number
        self.border_title = Content(self.language[:30] or "code")
        self.border_subtitle = Content(f"{number}")

    def finish(self) -> None:
        """Colour it: nothing more comes."""
        if self.language and self.num_lines and len(self.plain) <= self.MOST_COLOURED:
            self.run_worker(self._colour(), exit_on_error=False)

    async def _colour(self) -> None:
        lines = await to_thread(coloured, self.plain, self.language)
        if len(lines) == self.num_lines:
            self.put(0, map(Line, lines))


def coloured(code: str, language: str) -> list[Content]:
    """The lines of some code in colours; in none if nobody knows the language."""
    from textual.highlight import highlight  # it reads Pygments, which the first paint need not wait for

    return list(highlight(code, language=language, tab_size=TAB).split("\n", allow_blank=True))
