"""The session picker: finds a session by its title, its tags or what was said in it, and opens, names or deletes it."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from textual import getters, on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Footer, Input, Label, Static

from kvchat.errors import KVChatError
from kvchat.figures import size
from kvchat.tui.asking import Line
from kvchat.tui.changing import Done, delete, rename, tag
from kvchat.tui.entries import hit_lines, nothing_found, preview_of, session_lines
from kvchat.tui.finding import ORDERS, Letters, Query, select
from kvchat.tui.rows import WIDTHS, Rows, one_line

if TYPE_CHECKING:
    from kvchat.store.store import Message, SearchHit, SessionInfo
    from kvchat.worker import Worker

Change = Callable[["App[Any]", "Worker", "SessionInfo"], Coroutine[Any, Any, Done | None]]

PAUSE = 0.15
"""Seconds without a key after which messages are searched, or a preview is read."""
HINT = "letters of a title · #tag · /words that were said"


@dataclass(frozen=True, slots=True)
class Picked:
    """What is to be done: open this session, at the turn that was found if one was, or begin one of this name."""

    name: str
    action: Literal["open", "new"] = "open"
    turn: int | None = None


class SessionPicker(ModalScreen[Picked | None]):
    """All sessions, and how to find one. It renames, tags and deletes itself; what it gives back is to be opened.

    Args:
        engine: asked in threads only.
        current: name of the open session, which cannot be deleted; empty if there is none.
        preview: the messages of a session, of which the last are shown; called in a thread. None: no preview.
        known: sessions to show until the engine has said which there are; it may be busy.
        query: what is typed to begin with; behind a slash, words to search messages for.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Open", id="picker.open", priority=True),
        Binding("ctrl+d", "delete", "Delete", id="picker.delete", priority=True),
        Binding("f2", "rename", "Rename", id="picker.rename"),
        Binding("ctrl+t", "tags", "Tags", id="picker.tags", priority=True),
        Binding("ctrl+f", "search", "Search", id="picker.search", priority=True),
        Binding("ctrl+o", "sort", "Order", id="picker.order", priority=True),
        Binding("ctrl+n", "new", "New", id="picker.new", priority=True),
        Binding("escape", "close", "Close", id="picker.close"),
        Binding("up", "move(-1)", show=False),
        Binding("down", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("ctrl+home", "move(-1000000)", show=False, priority=True),
        Binding("ctrl+end", "move(1000000)", show=False, priority=True),
    ]
    AUTO_FOCUS = "#query"
    HORIZONTAL_BREAKPOINTS = WIDTHS
    DEFAULT_CSS = """
    SessionPicker {
        background: $background;

        #query {
            height: 3;
            padding: 0 1;
            background: $background;
            border: round $accent;
            border-title-color: $text-accent;
        }
        #found { width: 1fr; padding: 0 1; }
        #nothing { padding: 1 3; color: $text-muted; height: 1fr; display: none; }
        #preview {
            width: 45%;
            border: round $panel;
            padding: 0 1;
            scrollbar-size-vertical: 1;
            display: none;
            &:focus { border: round $accent; }
        }
        #said { width: 100%; height: auto; }
        #state { height: 1; padding: 0 3; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; width: 100%; }
        #state.-error { color: $text-error; }
        &.-wide #preview { display: block; }
    }
    """

    query_line = getters.query_one("#query", Line)
    rows = getters.query_one(Rows)
    said = getters.query_one("#said", Static)
    state = getters.query_one("#state", Label)

    def __init__(
        self,
        engine: Worker,
        current: str,
        preview: Callable[[str], Sequence[Message]] | None = None,
        known: Sequence[SessionInfo] = (),
        query: str = "",
    ) -> None:
        super().__init__()
        self.engine, self.current = engine, current
        self._preview, self._typed = preview, query
        self._infos: dict[str, SessionInfo] = {info.name: info for info in known}
        self._is_complete = False
        self._found: Sequence[SessionInfo] | Sequence[SearchHit] = ()
        self._query = Query()
        self._order = ORDERS[0]
        self._waiting: dict[str, Timer] = {}

    def compose(self) -> ComposeResult:
        line = Line(placeholder=HINT, id="query")
        line.border_title = "sessions"
        yield line
        with Horizontal():
            with Vertical(id="found"):
                yield Rows()
                yield Static("", id="nothing", markup=False)
            with VerticalScroll(id="preview"):
                yield Static("", id="said", markup=False)
        yield Label("", id="state", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._filter(self.current)
        self._begin("list", self._read(self.current))
        self.query_line.value = self._typed

    # -- what there is -----------------------------------------------------------------------------------------------

    def _begin(self, group: str, job: Coroutine[Any, Any, None]) -> None:
        """Run a job that takes the place of the one of its group that still runs."""
        self.run_worker(self._guard(job), group=group, exclusive=True)

    async def _guard(self, job: Coroutine[Any, Any, None]) -> None:
        try:
            await job
        except KVChatError as error:
            self._say(str(error), is_error=True)
        except OSError as error:
            self._say(f"{error.filename or 'the system'}: {error.strerror or error}", is_error=True)

    def _say(self, words: str, is_error: bool = False) -> None:
        self.state.set_class(is_error, "-error")
        self.state.update(one_line(words))

    async def _read(self, chosen: str) -> None:
        """Read the list anew, and stay at the session of this name, or where it was."""
        infos = await to_thread(self.engine.sessions)
        self._infos, self._is_complete = {info.name: info for info in infos}, True
        if self._query.text is None:
            self._filter(chosen, self.rows.chosen or 0)
        else:
            self._begin("search", self._search())

    def _later(self, group: str, job: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a job when no key was pressed for a moment."""
        if group in self._waiting:
            self._waiting[group].stop()
        self._waiting[group] = self.set_timer(PAUSE, lambda: self._begin(group, job()))

    # -- what is asked for -------------------------------------------------------------------------------------------

    @on(Input.Changed, "#query")
    def _changed(self) -> None:
        before, self._query = self._query, Query.parse(self.query_line.value)
        if self._query.text is None:
            self.workers.cancel_group(self, "search")
            self._filter()
        elif self._query != before:
            self._later("search", self._search)

    def _filter(self, chosen: str = "", otherwise: int = 0) -> None:
        """Show the sessions that are asked for, and go to the one of this name, if it is among them."""
        found = self._found = select(self._infos.values(), self._query, self._order)
        letters = Letters(self._query.words)

        def draw(index: int, width: int) -> Any:
            return session_lines(found[index], letters, found[index].name == self.current, width)

        place = next((index for index, info in enumerate(found) if info.name == chosen), otherwise)
        self.rows.show(len(found), draw, place)
        total = sum(info.nbytes for info in found)
        number = f"{len(found)} of {len(self._infos)}" if len(found) < len(self._infos) else f"{len(found)}"
        order = "best first" if self._query.words and self._order is ORDERS[0] else self._order.name
        self._tell(f"{number} session{'s' * (number != '1')} · {size(total)} of KV on disk · {order}")

    def _tell(self, words: str) -> None:
        """Say what is shown, and in the list itself if nothing is."""
        nothing = self.query_one("#nothing", Static)
        self.rows.display, nothing.display = bool(self._found), not self._found
        nothing.update(nothing_found(self._query, self._is_complete, bool(self._infos)))
        self._say(words)

    async def _search(self) -> None:
        query = self._query
        if query.text:
            self._say("searching…")
        hits = await to_thread(self.engine.search, query.text) if query.text else []
        infos = self._infos
        found = self._found = [
            hit for hit in hits if not query.tags or (hit.session in infos and query.has_tags(infos[hit.session]))
        ]
        self.rows.show(len(found), lambda index, width: hit_lines(found[index], infos, width))
        sessions = len({hit.session for hit in found})
        self._tell(
            f"{len(found)} message{'s' * (len(found) != 1)} in {sessions} session{'s' * (sessions != 1)} · best first"
        )

    # -- the chosen one ----------------------------------------------------------------------------------------------

    @property
    def chosen(self) -> SessionInfo | SearchHit | None:
        """The session or the message that the cursor is on."""
        index = self.rows.chosen
        return None if index is None or index >= len(self._found) else self._found[index]

    def _its_name(self) -> str:
        chosen: Any = self.chosen
        return "" if chosen is None else getattr(chosen, "session", None) or chosen.name

    @on(Rows.Highlighted)
    def _highlighted(self) -> None:
        if self._preview and self.has_class("-wide"):
            self._later("preview", self._show_preview)

    async def _show_preview(self) -> None:
        info = self._infos.get(self._its_name())
        if info is None or self._preview is None:
            self.said.update("")
            return
        self.said.update(preview_of(info, await to_thread(self._preview, info.name)))
        self.query_one("#preview").scroll_end(animate=False)

    def on_resize(self) -> None:
        self._highlighted()

    # -- keys --------------------------------------------------------------------------------------------------------

    def action_move(self, rows: int) -> None:
        self.rows.move(rows)

    def action_page(self, pages: int) -> None:
        self.rows.page(pages)

    def action_close(self) -> None:
        self.dismiss(None)

    @on(Rows.Pressed)
    def action_open(self) -> None:
        if name := self._its_name():
            self.dismiss(Picked(name, turn=getattr(self.chosen, "turn", None)))

    def action_new(self) -> None:
        self.dismiss(Picked("" if self._query.text is not None else self.query_line.value.strip(), "new"))

    def action_search(self) -> None:
        """Search messages for what was typed, or titles again."""
        line = self.query_line
        line.value = line.value[1:] if line.value.startswith("/") else f"/{line.value}"
        line.cursor_position = len(line.value)

    def action_sort(self) -> None:
        self._order = ORDERS[(ORDERS.index(self._order) + 1) % len(ORDERS)]
        if self._query.text is None:
            self._filter(self._its_name())

    def action_delete(self) -> None:
        if self._its_name() == self.current:
            self._say("this session is open; go to another one before deleting it", is_error=True)
        else:
            self._begin("change", self._change(delete))

    def action_rename(self) -> None:
        self._begin("change", self._change(rename))

    def action_tags(self) -> None:
        self._begin("change", self._change(tag))

    async def _change(self, change: Change) -> None:
        """Change the chosen session, and read the list anew if anything was."""
        info = self._infos.get(self._its_name())
        if info and (done := await change(self.app, self.engine, info)):
            await self._read(done.name)
            self._say(done.words)
