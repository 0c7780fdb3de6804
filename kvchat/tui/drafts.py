"""The unsent input, kept with its session: saved a little after typing ends, and back when the session is opened."""

from __future__ import annotations

from asyncio import Lock, to_thread
from typing import TYPE_CHECKING, ClassVar

from textual.timer import Timer

from kvchat.errors import StoreError

if TYPE_CHECKING:
    from kvchat.handle import Session
    from kvchat.tui.session_screen import SessionScreen


class Drafts:
    """The draft of the session that is open in `screen`."""

    AFTER_S: ClassVar[float] = 1.0
    """Seconds without a key after which it is saved."""
    AGAIN_S: ClassVar[float] = 10.0
    """Seconds after which it is tried again where it could not be saved."""

    def __init__(self, screen: SessionScreen) -> None:
        self.screen = screen
        self.latest = ""
        """The text when it was looked at last: there is no input once the window is closed."""
        self.aside = ""
        """What was taken out of the input, and is not saved yet: another session is being opened."""
        self._stored: str | None = ""  # what the session is known to have; None: it was not read yet
        self._timer: Timer | None = None
        self._saving = Lock()

    def typed(self) -> None:
        """The input changed."""
        self.latest = self.text
        self._look_after(self.AFTER_S)

    @property
    def text(self) -> str:
        """What would be lost: messages that wait, and the input, or what it held before a message was edited in it."""
        editing = self.screen.editing
        typed = editing.before if editing else self.screen.prompt.text
        return _joined(self.aside, _joined("\n".join(self.screen.waiting.texts), typed))

    def _look_after(self, seconds: float) -> None:
        if self._timer:
            self._timer.stop()
        self._timer = self.screen.set_timer(seconds, self._due)

    def _due(self) -> None:
        if self.screen.chat is not None:
            self.screen.jobs.beside(self._save(self.screen.chat))

    async def _save(self, chat: Session) -> None:
        async with self._saving:  # a turn may keep the engine: the newest text is written after it, and the last
            if chat is self.screen.chat and self._stored is not None and self.text != self._stored:
                await self._write(chat, self.text)

    async def _write(self, chat: Session, text: str) -> None:
        try:
            await to_thread(chat.set_draft, text)  # another process that writes is waited for, some seconds
        except StoreError:
            self._look_after(self.AGAIN_S)
            raise
        self._stored = text

    def put_aside(self) -> str:
        """Take what is unsent out of the input, as another session is opened; what was edited comes back by Up."""
        screen = self.screen
        if screen.editing:
            screen.prompt.remember([screen.prompt.text])
            screen.end_editing()
        self.aside = screen.prompt.text
        if self.aside:
            screen.prompt.clear()
        return self.aside

    async def leave(self, chat: Session, text: str) -> None:
        """Save `text` as what was left unsent in `chat`, which another session follows."""
        async with self._saving:
            await self._write(chat, text)
            self._stored, self.aside = None, ""
            self.latest = self.text

    async def bring_back(self, chat: Session) -> None:
        """Put what was left unsent in `chat` in front of what was typed since."""
        self._stored = await to_thread(lambda: chat.draft)
        if self._stored:
            self.screen.prompt.give_back(self._stored)
        self._look_after(self.AFTER_S)

    def write(self) -> None:
        """Save it now, in this thread: the window is closed.

        Raises:
            StoreError: it could not be saved; the text is in the message, and nowhere else.
        """
        chat, text = self.screen.chat, self.latest
        if chat is None or text == (self._stored or ""):
            return
        try:
            chat.set_draft(text if self._stored is not None else _joined(chat.draft, text))
        except StoreError as error:
            raise StoreError(f"{error}; what was typed and not sent is not saved: {text}") from error


def _joined(first: str, second: str) -> str:
    return f"{first}\n{second}" if first and second else first or second
