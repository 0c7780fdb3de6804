"""Markdown as lines of coloured text, without a widget for every paragraph: a long chat stays quick to lay out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from textual.content import Content, Span

from kvchat.terminal import neutralise
from kvchat.tui.lines import TAB, Line

BULLETS = "•◦▪"
MARKS = {"em": "italic", "strong": "bold", "s": "strike"}
HEADINGS = {"h1": "bold underline $text-primary", "h2": "bold $text-primary", "h3": "bold $text-secondary"}
QUOTE = Content.styled("▌ ", "$text-muted")
RULE = "─" * 24


def parser() -> MarkdownIt:
    """Of the Markdown that models write. HTML is text, or whatever looks like a tag would not be seen."""
    made = MarkdownIt("gfm-like", {"html": False})
    made.core.ruler.push("neutralise", _neutralise)
    return made


def _neutralise(state: StateCore) -> None:
    """Reading turns `&#x202e;`, and `%1b` in the text of a link, into the characters themselves."""
    waiting = list(state.tokens)
    while waiting:
        token = waiting.pop()
        token.content = neutralise(token.content)
        waiting += token.children or ()


def blocks(tokens: Sequence[Token]) -> list[list[Token]]:
    """Tokens by the outermost block that they belong to."""
    found: list[list[Token]] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            found.append([])
        found[-1].append(token)
    return found


def lines_of(tokens: Iterable[Token]) -> list[Line]:
    """The lines of some blocks, blank ones between them."""
    writer = _Writer()
    for token in tokens:
        writer.take(token)
    return writer.lines


class _Writer:
    """Writes lines, each behind the marks of the lists and quotes that it stands in."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._rest: list[Content] = []  # what stands before every line, from the outside to the inside
        self._first: list[Content | None] = []  # what stands there once, before the next line
        self._numbers: list[int | None] = []  # the next number of each open list; None: bullets
        self._style = ""
        self._is_beginning = False

    def take(self, token: Token) -> None:
        """Write what the next token of the stream says."""
        act = getattr(self, f"_{token.type}", None)
        if act is not None:
            act(token)

    def _paragraph_open(self, token: Token) -> None:
        if not token.hidden:
            self._space()

    def _heading_open(self, token: Token) -> None:
        self._space()
        self._style = HEADINGS.get(token.tag, "bold")

    def _heading_close(self, _: Token) -> None:
        self._style = ""

    def _inline(self, token: Token) -> None:
        text = inline(token.children or ())
        for line in text.split("\n", allow_blank=True):
            self._write(line.stylize(self._style) if self._style else line)

    def _bullet_list_open(self, _: Token) -> None:
        self._space_list()
        self._numbers.append(None)

    def _ordered_list_open(self, token: Token) -> None:
        self._space_list()
        self._numbers.append(int(token.attrs.get("start", 1)))

    def _bullet_list_close(self, _: Token) -> None:
        self._numbers.pop()

    _ordered_list_close = _bullet_list_close

    def _list_item_open(self, _: Token) -> None:
        number = self._numbers[-1]
        if number is None:
            mark = BULLETS[(len(self._numbers) - 1) % len(BULLETS)] + " "
        else:
            mark, self._numbers[-1] = f"{number}. ", number + 1
        self._push(Content.styled(mark, "$text-accent"), Content(" " * len(mark)))

    def _list_item_close(self, _: Token) -> None:
        if self._first[-1] is not None:  # an empty item
            self._write(Content(""))
        self._pop()

    def _blockquote_open(self, _: Token) -> None:
        self._space()
        self._push(None, QUOTE)

    def _blockquote_close(self, _: Token) -> None:
        self._pop()

    def _hr(self, _: Token) -> None:
        self._space()
        self._write(Content.styled(RULE, "$text-muted"))

    def _fence(self, token: Token) -> None:
        self._space()
        for line in token.content.removesuffix("\n").split("\n"):
            self._write(Content.styled(line.expandtabs(TAB), "$text-warning"))

    _code_block = _fence

    def _push(self, first: Content | None, rest: Content) -> None:
        self._is_beginning = True
        self._first.append(first)
        self._rest.append(rest)

    def _pop(self) -> None:
        self._first.pop()
        self._rest.pop()

    def _space(self) -> None:
        """A blank line between this block and what is above it, unless it begins a list item or a quote."""
        if self.lines and not self._is_beginning:
            self.lines.append(Line(Content(""), self._before(), self._before()))

    def _space_list(self) -> None:
        if not self._numbers:
            self._space()

    def _write(self, text: Content) -> None:
        firsts = zip(self._first, self._rest, strict=True)
        first = Content("").join([rest if once is None else once for once, rest in firsts])
        self._first = [None] * len(self._first)
        self._is_beginning = False
        self.lines.append(Line(text, first, self._before()))

    def _before(self) -> Content:
        return Content("").join(self._rest)


def inline(tokens: Iterable[Token]) -> Content:
    """Text with its marks; where a link leads stands behind it, for what the model wrote is not opened by a click."""
    text: list[str] = []
    spans: list[Span] = []
    open_at: list[tuple[int, str]] = []
    length = 0

    def put(piece: str, style: str = "") -> None:
        nonlocal length
        text.append(piece)
        if style and piece:
            spans.append(Span(length, length + len(piece), style))
        length += len(piece)

    for token in tokens:
        kind, _, end = token.type.rpartition("_")
        if end == "open":
            open_at.append((length, "" if kind != "link" else str(token.attrs.get("href", ""))))
        elif end == "close":
            begun, href = open_at.pop()
            spans.append(Span(begun, length, MARKS.get(kind, "underline")))
            if kind == "link" and not _says("".join(text)[begun:], href):
                put(f" ‹{href}›", "$text-muted")
        elif token.type == "image":
            put(f"[{token.content or 'image'}]", "italic")
            put(f" ‹{token.attrs.get('src', '')}›", "$text-muted")
        elif token.type in ("softbreak", "hardbreak"):
            put("\n")  # a model that ends a line means it, as in a poem
        else:
            put(token.content.replace("\n", " "), "$text-warning" if token.type == "code_inline" else "")
    return Content("".join(text), spans=spans)


def _says(text: str, href: Any) -> bool:
    """The text of a link is where it leads."""
    return text in (href, href.removeprefix("mailto:"), href.split("://")[-1])
