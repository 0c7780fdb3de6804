"""An answer's text as it comes: clipped to what a screen can hold, and cut into prose, code and reasoning.

Each part is drawn by its own means: Markdown that is appended to, and for code and reasoning plain rows, which cost
next to nothing to add to. Nothing here knows a widget.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["prose", "code", "thought"]

LONGEST_LINE = 4000
"""Characters of a line that are laid out; a line of a megabyte would hold up the screen."""
MOST_SHOWN = 200_000
"""Characters of a text that are laid out."""
SECTION = 3000
"""Prose longer than this goes on in a new part at the next paragraph: drawing a part costs as much as it has text."""

FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`\n]*)\n?")
THINK, END_THINK = "<think>", "</think>"
CONTINUES = re.compile(r"[\s>|*+\-\d\[:]")
"""How a line may begin that belongs to a list, a quote, a table or a definition before it."""


@dataclass(frozen=True, slots=True)
class Step:
    """What the next characters do: "open" a part of a kind (`text` is the code's language), "add" to it, "close" it.

    "fold" says that everything so far was reasoning: its end came, and its beginning stood in the prompt.
    """

    act: Literal["open", "add", "close", "fold"]
    kind: Kind
    text: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text for one part: for the last one if `info` is None, else for a new one. `is_last` if it has all of it then.

    One that `is_fold` is the end of a reasoning that all before belongs to.
    """

    kind: Kind
    info: str | None
    text: str
    is_last: bool
    is_fold: bool = False


class Clipper:
    """Lets through what a screen can hold of a text that comes in pieces, and says where it left something out."""

    def __init__(self) -> None:
        self._column = self._shown = self._left_out = 0

    def feed(self, text: str) -> str:
        """What is shown of the next piece."""
        first, *others = text.split("\n")
        kept = [self._take(first)]
        for line in others:
            kept += [self._end_line(), self._take(line)]
        return "".join(kept)

    def _end_line(self) -> str:
        if self._shown >= MOST_SHOWN:
            self._left_out += 1
            return ""
        self._shown += 1
        return self.end() + "\n"

    def end(self) -> str:
        """What stands at the end of a line, or of the whole text, in place of the characters that were left out."""
        number, self._left_out, self._column = self._left_out, 0, 0
        return f" … (+{number} characters, copied with the rest)" if number else ""

    def _take(self, piece: str) -> str:
        room = max(0, min(LONGEST_LINE - self._column, MOST_SHOWN - self._shown))
        kept = piece[:room]
        self._column += len(piece)
        self._shown += len(kept)
        self._left_out += len(piece) - len(kept)
        return kept


def clip(text: str) -> str:
    """What a screen can hold of a whole text."""
    clipper = Clipper()
    return clipper.feed(text) + clipper.end()


class Splitter:
    """Turns text that comes in pieces into steps.

    A line is held back only while it may still become the beginning or the end of a part, so that text is shown as
    soon as it comes.
    """

    def __init__(self) -> None:
        self._held = ""
        self._kind: Kind | None = None
        self._mid = False  # the line's beginning was given out already
        self._fence = ""
        self._indent = 0
        self._length = 0
        self._after_blank = False
        self._is_first = True  # no reasoning was seen, nor code: what comes may be reasoning whose beginning is missing

    def feed(self, text: str, *, final: bool = False) -> list[Step]:
        """The steps that the next piece makes certain; all that are left if it is the `final` one."""
        *lines, rest = (self._held + text).split("\n")
        self._held = ""
        steps = [step for line in lines for step in self._take(line + "\n")]
        if final:
            return [*steps, *(self._take(rest) if rest else ()), *self._close()]
        return [*steps, *self._take_part(rest)]

    def _take_part(self, rest: str) -> Iterator[Step]:
        """A line whose end has not come: what can be shown of it."""
        mark = rest.lstrip()
        may_begin = not self._mid and self._kind in (None, "prose")
        if self._kind == "thought":
            before, tag, after = rest.partition(END_THINK)
            before, self._held = (before, "") if tag else _without_prefix_of(END_THINK, before)
            yield from self._add(before)
            if tag:
                yield from self._close()
                yield from self._take_part(after.lstrip())
        elif may_begin and mark.startswith(THINK):
            yield from self._open("thought")
            yield from self._take_part(mark.removeprefix(THINK))
        elif may_begin and self._is_first and mark.startswith(END_THINK):
            yield from self._fold()
            yield from self._take_part(mark.removeprefix(END_THINK).lstrip())
        elif not self._mid and self._may_be_mark(rest):
            self._held = rest
        elif rest:
            yield from self._take(rest)
            self._mid = True

    def _take(self, line: str) -> Iterator[Step]:
        if self._kind == "thought":
            yield from self._think(line)
        elif self._mid:
            yield from self._add(line)
        elif self._kind == "code":
            yield from self._code(line)
        else:
            yield from self._prose(line)
        self._mid = self._mid and not line.endswith("\n")

    def _think(self, line: str) -> Iterator[Step]:
        before, tag, after = line.partition(END_THINK)
        yield from self._add(before)
        if tag:
            yield from self._close()
            if after.strip():
                yield from self._take(after.lstrip())

    def _code(self, line: str) -> Iterator[Step]:
        mark = line.strip()
        if mark and set(mark) == {self._fence[0]} and len(mark) >= len(self._fence):
            yield from self._close()
        else:
            indent = len(line) - len(line.lstrip(" \t"))
            yield from self._add(line[min(indent, self._indent) :])

    def _prose(self, line: str) -> Iterator[Step]:
        mark = line.lstrip()
        if found := FENCE.fullmatch(line):
            self._indent, self._fence = len(found[1]), found[2]
            yield from self._open("code", found[3].strip())
        elif mark.startswith(THINK):
            yield from self._open("thought")
            yield from self._think(mark.removeprefix(THINK))
        elif mark.startswith(END_THINK) and self._is_first:
            yield from self._fold()
            yield from self._prose(mark.removeprefix(END_THINK).lstrip())
        elif self._kind or mark:
            if self._kind is None or (self._length > SECTION and self._after_blank and not CONTINUES.match(line)):
                yield from self._open("prose")
            yield from self._add(line)

    def _may_be_mark(self, rest: str) -> bool:
        """Whether what came of a line may still become a mark; nobody waits for more than a line of the screen."""
        mark = rest.strip()
        if not rest or len(rest) > 80:
            return not rest
        if self._kind == "code":
            return set(mark) <= {self._fence[0]}
        tags = (THINK, END_THINK) if self._is_first else (THINK,)
        fences = mark.startswith(("```", "~~~")) or mark in ("", "`", "``", "~", "~~")
        return fences or any(tag.startswith(mark) for tag in tags)

    def _open(self, kind: Kind, info: str = "") -> Iterator[Step]:
        yield from self._close()
        self._kind, self._length = kind, 0
        self._is_first = self._is_first and kind == "prose"
        yield Step("open", kind, info)

    def _fold(self) -> Iterator[Step]:
        yield Step("fold", "thought")
        self._kind, self._is_first, self._length = None, False, 0

    def _add(self, text: str) -> Iterator[Step]:
        if text and self._kind:
            self._length += len(text)
            self._after_blank = not text.strip() and not self._mid
            yield Step("add", self._kind, text)

    def _close(self) -> Iterator[Step]:
        if self._kind:
            kind, self._kind = self._kind, None
            yield Step("close", kind)


def _without_prefix_of(tag: str, text: str) -> tuple[str, str]:
    """`text` in two: without the end that may be the tag's beginning, and that end."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return text[:-length], text[-length:]
    return text, ""


def pieces(steps: Iterable[Step]) -> Iterator[Piece]:
    """Steps, those of a part joined."""
    info: str | None = None
    kind: Kind = "prose"
    texts: list[str] = []
    for step in steps:
        if step.act == "open":
            info, kind = step.text, step.kind
        elif step.act == "add":
            kind = step.kind
            texts.append(step.text)
        else:
            yield Piece(step.kind, info, "".join(texts), True, step.act == "fold")
            info, texts = None, []
    if info is not None or texts:
        yield Piece(kind, info, "".join(texts), False)


def code_blocks(text: str) -> list[str]:
    """The code of each block in an answer, in its full length and without its fences."""
    steps = Splitter().feed(text, final=True)
    return [piece.text.removesuffix("\n") for piece in pieces(steps) if piece.kind == "code"]
