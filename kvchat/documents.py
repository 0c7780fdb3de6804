"""Text files as parts of a conversation: read, named, and cut at the ends of paragraphs and sentences.

A document is as many messages as it has parts, each with a short answer, so that one of any length can be taken in a
part at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kvchat.errors import InputError
from kvchat.terminal import neutralise

Count = Callable[[str], int]
"""Tokens of a text."""

MOST_BYTES = 16 << 20
"""Of a file: some four million tokens."""
MOST_TOKENS = 1200
"""Of a part."""
LONGEST_TITLE = 80
PART = "{title}, part {number} of {parts}:\n\n{text}"
WHOLE = "{title}:\n\n{text}"
ANSWER = "I have read it."
ENDS = [re.compile(end) for end in (r"\n[ \t\r]*\n\s*", r"\n\s*", r"(?<=[.!?;])\s+|(?<=[。！？])", r"\s+")]
"""Where text is cut, the best places first: paragraphs, lines, sentences, words."""


@dataclass(frozen=True, slots=True)
class Document:
    """A document as messages, and the session in which it stands by itself."""

    session: str
    title: str
    messages: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, title: str, text: str, most: int, count: Count, made_for: str) -> Document:
        """A text in parts of at most so many tokens; `made_for` tells models apart, of which each has a session."""
        title = title_of(title)
        texts = parts(text, most, count)
        form = PART if len(texts) > 1 else WHOLE
        asked = [form.format(title=title, number=i, parts=len(texts), text=one) for i, one in enumerate(texts, 1)]
        pairs = [({"role": "user", "content": one}, {"role": "assistant", "content": ANSWER}) for one in asked]
        digest = hashlib.blake2b("\0".join([made_for, *asked]).encode(), digest_size=4).hexdigest()
        return cls(f"document {title} {digest}", title, tuple(message for pair in pairs for message in pair))


def read_document(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, is empty, too large, or not text in UTF-8.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: no path can be that
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MOST_BYTES:
        raise InputError(f"{path}: a document has at most {MOST_BYTES >> 20} MiB; attach it in several files")
    if (place := data.find(0)) >= 0:
        raise InputError(f"{path}: not text: byte {place} is 0x00")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    if not text.strip():
        raise InputError(f"{path}: the document is empty")
    return text


def title_of(name: str) -> str:
    """A file's name on one line, which does nothing to a terminal."""
    line = " ".join(neutralise(name).split())
    return line if len(line) <= LONGEST_TITLE else line[: LONGEST_TITLE - 1].rstrip() + "…"


def parts(text: str, most: int, count: Count) -> list[str]:
    """The text in pieces of about equal length, which together are all of it.

    Each has at most so many tokens, counted piece by piece. They end where a paragraph does if one ends near.
    """
    pieces = [*_pieces(text, max(1, most // 4), count)]
    left, size, found = sum(size for _, size in pieces), 0, [""]
    for piece, tokens in pieces:
        aim = (left + size) / max(1, -(-(left + size) // max(1, most * 9 // 10)))
        if found[-1].strip() and (size + tokens > most or size >= aim or (size > 0.8 * aim and _ends(found[-1]))):
            found.append("")
            size = 0
        found[-1] += piece
        size, left = size + tokens, left - tokens
    if len(found) > 1 and not found[-1].strip():
        found[-2:] = [found[-2] + found[-1]]
    return found


def _ends(text: str) -> bool:
    """Whether a paragraph does where the text does."""
    return text[len(text.rstrip()) :].count("\n") > 1


def _pieces(text: str, most: int, count: Count, ends: Sequence[re.Pattern[str]] = ENDS) -> Iterator[tuple[str, int]]:
    """A text cut as finely as need be, and the tokens of each piece: at most so many, if it has characters to cut."""
    size = count(text)
    if size <= most or len(text) < 2:
        yield text, size
        return
    if not ends:
        for half in (text[: len(text) // 2], text[len(text) // 2 :]):
            yield from _pieces(half, most, count, ())
        return
    cuts = [0, *(match.end() for match in ends[0].finditer(text)), len(text)]
    for low, high in pairwise(cuts):
        if low < high:
            yield from _pieces(text[low:high], most, count, ends[1:])
