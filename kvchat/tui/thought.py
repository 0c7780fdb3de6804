"""The reasoning in an answer, folded into one line that says how long it is."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from textual import events, on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Static

from kvchat.tui.lines import Lines


class Heading(Static):
    """The line that is always seen; a click opens and closes what is below."""


class Thought(Vertical):
    """Reasoning: closed at first, unless something around it has the class `-thoughts`.

    The user may open it at any time, while it is being written too.

    Args:
        text: what there is of it, neutralised.
        clock: tells how long it takes; None = it is over, and nobody knows.
    """

    def __init__(self, text: str = "", clock: Callable[[], float] | None = monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._begun = clock() if clock else 0.0
        self._seconds: float | None = None
        self._num_words, self._in_word = len(text.split()), False
        self._is_over = clock is None
        self._heading = Heading(markup=False)
        self._body = Lines(text, words=True)
        self._body.display = False

    def compose(self) -> ComposeResult:
        yield self._heading
        yield self._body

    def on_mount(self) -> None:
        self.open(any(node.has_class("-thoughts") for node in self.ancestors))

    @property
    def is_open(self) -> bool:
        """Its text is shown."""
        return self._body.display

    def add(self, text: str) -> None:
        """Add to its text, if there is any."""
        if not text:
            return
        goes_on = self._in_word and not text[:1].isspace()
        self._num_words += len(text.split()) - goes_on
        self._in_word = not text[-1:].isspace()
        self._body.add(text.lstrip("\n") if not self._body.num_lines else text)
        self._say()

    def finish(self) -> None:
        """Nothing more comes, whether or not it was ended properly."""
        self._seconds = self._clock() - self._begun if self._clock else None
        self._is_over = True
        self._say()

    def open(self, is_open: bool) -> None:
        """Open it, or close it."""
        self._body.display = is_open
        self._say()

    def toggle(self) -> None:
        """Open it if it is closed, and the other way round."""
        self.open(not self.is_open)

    def _say(self) -> None:
        seconds = self._clock() - self._begun if self._clock and not self._is_over else self._seconds
        words = f"{self._num_words} word{'' if self._num_words == 1 else 's'}"
        state = "thought" if self._is_over else "thinking…"
        took = "" if seconds is None else f" for {seconds:.0f} s" if self._is_over else f" {seconds:.0f} s"
        self._heading.update(f"{'▾' if self.is_open else '▸'} {state}{took} · {words}")

    @on(events.Click, "Heading")
    def _clicked(self, event: events.Click) -> None:
        event.stop()
        self.toggle()
