"""The shape in which branches are shown: straight on without indentation, beside it what was said instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvchat.branching import Node

FEWEST_FOLDED = 6
"""Messages in a row without a branch that are worth being one line."""
SHOWN_AROUND = 2
"""Messages that are shown before and after those."""
SHOWN_LAST = 6
"""Messages that are shown at the end of a line."""

MOST_FORKS = 200
"""Messages of a line with branches beside them that are shown at first, the last ones."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Messages of one line that follow each other, shown as one."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Below:
    """What lies below a message, itself included: how many messages, and the newest of them."""

    count: int
    newest: Node


class Branches:
    """A conversation as lines: each follows one answer after the other, and has branches beside it.

    Args:
        nodes: all messages, parents before children. One whose parent is not among them begins a conversation.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = {node.id: node for node in nodes}
        self._children: dict[str | None, list[Node]] = {}
        for node in nodes:
            parent = node.parent if node.parent in self.nodes else None
            self._children.setdefault(parent, []).append(node)
        self.tip = next((node for node in reversed(nodes) if node.on_path), None)
        self._below: dict[str, Below] = {}
        for node in reversed(nodes):
            self._below[node.id] = self._sum(node)

    def _sum(self, node: Node) -> Below:
        parts = [self._below[child.id] for child in self._children.get(node.id, ())]
        # Of equals the one that `switch` goes to: what was written last.
        newest = max((part.newest for part in reversed(parts)), key=lambda end: end.created, default=node)
        return Below(1 + sum(part.count for part in parts), newest)

    def below(self, node: Node) -> Below:
        """What lies below a message of the conversation."""
        return self._below[node.id]

    def line(self, start: Node | None) -> Iterator[Node]:
        """What follows a message, without branching: along the present path, or else to the newest end.

        start: None for the beginning of all. The path ends where the conversation is now.
        """
        here = start
        while (here := self._next(here)) is not None:
            yield here

    def _next(self, node: Node | None) -> Node | None:
        children = self._children.get(node.id if node else None, [])
        if onward := next((child for child in children if child.on_path), None):
            return onward
        if node is not None and node.on_path:
            return None
        return max(children, key=lambda child: self.below(child).newest.created, default=None)

    def beside(self, node: Node | None) -> list[Node]:
        """The first messages of the branches that leave the line at a message; None: at the beginning."""
        onward = self._next(node)
        return [child for child in self._children.get(node.id if node else None, ()) if child is not onward]

    def folded(self, nodes: Sequence[Node]) -> Iterator[Node | Fold]:
        """A line with its long straight parts folded, and its beginning if it branches very often."""
        forks = [place for place, node in enumerate(nodes) if self.beside(node)]
        if len(forks) > MOST_FORKS:
            start = forks[-MOST_FORKS]
            yield Fold(tuple(nodes[:start]))
            nodes = nodes[start:]
        run: list[Node] = []
        for node in nodes:
            run.append(node)
            if self.beside(node):
                yield from _fold(run, SHOWN_AROUND)
                run = []
        yield from _fold(run, SHOWN_LAST)

    @property
    def num_ends(self) -> int:
        """Ends of branches, the present one included."""
        ends = sum(node.id not in self._children for node in self.nodes.values())
        return ends + (self.tip is not None and self.tip.id in self._children)


def _fold(run: Sequence[Node], last: int) -> Iterator[Node | Fold]:
    middle = run[SHOWN_AROUND : max(0, len(run) - last)]
    if len(middle) < FEWEST_FOLDED:
        yield from run
        return
    yield from run[:SHOWN_AROUND]
    yield Fold(tuple(middle))
    yield from run[len(run) - last :]
