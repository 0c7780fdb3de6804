"""Text that is shown literally: never as markup, never with control characters, never longer than a screen can hold."""

from __future__ import annotations

from textual.widgets import Static

from kvchat.terminal import neutralise
from kvchat.tui.splitting import clip


class Plain(Static):
    """A text; `text` is the whole of it."""

    def __init__(self, text: str = "", *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(clip(neutralise(text)), markup=False, id=id, classes=classes)
        self.text = text

    def show(self, text: str) -> None:
        """Show another text."""
        self.text = text
        self.update(clip(neutralise(text)))


class Note(Plain):
    """A line of the program: help, a notice, an error, the numbers of a turn."""
