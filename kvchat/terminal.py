"""Text that a terminal may print: a model's answer must not move the cursor, set a title or hide what it says."""

from __future__ import annotations

import re

UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    r"\u2028\u2029\u202a-\u202e\u2066-\u2069"  # line separators, bidi embeddings, overrides and isolates
    r"\ud800-\udfff]"  # halves of surrogate pairs: they cannot be encoded
)


def neutralise(text: str) -> str:
    """`text` with every control character replaced by a visible sign; newline and tab stay.

    An escape sequence keeps its letters (ESC [ 2 J becomes ␛[2J) and loses its effect. Each character is replaced on
    its own, so a sequence that is split over two pieces of a stream is caught too.
    """
    return UNSAFE.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    char = match.group()
    if char == "\r":
        return ""
    if char in "\u2028\u2029":
        return "\n"
    if char < " ":
        return chr(0x2400 + ord(char))
    return "\u2421" if char == "\x7f" else "\ufffd"
