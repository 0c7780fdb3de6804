"""Attach a text: name a file or paste, see how large it is and whether it fits, then take it in or leave it.

Files are read and tokens counted in threads; what is typed meanwhile makes an older answer void.
"""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static
from textual.worker import Worker, WorkerState

from kvchat.documents import read_document, title_of
from kvchat.errors import InputError, KVChatError
from kvchat.figures import size
from kvchat.segment_map import clip, one_line
from kvchat.tui.path_input import PathInput, Shown

PREVIEW = 5
"""Lines of the text that are shown."""
LONGEST_NAME = 40
"""Characters of a paste that become its title."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A document that is to be attached, and what it is called."""

    title: str
    text: str


class AttachScreen(ModalScreen[Attachment | None]):
    """Asks for a document.

    Args:
        count: tokens of a text; called in a thread.
        path: of a file to begin with.
        text: pasted, in place of a file.
        room: tokens that the window has left, None if that is not known.
        window: tokens that the model sees at once, None if that is not known.
    """

    DEFAULT_CSS = """
    AttachScreen {
        align: center middle;

        #attach {
            width: 76;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 2;
            border: round $accent;
            border-title-color: $text-accent;
            border-subtitle-color: $foreground-muted;
            background: $background;
            scrollbar-size-vertical: 1;
        }

        .label {
            color: $foreground-muted;
        }

        Input {
            width: 100%;
        }

        #title {
            margin-bottom: 1;
        }

        #names, #facts, #preview {
            height: auto;
        }

        #names {
            color: $foreground-muted;
        }

        #preview {
            color: $foreground-muted;
            text-wrap: nowrap;
            text-overflow: ellipsis;
            margin-top: 1;
            padding-left: 1;
            border-left: thick $panel;
        }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Leave", id="attach.leave"),
        Binding("down", "app.focus_next", show=False, id="attach.next"),
        Binding("up", "app.focus_previous", show=False, id="attach.previous"),
    ]

    def __init__(
        self,
        count: Callable[[str], int],
        path: str = "",
        text: str = "",
        room: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self._count, self._room, self._window = count, room, window
        self._path, self._text = path, text
        self._tokens: int | None = None
        self._title = ""
        """As it was proposed; another one is the user's."""
        self._is_wanted = False
        """Enter was pressed while it was being read."""
        self._looking: Worker[None] | None = None

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="attach", can_focus=False):
            yield Label("File", classes="label", id="file-label")
            yield PathInput(self._path, id="path")
            yield Static("", id="names", markup=False)
            yield Label("Title", classes="label")
            yield Input(id="title", compact=True, max_length=80)
            yield Static("", id="facts", markup=False)
            yield Static("", id="preview", markup=False)

    def on_mount(self) -> None:
        box = self.query_one("#attach")
        box.border_title = Content("attach a document")
        box.border_subtitle = Content("Enter attaches · Tab completes · Esc leaves")
        self.query_one("#preview").display = False
        if self._text:
            self._take(self._text)
        elif not self._path:
            self._say("Type the name of a file, or paste a text.", "$foreground-muted")

    # -- what the user does ------------------------------------------------------------------------------------------

    @on(Input.Changed, "#path")
    def _typed(self, event: Input.Changed) -> None:
        self._text, self._is_wanted = "", False
        self._look(self.query_one(PathInput).path)

    @on(PathInput.Pasted)
    def _pasted(self, event: PathInput.Pasted) -> None:
        self._take(event.text)

    @on(Shown)
    def _named(self, event: Shown) -> None:
        names = Content.assemble(*((f"{one_line(name)}  ", "") for name in event.names))
        self.query_one("#names", Static).update(names)

    @on(Input.Submitted)
    def _entered(self, _: Input.Submitted) -> None:
        if self._text and self._tokens is not None:
            self._finish()
            return
        self._is_wanted = True
        if not (self._text and self._looking and not self._looking.is_finished):
            self._look(self.query_one(PathInput).path, is_whole=True)

    def action_leave(self) -> None:
        self.dismiss(None)

    # -- reading and counting ----------------------------------------------------------------------------------------

    def _look(self, path: Path, is_whole: bool = False) -> None:
        """Read the file and count; a name that is no file yet is only wrong if it is meant as it stands."""
        self._tokens = None
        work = self._weigh(self._text, "") if self._text else self._open(path, is_whole)
        self._looking = self.run_worker(work, group="look", exclusive=True, exit_on_error=False)

    def _take(self, text: str) -> None:
        """Use a pasted text in place of a file."""
        self._text = text
        for part in ("#file-label", "#path", "#names"):
            self.query_one(part).display = False
        self.query_one("#title").focus()
        self._look(Path(), is_whole=True)

    async def _open(self, path: Path, is_whole: bool) -> None:
        if not is_whole and not await to_thread(_is_file, path):
            self._propose("")
            self._say("")
            return
        try:
            text = await to_thread(read_document, path)
        except InputError as error:
            self._is_wanted = False
            self._say(str(error), "$text-error")
            return
        self._text = text
        await self._weigh(text, path.name)

    async def _weigh(self, text: str, name: str) -> None:
        """Show a text, then how many tokens it has."""
        self._propose(title_of(name) or _first_words(text))
        if not text.strip():
            self._say("the document is empty", "$text-error")
            return
        self._show(text)
        try:
            self._tokens = await to_thread(self._count, text)
        except KVChatError as error:
            self._say(str(error), "$text-error")
            return
        self._show(text)
        if self._is_wanted:
            self._finish()

    @on(Worker.StateChanged)
    def _ended(self, event: Worker.StateChanged) -> None:
        if event.state == WorkerState.ERROR:
            self._say(f"internal error: {type(event.worker.error).__name__}: {event.worker.error}", "$text-error")

    def _finish(self) -> None:
        """Leave with the document."""
        title = title_of(self.query_one("#title", Input).value) or self._title
        self.dismiss(Attachment(title, self._text))

    # -- showing -----------------------------------------------------------------------------------------------------

    def _propose(self, title: str) -> None:
        """Give it a title, unless the user did."""
        field = self.query_one("#title", Input)
        if field.value == self._title:
            self._title = field.value = title

    def _show(self, text: str) -> None:
        """The size of a text, its tokens if they are counted, whether they fit, and how it begins."""
        lines, tokens, nbytes = text.count("\n") + 1, self._tokens, len(text.encode(errors="replace"))
        told = "counting tokens…" if tokens is None else f"{tokens} token{'s' * (tokens != 1)}"
        parts = [(f"{size(nbytes)} · {lines} line{'s' * (lines != 1)} · ", ""), (told, "bold")]
        if tokens is not None and self._room is not None:
            parts.append(self._fits(tokens, self._room))
        self.query_one("#facts", Static).update(Content.assemble(*parts))
        self._preview(text)

    def _fits(self, tokens: int, room: int) -> tuple[str, str]:
        if tokens <= room:
            return f"\nfits: {room} tokens are free", "$text-success"
        if self._window is not None and tokens > self._window:
            return (
                f"\nlonger than the window of {self._window} tokens: it comes in parts, of which the last stay, and "
                "others come back when a question names them; the model never sees all of it at once",
                "$text-warning",
            )
        return f"\nmore than the {room} tokens that are free: older turns leave the window for it", "$text-warning"

    def _preview(self, text: str) -> None:
        lines = [clip(one_line(line[:500]), 200) for line in text[:20_000].splitlines()[:PREVIEW]]
        preview = self.query_one("#preview", Static)
        preview.display = True
        preview.update(Content("\n".join(lines)))

    def _say(self, line: str, style: str = "") -> None:
        """One line in place of what was told of a text."""
        self.query_one("#preview").display = False
        self.query_one("#facts", Static).update(Content.assemble((one_line(line), style)))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no path can be that
        return False


def _first_words(text: str) -> str:
    line = next((line for line in text[:20_000].splitlines() if line.strip()), "")
    return title_of(clip(one_line(line[:500]), LONGEST_NAME))
