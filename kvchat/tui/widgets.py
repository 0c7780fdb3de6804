"""What the chat screen is made of. Widgets show values and post messages; none of them knows the engine.

Text of the user, the model and the store is shown as it is: never as Textual markup, and without control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from markdown_it import MarkdownIt
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.message import Message as Announcement
from textual.widget import Widget
from textual.widgets import Button, Label, Markdown, OptionList, ProgressBar, Static, TextArea
from textual.widgets.option_list import Option

from kvchat.events import Phase, Progress, TurnDone
from kvchat.terminal import neutralise

if TYPE_CHECKING:
    from kvchat.store import Message, SessionInfo

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


class Plain(Static):
    """Text that is shown literally."""

    def __init__(self, text: str = "", *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(neutralise(text), markup=False, id=id, classes=classes)
        self.text = text

    def show(self, text: str) -> None:
        self.text = text
        self.update(neutralise(text))


class Question(Plain):
    """What the user said."""


class Note(Plain):
    """A line of the program: help, a notice, an error, the numbers of a turn."""


class Answer(Markdown):
    """What the model said. It is only appended to, then replaced once by the whole text.

    Textual 8.2 breaks an open code fence when `update` of a partial text is followed by `append`.
    """

    def __init__(self, text: str | None = None) -> None:
        super().__init__(None if text is None else neutralise(text), parser_factory=_parser, open_links=False)
        self.text = text or ""

    async def grow(self, piece: str) -> None:
        self.text += piece
        await self.append(neutralise(piece))

    async def finish(self, text: str) -> None:
        self.text = text
        await self.update(neutralise(text))


def _parser() -> MarkdownIt:
    # With HTML on, Textual leaves out whatever looks like a tag, such as <think>.
    return MarkdownIt("gfm-like", {"html": False})


class Transcript(VerticalScroll):
    """The conversation, newest at the bottom; it follows the end until the user scrolls away."""

    NUM_SHOWN = 50
    """Messages shown; the others wait behind a button at the top."""
    NUM_AT_ONCE = 4

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, can_focus=False)
        self._earlier: list[Message] = []

    def on_mount(self) -> None:
        self.anchor()

    async def add(self, *widgets: Widget) -> None:
        """Mount `widgets` at the end and go there."""
        await self.mount_all(widgets)
        self.anchor()

    def last_reply(self) -> list[Widget]:
        """What stands below the last question."""
        return list(takewhile(lambda child: not isinstance(child, Question), reversed(self.children)))

    async def show(self, messages: Sequence[Message]) -> None:
        """Replace everything with the newest of `messages`."""
        # A system message without text is the template's own opening.
        self._earlier = [message for message in messages if message.content or message.role != "system"]
        await self.remove_children()
        await self._mount_earlier()
        self.anchor()

    @on(Button.Pressed, "#earlier")
    async def show_earlier(self) -> None:
        top = next((child for child in self.children if not isinstance(child, Button)), None)
        await self.query(Button).remove()
        await self._mount_earlier()
        if top is not None:
            self.call_after_refresh(self.scroll_to_widget, top, animate=False, top=True)

    async def _mount_earlier(self) -> None:
        self._earlier, page = self._earlier[: -self.NUM_SHOWN], self._earlier[-self.NUM_SHOWN :]
        widgets = [_widget(message) for message in page]
        # A few at a time, the newest first: keys are served in between.
        for end in range(len(widgets), 0, -self.NUM_AT_ONCE):
            await self.mount_all(widgets[max(0, end - self.NUM_AT_ONCE) : end], before=0 if self.children else None)
        if self._earlier:
            label = f"show earlier ({len(self._earlier)} messages)"
            await self.mount(Button(label, id="earlier", compact=True), before=0)


def _widget(message: Message) -> Widget:
    if message.role == "assistant":
        return Answer(message.content)
    return Question(message.content) if message.role == "user" else Note(f"system: {message.content}")


class Prompt(TextArea):
    """The message in the making. Enter sends, Ctrl+J (in some terminals also Shift+Enter) begins a new line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "Send", show=False, id="prompt.send"),
        Binding("ctrl+j,shift+enter", "newline", "New line", show=False, id="prompt.newline"),
        Binding("pageup", "app.scroll(-1)", show=False, id="page_up"),
        Binding("pagedown", "app.scroll(1)", show=False, id="page_down"),
    ]

    @dataclass
    class Submitted(Announcement):
        """The user pressed Enter on a message that is not blank."""

        text: str

    def __init__(self, *, id: str | None = None) -> None:
        hint = "Message, or /help; Ctrl+J begins a new line"
        super().__init__(id=id, placeholder=hint, highlight_cursor_line=False, show_line_numbers=False, compact=True)

    def on_key(self, event: events.Key) -> None:
        # Without this, TextArea takes Enter as text before bindings are looked at.
        if event.key == "enter":
            event.prevent_default()

    def action_submit(self) -> None:
        if text := self.text.strip():
            self.clear()
            self.post_message(self.Submitted(text))

    def action_newline(self) -> None:
        self.insert("\n")

    def give_back(self, text: str) -> None:
        """Put an unsent message in front of whatever has been typed since."""
        self.text = f"{text}\n{self.text}" if self.text else text
        self.move_cursor(self.document.end)


class SessionList(OptionList):
    """Names, turns and age of all sessions."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)
        self.border_title = "sessions"
        self.names: list[str] = []

    def show(self, sessions: Iterable[SessionInfo], current: str | None) -> None:
        infos = sorted(sessions, key=lambda info: info.updated, reverse=True)
        self.names = [info.name for info in infos]
        self.clear_options()
        self.add_options([Option(_entry(info, info.name == current)) for info in infos])
        if current in self.names:
            self.highlighted = self.names.index(current)


def _entry(info: SessionInfo, is_current: bool) -> Content:
    turns = f"{info.num_turns} turn{'' if info.num_turns == 1 else 's'}"
    name = (neutralise(info.name), "bold $accent" if is_current else "bold")
    return Content.assemble(name, "\n", (f"{turns} · {age(info.updated)}", "$foreground-muted"))


def age(stamp: str) -> str:
    """The time since an ISO 8601 `stamp` (UTC if it names no zone), in its largest unit."""
    then = datetime.fromisoformat(stamp)
    seconds = (datetime.now(UTC) - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "now"


class TitleBar(Horizontal):
    """The open session and its model; at the right, how full the model's window is."""

    def compose(self) -> ComposeResult:
        yield Plain("kvchat", id="title")
        yield Label("", id="meter", markup=False)

    def name_session(self, name: str, model: str) -> None:
        self.query_one("#title", Plain).show(f"kvchat  {name} · {model}")

    def measure(self, num_seen: int, window: int) -> None:
        """Draw the context meter: tokens seen of the model's window."""
        share = num_seen / window if window else 0.0
        style = "$text-error" if share > 0.9 else "$text-warning" if share > 0.75 else "$text-success"
        full = min(10, round(10 * share))
        bar = ("━" * full, style), ("─" * (10 - full), "$foreground-muted")
        self.query_one("#meter", Label).update(Content.assemble(f"{num_seen} / {window} tokens ", *bar))


class StatusBar(Horizontal):
    """One line that says what is going on, with a bar while work is counted."""

    def compose(self) -> ComposeResult:
        yield Label("", id="state", markup=False)
        yield ProgressBar(id="progress", show_eta=False)

    def say(self, words: str) -> None:
        """Show `words` and no bar."""
        self.query_one("#state", Label).update(neutralise(words))
        self.query_one("#progress").display = False

    def show(self, progress: Progress) -> None:
        words = PHASES[progress.phase]
        if progress.phase == "download":
            words += f" {progress.done / 1e6:.0f}" + (f" of {progress.total / 1e6:.0f} MB" if progress.total else " MB")
        elif progress.phase not in ("convert", "load"):
            words += f" {progress.done}" + (f" of {progress.total} tokens" if progress.total else " tokens")
        self.say(words)
        bar = self.query_one("#progress", ProgressBar)
        bar.display = True
        bar.update(total=progress.total or None, progress=progress.done)


def turn_line(done: TurnDone, stats: dict[str, Any] | Literal["sealing"] | None) -> str:
    """The numbers of one turn: what was reused and computed, then what is held, once its seal has been measured."""
    parts = [f"cached {done.usage.cached_tokens}", f"prefilled {done.usage.prefilled_tokens}"]
    if done.finish_reason != "stop":
        reasons = {"length": "cut at max_new_tokens", "context": "the context window is full"}
        parts.insert(0, reasons.get(done.finish_reason, "stopped"))
    if stats == "sealing":
        parts.append("sealing…")
    elif stats:
        parts += [f"kept {stats['num_kept']}/{stats['num_pairs']} pairs", megabytes(stats["bytes_in_memory"])]
        seal_s = (stats.get("last") or {}).get("seal_s")
        parts += [f"sealed {seal_s:.1f} s"] if seal_s is not None else []
    return " · ".join(parts)


def stats_table(stats: dict[str, Any]) -> str:
    """The numbers of a session, and of its newest 20 turns."""
    lines = [
        f"{stats['name']} · {stats['model']} · {stats['num_turns']} turns",
        f"{stats['num_seen']} of {stats['context_window']} tokens seen",
        f"kept {stats['num_kept']}/{stats['num_pairs']} pairs · {megabytes(stats['bytes_in_memory'])} in memory · "
        f"{megabytes(stats['bytes_on_disk'])} on disk ({stats['stored']:.2f} of the pairs)",
    ]
    if stats["turns"]:
        lines += ["", f"{'turn':<5} {'tokens':>8} {'pairs':>10} {'memory':>10} {'disk':>10}"]
    for turn in stats["turns"][-20:]:
        memory, disk = megabytes(turn["bytes_in_memory"]), megabytes(turn["bytes_on_disk"])
        lines.append(f"{turn['turn']:<5} {turn['tokens']:>8} {turn['rows']:>10} {memory:>10} {disk:>10}")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    """`count` bytes in MB, with one decimal place below 10."""
    return f"{count / 1e6:.1f} MB" if count < 9.95e6 else f"{count / 1e6:.0f} MB"
