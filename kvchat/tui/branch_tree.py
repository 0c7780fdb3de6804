"""The branches of a conversation: which way it went, what else was said, and a way over to it."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from textual import getters, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Footer, Label, Static, Tree

from kvchat.errors import KVChatError
from kvchat.terminal import neutralise
from kvchat.tui.branch_lines import BranchLines
from kvchat.tui.branches import Branches, Fold
from kvchat.tui.entries import DIM, SPEAKERS
from kvchat.tui.rows import WIDTHS, one_line
from kvchat.tui.session_list import age

if TYPE_CHECKING:
    from kvchat.branching import Node

LONGEST = 4000
"""Characters of a message's preview."""
PAUSE = 0.1
"""Seconds that the cursor stays on a message before its text is read."""


class BranchTree(ModalScreen[str | None]):
    """Shows all branches; gives the id of the message whose branch to go on with, or None.

    Args:
        nodes: all messages, parents before children.
        read: the whole text of a message by its id; called in a thread. None: the preview shows the first line.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f5", "dismiss(None)", "Close", id="branches.close"),
    ]
    HORIZONTAL_BREAKPOINTS = WIDTHS
    DEFAULT_CSS = """
    BranchTree {
        background: $background;

        #both { height: 1fr; }
        &.-wide #both { layout: horizontal; }

        #message {
            height: 40%;
            max-height: 8;
            border: round $panel;
            border-title-color: $text-muted;
            padding: 0 1;
            scrollbar-size-vertical: 1;
        }
        &.-wide #message { width: 45%; height: 100%; max-height: 100%; }
        &.-wide BranchLines { height: 100%; width: 1fr; }
        #text { width: 100%; height: auto; }
        #effect { width: 100%; height: 1; padding: 0 2; text-wrap: nowrap; text-overflow: ellipsis; }
    }
    """

    lines = getters.query_one(BranchLines)

    def __init__(self, nodes: Sequence[Node], read: Callable[[str], str] | None = None) -> None:
        super().__init__()
        self.branches = Branches(nodes)
        self._read_whole = read
        self._waiting: Timer | None = None

    def compose(self) -> ComposeResult:
        with Vertical(id="both"):
            yield BranchLines(self.branches)
            with VerticalScroll(id="message", can_focus=False):
                yield Static("", id="text", markup=False)
        yield Label("", id="effect", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        ends = self.branches.num_ends
        self.lines.border_title = "branches"
        self.lines.border_subtitle = f"{len(self.branches.nodes)} messages, {ends} end{'s' * (ends != 1)}"
        if not self.branches.nodes:
            self._show("", "", "Nothing was said yet.")
        self.lines.focus()

    @on(Tree.NodeSelected)
    def _selected(self, event: Tree.NodeSelected[Node | Fold]) -> None:
        item = event.node.data
        if isinstance(item, Fold):
            self.lines.unfold(event.node, item)
        elif item is not None:
            self.dismiss(item.id)

    @on(Tree.NodeHighlighted)
    def _highlighted(self, event: Tree.NodeHighlighted[Node | Fold]) -> None:
        item = event.node.data
        if self._waiting is not None:
            self._waiting.stop()
        self.workers.cancel_group(self, "read")
        if isinstance(item, Fold):
            self._show("", "", "Enter shows these messages")
        elif item is not None:
            self._show(self._title(item), item.text, self._effect(item))
            if self._read_whole:
                self._waiting = self.set_timer(PAUSE, lambda: self._begin_to_read(item))

    def _begin_to_read(self, item: Node) -> None:
        self.run_worker(self._read(item), group="read", exclusive=True)

    async def _read(self, item: Node) -> None:
        assert self._read_whole is not None
        try:
            text = await to_thread(self._read_whole, item.id)
        except (KVChatError, OSError) as error:
            text = str(error)
        self._show(self._title(item), text, self._effect(item))

    def _show(self, title: str, text: str, effect: str) -> None:
        box = self.query_one("#message", VerticalScroll)
        box.border_title = Content(title)  # a string would be markup
        shown = text if len(text) <= LONGEST else text[:LONGEST] + " …"
        self.query_one("#text", Static).update(Content(neutralise(shown)))
        self.query_one("#effect", Label).update(Content.styled(effect, DIM))

    def _title(self, item: Node) -> str:
        return f"turn {item.turn} · {SPEAKERS.get(item.role, one_line(item.role))} · {age(item.created)}"

    def _effect(self, item: Node) -> str:
        """What Enter does to the conversation."""
        if item is self.branches.tip:
            return "the conversation is here"
        end = self.branches.below(item).newest
        if end is item:
            return "Enter goes on from here"
        return f"Enter goes on from the newest end below, at turn {end.turn}: {one_line(end.text)}"
