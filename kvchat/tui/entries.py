"""How sessions, search hits and messages look in the session picker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from textual.content import Content

from kvchat.figures import count, size
from kvchat.terminal import neutralise
from kvchat.tui.finding import Letters, Query, title_of
from kvchat.tui.rows import lit, one_line, spread
from kvchat.tui.session_list import age

if TYPE_CHECKING:
    from kvchat.store.store import Message, SearchHit, SessionInfo

DIM, FOUND, TAG = "$foreground-muted", "bold underline $text-warning", "$text-secondary"
SPEAKERS = {"user": "you", "assistant": "model", "system": "system"}
MOST_SHOWN, LONGEST = 8, 1500
"""Messages of a preview, and characters of each."""


def session_lines(info: SessionInfo, letters: Letters, is_current: bool, width: int) -> tuple[Content, Content]:
    """A session in two lines: what it is called and how old it is, then its name, sizes and tags."""
    title, name = title_of(info), one_line(info.name)
    left = Content.assemble(("● ", "$text-success") if is_current else "")
    left += lit(title, letters.places(title), "bold", FOUND)
    first = spread(left, Content.styled(age(info.updated), DIM), width)
    second = Content.styled(" · ".join(_sizes(info)), DIM)
    if name != title:
        named = lit(name, letters.places(name), DIM, FOUND).truncate(max(12, width // 3), ellipsis=True)
        second = named + Content.styled(" · ", DIM) + second
    tags = Content.styled(" ".join(f"#{one_line(tag)}" for tag in info.tags), TAG)
    return first, spread(second, tags.truncate(width // 2, ellipsis=True), width)


def _sizes(info: SessionInfo) -> Iterator[str]:
    yield f"{info.num_turns} turn{'s' * (info.num_turns != 1)}"
    yield f"{count(info.num_tokens)} tokens"
    yield size(info.nbytes)
    if info.num_branches:
        yield f"{info.num_branches} branch{'es' * (info.num_branches != 1)}"


def hit_lines(hit: SearchHit, infos: Mapping[str, SessionInfo], width: int) -> tuple[Content, Content]:
    """A message that was found, in two lines: where it stands, then the words around those that were looked for."""
    info = infos.get(hit.session)
    title = title_of(info) if info else one_line(hit.session)
    where = "on an old branch" if hit.turn is None else f"turn {hit.turn}"
    right = Content.styled(f"{SPEAKERS.get(hit.role, hit.role)} · {where}", DIM)
    found = marked(hit.snippet, hit.spans)
    first = min((start for start, _ in hit.spans), default=0)
    if first > width // 2:
        found = "…" + found[first - width // 3 :]
    return spread(Content.styled(title, "bold"), right, width), found


def nothing_found(query: Query, is_complete: bool, are_some: bool) -> str:
    """Why the list is empty, and what to do about it."""
    if query.text is not None:
        return "No message has all these words." if query.text else "Type words that were said."
    if not is_complete:
        return "Reading the list; while the model is busy this takes until it pauses."
    if are_some:
        return "No session is called that. Ctrl+N begins one; Ctrl+F searches what was said."
    return "There are no sessions yet. Ctrl+N begins one."


def marked(text: str, spans: Sequence[tuple[int, int]]) -> Content:
    """Text on one line with the characters [start, end) of each span marked."""
    parts: list[tuple[str, str]] = []
    done = 0
    for start, end in sorted(spans):
        # Each piece on its own: making it safe may shorten it.
        parts += [(one_line(text[done:start]), ""), (one_line(text[max(done, start) : end]), FOUND)]
        done = max(done, end)
    return Content.assemble(*parts, (one_line(text[done:]), ""))


def preview_of(info: SessionInfo, messages: Sequence[Message]) -> Content:
    """What a session is, and its last messages, each cut where it gets long."""
    about = f"{one_line(info.model)} · begun {_day(info.created)} · last used {_day(info.updated)}"
    kept = f"{info.stored:.0%} of its KV is saved" if info.num_tokens else "nothing was said yet"
    parts: list[str | tuple[str, str]] = [(title_of(info), "bold"), "\n", (f"{about}\n{kept}", DIM)]
    said = [message for message in messages if message.content or message.role != "system"]
    if len(said) > MOST_SHOWN:
        parts.append((f"\n\n⋯ {len(said) - MOST_SHOWN} messages before these", DIM))
    for message in said[-MOST_SHOWN:]:
        colour = "bold $text-accent" if message.role == "user" else "bold $text-success"
        parts += ["\n\n", (SPEAKERS.get(message.role, message.role), colour), "\n", neutralise(_cut(message.content))]
    return Content.assemble(*parts)


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _day(stamp: str) -> str:
    return f"{datetime.fromisoformat(stamp).astimezone():%Y-%m-%d %H:%M}"
