"""What the help screen says of figures and signs, and how it lays out its two columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from textual.content import Content

WIDEST = 26
"""Columns for what is explained, at most."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is explained, and the explanation. Both are safe to show."""

    left: Content
    right: str


@dataclass(frozen=True, slots=True)
class Section:
    """Rows under a heading."""

    heading: str
    rows: tuple[Row, ...]


def _section(heading: str, *rows: tuple[str, str]) -> Section:
    return Section(heading, tuple(Row(Content.styled(left, "$text-accent"), right) for left, right in rows))


TYPING = _section(
    "",
    ("//", "at the beginning of a message sends one slash"),
    ("Enter, while it answers", "lets the message wait until the answer is complete"),
).rows

METERS = _section(
    "The meters",
    (
        "4012 / 8192 tokens ━━──",
        "what the conversation takes of the model's window; amber above 75%, red above 90%",
    ),
    (
        "… in the window, … in all",
        "the conversation is longer than the window: the model sees its newest part",
    ),
    ("keep 0.5", "the fraction of their KV pairs that older turns hold in memory; less of it means less memory"),
    ("KV … in memory, … on disk", "the bytes that the KV pairs take now, and those that are saved for later"),
    ("21.4 tokens/s", "how fast the answer comes, and how long its first word took"),
)

TURN_LINE = _section(
    "The line below an answer",
    ("cached 3912", "tokens that needed no computing, for their KV was there"),
    ("prefilled 41", "tokens that had to be read: your message, and whatever was lost"),
    ("recalled turns 3-5", "KV that was brought back from disk, because the question concerned these turns"),
    ("kept 1204/3953 pairs", "KV pairs in memory, of all that the conversation has made"),
    ("18 MB", "the memory that they take"),
    ("sealing…, sealed 0.4 s", "the turn is scored, compressed and saved; you can go on typing meanwhile"),
    ("stopped", "you ended the answer; what had been said is kept, and /continue goes on with it"),
    ("cut at max_new_tokens", "the answer reached its limit; /continue goes on with it"),
)

BRANCHES = _section(
    "Sessions and branches",
    ("●", "in the branches: on the path that the conversation goes; in the list: the session that is open"),
    ("○", "said on another branch; Enter on it goes over there, and nothing is lost"),
    ("⋯ 11 messages", "a part without branches, folded; Enter shows it"),
    ("+5", "messages further down a branch that is shut; → opens it, ← shuts it"),
    ("#tag", "in the list of sessions: only those with the tag"),
    ("/words", "in the list of sessions: search what was said"),
)


def layout(sections: Iterable[Section], words: Sequence[str], width: int) -> Content:
    """Those rows of the sections that have all the words, for so many columns; empty if there are none."""
    parts: list[Content] = []
    for section in sections:
        rows = [row for row in section.rows if _has(row, section.heading, words)]
        if rows:
            parts += [Content.styled(section.heading, "bold $text-primary"), *_lines(rows, width), Content("")]
    return Content("\n").join(parts[:-1])


def _has(row: Row, heading: str, words: Sequence[str]) -> bool:
    text = f"{heading} {row.left.plain} {row.right}".lower()
    return all(word in text for word in words)


def _lines(rows: Sequence[Row], width: int) -> Iterator[Content]:
    """Two columns; what is too long in the right one goes on below itself."""
    first = min(WIDEST, max(row.left.cell_length for row in rows), max(8, width - 28))
    for row in rows:
        told = textwrap.wrap(row.right, max(20, width - first - 4)) or [""]
        left = Content("  ") + row.left
        if row.left.cell_length > first:
            yield left
            left = Content("")
        yield left.pad_right(first + 4 - left.cell_length) + told[0]
        for more in told[1:]:
            yield Content(" " * (first + 4) + more)
