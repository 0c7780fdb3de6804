"""The inspector: what became of one turn. Which heads keep it, how it was scored, and its words.

A turn is read in a thread. Who goes on faster than turns can be read sees the last one asked for.
"""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static
from textual.worker import Worker, WorkerState

from kvchat.errors import KVChatError
from kvchat.segment_map import one_line
from kvchat.tui.inspection import HEADING, head, heat, histogram, words

if TYPE_CHECKING:
    from kvchat.inspecting import Inspection


class Inspector(ModalScreen[None]):
    """Looks at one turn, and at its neighbours with Left and Right.

    Args:
        inspect: gives what is known of a turn; called in a thread.
        turn: the one to begin with, 1 = the first.
        num_turns: of the conversation.
    """

    DEFAULT_CSS = """
    Inspector {
        align: center middle;

        #inspector {
            width: 100%;
            max-width: 132;
            height: 100%;
            padding: 0 2;
            border: round $accent;
            border-title-color: $text-accent;
            border-subtitle-color: $foreground-muted;
            background: $background;
            scrollbar-size-vertical: 1;
        }

        #inspector Static {
            margin-bottom: 1;
        }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "close", "Close", id="inspector.close"),
        Binding("left,h", "go(-1)", "Turn before", id="inspector.before"),
        Binding("right,l", "go(1)", "Turn after", id="inspector.after"),
        Binding("m", "mark", "Marks", id="inspector.mark"),
    ]

    def __init__(self, inspect: Callable[[int], Inspection], turn: int, num_turns: int) -> None:
        super().__init__()
        self._inspect = inspect
        self._wanted, self._num_turns = min(max(1, turn), max(1, num_turns)), max(1, num_turns)
        self._shown: Inspection | None = None
        self._is_reading = False
        self._marks: bool | None = None
        """What the user chose; None: nothing yet."""

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="inspector"):
            for part in ("head", "heat", "scores", "words"):
                yield Static("", id=part, markup=False)

    def on_mount(self) -> None:
        body = self.query_one("#inspector")
        body.border_subtitle = Content("←→ turn · ↑↓ scroll · m marks · Esc closes")
        body.focus()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._draw())
        self._read()

    def on_resize(self, _: events.Resize) -> None:
        self.call_after_refresh(self._draw)

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_close(self) -> None:
        self.dismiss(None)

    def action_go(self, turns: int) -> None:
        """Look at a neighbouring turn."""
        wanted = self._wanted + turns
        if 1 <= wanted <= self._num_turns:
            self._wanted = wanted
            self._read()

    def action_mark(self) -> None:
        """Put brackets around evicted words, or take them away."""
        self._marks = not self._is_marked
        self._draw()

    @property
    def _is_marked(self) -> bool:
        """Where shades are hard to tell apart, brackets stand for them unless the user wants none."""
        theme = self.app.current_theme.name
        is_needed = self.app.no_color or theme.startswith("ansi") or theme.endswith("contrast")
        return is_needed if self._marks is None else self._marks

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        self._entitle(" · reading…")
        if not self._is_reading:
            self._is_reading = True
            self.run_worker(self._follow(), exit_on_error=False)

    async def _follow(self) -> None:
        """Read turns until the one that is wanted is there."""
        turn = 0
        while turn != self._wanted:
            turn = self._wanted
            try:
                self._shown = await to_thread(self._inspect, turn)
            except KVChatError as error:
                self._fail(str(error))
                continue
            self._draw()
            self.query_one("#inspector").scroll_home(animate=False)
        self._is_reading = False
        self._entitle()

    @on(Worker.StateChanged)
    def _ended(self, event: Worker.StateChanged) -> None:
        if event.state == WorkerState.ERROR:
            self._is_reading = False
            self._fail(f"internal error: {type(event.worker.error).__name__}: {event.worker.error}")
            self._entitle()

    # -- drawing -----------------------------------------------------------------------------------------------------

    def _entitle(self, more: str = "") -> None:
        title = f"turn {self._wanted} of {self._num_turns}{more}"
        self.query_one("#inspector").border_title = Content(title)

    def _draw(self) -> None:
        if self._shown is None:
            return
        found, width = self._shown, self.query_one("#inspector").scrollable_content_region.width
        self._show("head", head(found, width))
        self._show("heat", _titled("what each head keeps", heat(found, width)))
        self._show("scores", _titled("scores", histogram(found, width)))
        self._show("words", words(found, self._is_marked))

    def _fail(self, line: str) -> None:
        self._shown = None
        self._show("head", Content.assemble((one_line(line), "$text-error")))
        for part in ("heat", "scores", "words"):
            self._show(part, Content())

    def _show(self, part: str, content: Content) -> None:
        static = self.query_one(f"#{part}", Static)
        static.display = bool(content)
        static.update(content)


def _titled(title: str, content: Content) -> Content:
    return Content.assemble((title, HEADING), "\n", content)
