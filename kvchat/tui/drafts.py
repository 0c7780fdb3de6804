"""The unsent input, kept with its session: saved a little after typing ends, and back when the session is opened."""

from __future__ import annotations

from asyncio import Lock, to_thread
from typing import TYPE_CHECKING, ClassVar

from textual.timer import Timer

if TYPE_CHECKING:
    from kvchat.handle import Session
    from kvchat.tui.session_screen import SessionScreen


class Drafts:
    """The draft of the session that is open in `screen`."""

    AFTER_S: ClassVar[float] = 1.0
    """Seconds without a key after which it is saved."""

    def __init__(self, screen: SessionScreen) -> None:
        self.screen = screen
        self.latest = ""
        """The text when it was looked at last: there is no input once the window is closed."""
        self._stored = ""
        self._timer: Timer | None = None
        self._saving = Lock()

    def typed(self) -> None:
        """The input changed."""
        self.latest = self.text
        if self._timer:
            self._timer.stop()
        self._timer = self.screen.set_timer(self.AFTER_S, self._due)

    @property
    def text(self) -> str:
        """What would be lost: the input, or what it held before a message was edited in it."""
        editing = self.screen.editing
        return editing.before if editing else self.screen.prompt.text

    def _due(self) -> None:
        if self.screen.chat is not None:
            self.screen.jobs.beside(self._save(self.screen.chat))

    async def _save(self, chat: Session) -> None:
        async with self._saving:  # a turn may keep the engine: the newest text is written after it, and the last
            if chat is self.screen.chat and self.text != self._stored:
                await self.keep(chat, self.text)

    async def keep(self, chat: Session, text: str) -> None:
        """Save `text` as what was left unsent in `chat`."""
        self._stored = text
        await to_thread(chat.set_draft, text)

    async def bring_back(self, chat: Session) -> None:
        """Put what was left unsent in `chat` in front of what was typed since."""
        self._stored = await to_thread(lambda: chat.draft)
        if self._stored:
            self.screen.prompt.give_back(self._stored)

    def write(self) -> None:
        """Save it now, in this thread: the window is closed."""
        if self.screen.chat is not None and self.latest != self._stored:
            self.screen.chat.set_draft(self.latest)
