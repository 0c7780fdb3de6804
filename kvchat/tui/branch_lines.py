"""The tree of branches as a widget: indented only where it branches, filled only where it is opened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from rich.style import Style
from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.widgets import Tree
from textual.widgets.tree import TreeNode

from kvchat.tui.branches import Branches, Fold
from kvchat.tui.entries import SPEAKERS
from kvchat.tui.rows import one_line
from kvchat.tui.session_list import age

if TYPE_CHECKING:
    from kvchat.branching import Node

    Item = TreeNode["Node | Fold"]

MOST_AT_ONCE = 200
"""Messages that a fold shows when it is opened."""
MOST_OPEN = 20
"""Branches at one message that are shown before they are asked for."""


class BranchLines(Tree["Node | Fold"]):
    """The tree. A branch is filled with its messages when it is opened."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "Switch", id="branches.switch"),
        Binding("right", "open", "Open", id="branches.open"),
        Binding("left", "shut", "Shut", id="branches.shut"),
    ]
    COMPONENT_CLASSES: ClassVar[set[str]] = {"branch--path", "branch--dim", "branch--you", "branch--here"}

    DEFAULT_CSS = """
    BranchLines {
        height: 1fr;
        border: round $accent;
        border-title-color: $text-accent;
        border-subtitle-color: $text-muted;
        background: $background;
        background-tint: transparent;
        padding: 0 1;
        scrollbar-size-vertical: 1;

        & > .branch--path { color: $text-success; text-style: bold; }
        & > .branch--here { color: $text-warning; text-style: bold; }
        & > .branch--you { color: $text-accent; }
        & > .branch--dim { text-style: dim; }
    }
    """

    def __init__(self, branches: Branches) -> None:
        super().__init__("", id="branches")
        self.branches = branches
        self.show_root = self.auto_expand = False
        self.guide_depth = 3
        self._heads, self._crowds = set[int](), set[int]()
        """Ids of lines that are not filled yet: with the rest of their branch, and with many branches beside them."""
        self.items: dict[str, Item] = {}
        """Where messages stand, as far as they are shown."""

    def on_mount(self) -> None:
        self._fill(self.root, self.branches.beside(None), self.branches.line(None))
        if tip := self.branches.tip:
            self.call_after_refresh(self.move_cursor, self.items[tip.id])

    def _fill(self, parent: Item, beside: Iterable[Node], line: Iterable[Node]) -> None:
        """Add branches that leave a line, the first message of each, and what follows on the line itself."""
        for head in beside:
            opens = self._below(head) > 0
            added = self.items[head.id] = parent.add("", head, allow_expand=opens)
            if opens:
                self._heads.add(added.id)
        for item in self.branches.folded([*line]):
            self._put(parent, item)

    def _put(self, parent: Item, item: Node | Fold, before: int | None = None) -> Item:
        """Add a message of a line, with the branches that leave the line there."""
        beside = [] if isinstance(item, Fold) else self.branches.beside(item)
        added = parent.add("", item, before=before, allow_expand=bool(beside))
        if not isinstance(item, Fold):
            self.items[item.id] = added
        if 0 < len(beside) <= MOST_OPEN:
            self._fill(added, beside, ())
            added.expand()
        elif beside:
            self._crowds.add(added.id)
        return added

    def _below(self, head: Node) -> int:
        return self.branches.below(head).count - 1

    @on(Tree.NodeExpanded)
    def _expanded(self, event: Tree.NodeExpanded[Node | Fold]) -> None:
        shown, item = event.node, event.node.data
        if item is None or isinstance(item, Fold):
            return
        if shown.id in self._heads:
            self._fill(shown, self.branches.beside(item), self.branches.line(item))
        elif shown.id in self._crowds:
            self._fill(shown, self.branches.beside(item), ())
        self._heads.discard(shown.id)
        self._crowds.discard(shown.id)

    def unfold(self, shown: Item, fold: Fold) -> None:
        """Put the last messages of a fold where it stands, all if they are few."""
        parent = shown.parent
        assert parent is not None
        rest, opened = fold.nodes[:-MOST_AT_ONCE], fold.nodes[-MOST_AT_ONCE:]
        place = parent.children.index(shown) + 1
        added = [self._put(parent, node, before=place + number) for number, node in enumerate(opened)]
        shown.data = Fold(rest)
        if not rest:
            shown.remove()
        self.call_after_refresh(self.move_cursor, added[-1])

    def action_open(self) -> None:
        here = self.cursor_node
        if here is not None and isinstance(here.data, Fold):
            self.unfold(here, here.data)
        elif here is not None and here.allow_expand and not here.is_expanded:
            here.expand()
        else:
            self.action_cursor_down()

    def action_shut(self) -> None:
        here = self.cursor_node
        if here is not None and here.allow_expand and here.is_expanded:
            here.collapse()
        elif here is not None and here.parent is not None and not here.parent.is_root:
            self.move_cursor(here.parent)

    def get_label_width(self, node: Item) -> int:
        # Only how far to the right a deep branch may be scrolled; drawing all lines to know it takes long.
        return 40

    def on_resize(self) -> None:
        self._clear_line_cache()

    def process_label(self, label: Text | str) -> Text:
        return Text(str(label))

    def render_label(self, node: Item, base_style: Style, style: Style) -> Text:
        dim = self.get_component_rich_style("branch--dim", partial=True)
        item = node.data
        if item is None:
            return Text()
        if isinstance(item, Fold):
            first, last = item.nodes[0].turn, item.nodes[-1].turn
            words = f"  ⋯ {len(item.nodes)} messages, turns {first} to {last}"
            return Text(words, style=dim + style)
        left = Text.assemble(*self._before(node, item, dim))
        right = self._after(node, item, dim)
        room = self._room(node) - left.cell_len - right.cell_len
        text = Text(one_line(item.text))
        text.truncate(max(room, 12), overflow="ellipsis")
        whole = Text.assemble(left, text, right)
        whole.stylize(style)
        return whole

    def _room(self, node: Item) -> int:
        depth, above = 0, node.parent
        while above is not None and not above.is_root:
            depth, above = depth + 1, above.parent
        return self.scrollable_content_region.width - depth * self.guide_depth

    def _before(self, node: Item, item: Node, dim: Style) -> list[str | tuple[str, Style]]:
        path, you = (self.get_component_rich_style(f"branch--{name}", partial=True) for name in ("path", "you"))
        is_user = item.role == "user"
        return [
            ("▾ " if node.is_expanded else "▸ ") if node.allow_expand else "  ",
            ("●", path) if item.on_path else ("○", dim),
            (f"{item.turn:>4} " if is_user else "     ", dim),
            (f"{SPEAKERS.get(item.role, one_line(item.role)):6}", you if is_user else dim),
        ]

    def _after(self, node: Item, item: Node, dim: Style) -> Text:
        if item is self.branches.tip:
            return Text(" ← here", style=self.get_component_rich_style("branch--here", partial=True))
        if node.is_collapsed and node.allow_expand:
            newest = self.branches.below(item).newest
            return Text(f"  +{self._below(item)} · {age(newest.created)}", style=dim)
        return Text()
