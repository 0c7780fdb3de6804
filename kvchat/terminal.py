"""Text that a terminal may print: a model's answer must not move the cursor, set a title or hide what it says."""

from __future__ import annotations

import json
import re
from typing import Any

UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    r"\u2028\u2029\u202a-\u202e\u2066-\u2069"  # line separators, bidi embeddings, overrides and isolates
    r"\ud800-\udfff]"  # halves of surrogate pairs: they cannot be encoded
)

MOST_MARKS = 8
"""Characters without width in a row that are shown: a flag of a region takes seven, writing fewer."""
MARKS = (
    r"\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f\u2060-\u2065\u206a-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb"  # unseen
    r"\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"  # marks on any letter
    r"\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc\u06df-\u06e4\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"
    r"\U000e0000-\U000e0fff"  # tags, and variations of ideographs
)
"""Characters that take no column, of the kinds that texts are flooded with."""
FLOOD = re.compile(f"([{MARKS}]{{{MOST_MARKS}}})[{MARKS}]+")
LAST_MARKS = re.compile(f"[{MARKS}]*$")


def neutralise(text: str) -> str:
    """`text` with every control character replaced by a visible sign, and floods of marks cut; newline and tab stay.

    An escape sequence keeps its letters (ESC [ 2 J becomes ␛[2J) and loses its effect. Each character is replaced on
    its own, so a sequence that is split over two pieces of a stream is caught too; for floods there is `Stream`.
    """
    text = UNSAFE.sub(_sign, text)
    return text if text.isascii() else FLOOD.sub("\\1\ufffd", text)


def on_a_row(text: str, most: int) -> str:
    """`text` without effect, on one line, and at most so many characters of it."""
    words = " ".join(neutralise(text[: 4 * most]).split())
    return words if len(words) <= most else f"{words[: most - 1]}…"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that has the same value anywhere, and no effect on a terminal: what is unsafe is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    text = UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
    return FLOOD.sub(lambda match: json.dumps(match.group())[1:-1], text)


class Stream:
    """`neutralise` for a text that comes in pieces: a flood that is split over them is cut too."""

    def __init__(self) -> None:
        self._marks = ""

    def step(self, piece: str) -> str:
        """What to show of the next piece."""
        shown = neutralise(self._marks + piece)
        new = shown[len(self._marks) :]
        marks = LAST_MARKS.search(shown)
        self._marks = marks.group() if marks else ""
        return new


def _sign(match: re.Match[str]) -> str:
    char = match.group()
    if char == "\r":
        return ""
    if char in "\u2028\u2029":
        return "\n"
    if char < " ":
        return chr(0x2400 + ord(char))
    return "\u2421" if char == "\x7f" else "\ufffd"
