"""The list of sessions at the left of the chat screen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from kvchat.terminal import neutralise

if TYPE_CHECKING:
    from kvchat.store.store import SessionInfo

DATED = re.compile(r"[\d.: -]+")
"""A name that says no more than when the session was begun."""


class SessionList(OptionList):
    """Titles of all sessions, with name, turns and age; the last used first."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)
        self.border_title = "sessions"
        self.infos: list[SessionInfo] = []
        self._current: str | None = None

    def show(self, sessions: Iterable[SessionInfo], current: str | None) -> None:
        """List these; `current` is the name of the open one."""
        self.infos = sorted(sessions, key=lambda info: info.updated, reverse=True)
        self._current = current
        self._draw()
        if current in self.names:
            self.highlighted = self.names.index(current)

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        marked, width = self.highlighted, max(10, self.scrollable_content_region.width - 2)
        self.clear_options()
        self.add_options([Option(_entry(info, info.name == self._current, width)) for info in self.infos])
        self.highlighted = marked

    @property
    def names(self) -> list[str]:
        """As they stand in the list."""
        return [info.name for info in self.infos]


def _entry(info: SessionInfo, is_current: bool, width: int) -> Content:
    turns = f"{info.num_turns} turn{'' if info.num_turns == 1 else 's'}"
    title, name = _line(info.title), _line(info.name)
    named = [name] if title and not DATED.fullmatch(name) else []
    facts = " · ".join([turns, age(info.updated), *named])
    style = "bold $text-accent" if is_current else "bold"
    lines = Content.styled(title or name, style), Content.styled(facts, "$foreground-muted")
    return Content("\n").join(line.truncate(width, ellipsis=True) for line in lines)


def _line(text: str) -> str:
    return neutralise(" ".join(text.split()))


def age(stamp: str) -> str:
    """The time since an ISO 8601 `stamp` (UTC if it names no zone), in its largest unit."""
    then = datetime.fromisoformat(stamp)
    seconds = (datetime.now(UTC) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "now"
