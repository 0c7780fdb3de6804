"""The lines at the top and the bottom of the chat screen: what is open, how full it is, what is going on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Label

from kvchat.events import Phase, Progress
from kvchat.figures import meter
from kvchat.terminal import neutralise
from kvchat.tui.numbers import megabytes
from kvchat.tui.plain_text import Plain
from kvchat.tui.session_list import DATED

if TYPE_CHECKING:
    from textual.widgets import ProgressBar

FEW_COLUMNS = 64
"""Below these the bars say less."""
PHASES: dict[Phase, str] = {
    "download": "downloading the model",
    "convert": "converting the model",
    "load": "loading the model",
    "restore": "restoring saved turns",
    "rebuild": "rebuilding saved turns",
    "prefill": "reading",
    "import": "taking in",
    "seal": "sealing",
}


class TitleBar(Horizontal):
    """The open session and its model; at the right, how full the model's window is."""

    def __init__(self) -> None:
        super().__init__()
        self._offset = 0
        self._named: tuple[str, ...] = ()
        self._full: tuple[str, Content] | None = None
        """The meter: figures and bar."""

    def compose(self) -> ComposeResult:
        yield Plain("kvchat", id="title")
        yield Label("", id="meter", markup=False)

    def name_session(self, name: str, model: str, title: str = "") -> None:
        """`title` stands behind the name, or in place of one that says no more than when the session was begun."""
        if title and DATED.fullmatch(name):
            self._named = (title, model)
        else:
            self._named = (name, model, *([title] if title else []))
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        """Leave out what there is no room for: the program's name, the bar, in the end the figures."""
        width = self.size.width
        if self._named:
            told = " · ".join(self._named if width >= FEW_COLUMNS else self._named[:1])
            self.query_one("#title", Plain).show(told if width < FEW_COLUMNS else f"kvchat  {told}")
        if self._full:
            figures, bar = self._full
            whole = Content.assemble(f"{figures} ", bar) if width >= FEW_COLUMNS else Content(figures)
            self.query_one("#meter", Label).update(whole)

    def measure(self, total: int, window: int, offset: int | None = None) -> None:
        """Draw the context meter: which part of the window a conversation of so many tokens takes.

        offset: by how much its positions are smaller; None: as before, as long as that can be.
        """
        if offset is None and total - self._offset > window:
            return  # re-based meanwhile: the figures follow
        self._offset = self._offset if offset is None else offset
        share = (total - self._offset) / window if window else 0.0
        style = "$text-error" if share > 0.9 else "$text-warning" if share > 0.75 else "$text-success"
        full = min(10, round(10 * share))
        bar = ("━" * full, style), ("─" * (10 - full), "$foreground-muted")
        self._full = meter(total, self._offset, window), Content.assemble(*bar)
        self._draw()


class StatusBar(Horizontal):
    """One line that says what is going on, with a bar while work is counted; at the right what is held of the KV, or
    the newest notice."""

    def __init__(self) -> None:
        super().__init__()
        self._notice = ""
        self._held: tuple[str, ...] = ()
        self._is_crowded = False
        self._bar: ProgressBar | None = None

    def compose(self) -> ComposeResult:
        yield Label("", id="state", markup=False)
        yield Label("", id="told", markup=False)

    def say(self, words: str) -> None:
        """Show `words` and no bar."""
        self.query_one("#state", Label).update(neutralise(words))
        is_crowded = self.size.width < 96 and len(words) > 34
        if is_crowded != self._is_crowded:
            self._is_crowded = is_crowded
            self._show_right()
        if self._bar:
            self._bar.display = False

    def tell(self, notice: str) -> None:
        """Show a notice, or none, until there is another."""
        self._notice = " ".join(neutralise(notice).split())
        self._show_right()

    def measure(self, stats: Mapping[str, Any]) -> None:
        """Show where the KV lies."""
        memory, disk = megabytes(stats["bytes_in_memory"]), megabytes(stats["bytes_on_disk"])
        self._held = (f"KV {memory}", f"disk {disk}", f"keep {stats['keep_ratio']:g}")
        self._show_right()

    def on_resize(self) -> None:
        self._show_right()

    def _show_right(self) -> None:
        told, few = self.query_one("#told", Label), self.size.width < FEW_COLUMNS
        told.set_class(bool(self._notice), "-notice")
        told.update(self._notice or " · ".join(self._held[:: 2 if self._is_crowded or few else 1]))

    def show(self, progress: Progress) -> None:
        words = PHASES[progress.phase]
        if progress.phase == "download":
            words += f" {progress.done / 1e6:.0f}" + (f" of {progress.total / 1e6:.0f} MB" if progress.total else " MB")
        elif progress.phase not in ("convert", "load"):
            words += f" {progress.done}" + (f" of {progress.total} tokens" if progress.total else " tokens")
        self.say(words)
        if not self._bar:
            from textual.widgets import ProgressBar  # which the first paint need not wait for

            self._bar = ProgressBar(id="progress", show_eta=False)
            self.mount(self._bar, after="#state")
        self._bar.display = True
        self._bar.update(total=progress.total or None, progress=progress.done)
