"""The segment map on the screen: how much of each segment memory holds, and where the rest lies."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from textual import events
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Label

from kvchat.segment_map import Line, Style, draw

if TYPE_CHECKING:
    from kvchat.handle import Session

STYLES: dict[Style, str] = {
    "memory": "$text-success",
    "part": "$text-primary",
    "disk": "$foreground-muted",
    "text": "$text-error",
    "tail": "$text-accent",
    "mark": "bold $text-warning",
    "episode": "bold",
    "dim": "$foreground-muted",
    "plain": "",
}


class SegmentMap(VerticalScroll):
    """The map of the open session, hidden until it is asked for. Long ones show their end, and can be scrolled."""

    BORDER_TITLE = "segments"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, can_focus=False)
        self._stats: Mapping[str, Any] | None = None
        self._episodes: Sequence[Mapping[str, Any]] = ()
        self._named: tuple[str, int] = ("", 0)

    def compose(self) -> Any:
        yield Label("", id="cells", markup=False)

    def on_resize(self, _: events.Resize) -> None:
        self._draw()

    def toggle(self) -> bool:
        """Show it or hide it; whether it is to be seen now."""
        self.display = not self.display
        self._draw()
        return bool(self.display)

    async def update(self, chat: Session, stats: Mapping[str, Any]) -> None:
        """Show these figures; episodes are sorted anew only when there are a quarter more turns, for it takes time."""
        self._stats = stats
        self._draw()
        name, turns = self._named
        if self.display and (name != chat.name or not turns <= stats["num_turns"] < turns + max(1, turns // 4)):
            self._named = chat.name, stats["num_turns"]
            self._episodes = await to_thread(chat.episodes)
            self._draw()

    def _draw(self) -> None:
        if self.display and self._stats is not None:
            lines = draw(self._stats, self._episodes, self.scrollable_content_region.width or self.size.width or 80)
            self.query_one("#cells", Label).update(as_content(lines))
            self.call_after_refresh(self.scroll_end, animate=False)


def as_content(lines: Sequence[Line]) -> Content:
    """Lines in the colours of the theme; nothing in them is markup."""
    parts: list[str | tuple[str, str]] = []
    for number, line in enumerate(lines):
        parts += ["\n"] if number else []
        parts += [(span.text, STYLES[span.style]) if STYLES[span.style] else span.text for span in line]
    return Content.assemble(*parts)
