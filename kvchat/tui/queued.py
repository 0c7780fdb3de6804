"""Messages that wait for the end of an answer."""

from __future__ import annotations

from kvchat.tui.plain_text import Plain

MOST_SHOWN = 4


class Queue(Plain):
    """The list of them, the oldest first; not to be seen while it is empty."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.texts: list[str] = []

    def put(self, text: str) -> None:
        """Let one more wait."""
        self.texts.append(text)
        self._show()

    def take_first(self) -> str:
        """The one whose turn it is, or nothing."""
        return self._take(0)

    def take_newest(self) -> str:
        """The one that came last, or nothing."""
        return self._take(-1)

    def take_all(self) -> str:
        """All of them, one below the other."""
        texts, self.texts = self.texts, []
        self._show()
        return "\n".join(texts)

    def _take(self, place: int) -> str:
        text = self.texts.pop(place) if self.texts else ""
        self._show()
        return text

    def _show(self) -> None:
        self.display = bool(self.texts)
        lines = [f"{'next' if number == 0 else 'then'}: {_line(text)}" for number, text in enumerate(self.texts)]
        if len(lines) > MOST_SHOWN:
            lines[MOST_SHOWN - 1 : -1] = [f"      {len(lines) - MOST_SHOWN} more"]
        self.show("\n".join(lines))


def _line(text: str) -> str:
    return " ".join(text.split())
