"""The tree of branches: its shape, and the screen that shows it."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

from kvchat.branching import Node
from kvchat.errors import StoreError
from kvchat.tui.branch_tree import BranchTree
from kvchat.tui.branches import Branches, Fold
from tests.tui_host import WIDE, hosting, wait_until

NOW = datetime.now(UTC)
HOSTILE = "\x1b]0;owned\x07[bold red]x[/]\u202e\x9b2J"
SAFE = "␛]0;owned␇[bold red]x[/]��2J"


def chain(
    name: str,
    count: int,
    parent: str | None = None,
    turn: int = 0,
    on_path: bool = False,
    role: str = "user",
    age: int = 1,
) -> list[Node]:
    """Messages `name`0, `name`1, ..., the one after the other."""
    nodes: list[Node] = []
    for number in range(count):
        turn += role == "user"
        created = (NOW - timedelta(hours=age)).isoformat()
        nodes.append(Node(f"{name}{number}", parent, role, f"text {name}{number}", turn, on_path, created))
        parent, role = f"{name}{number}", "assistant" if role == "user" else "user"
    return nodes


@pytest.fixture
def nodes() -> list[Node]:
    """A path of 30; beside it one branch of 5 that has one of 2, another answer, and another beginning."""
    return [
        *chain("m", 30, on_path=True),
        *chain("a", 5, "m3", 2, age=2),
        *chain("b", 2, "a3", 4, age=3),
        *chain("c", 1, "m20", 11, role="assistant", age=4),
        *chain("d", 2, age=50),
    ]


def ids(branches: Branches, start: str | None) -> list[str]:
    return [node.id for node in branches.line(branches.nodes[start] if start else None)]


def test_a_line_goes_along_the_path_or_to_the_newest_end(nodes: list[Node]) -> None:
    branches = Branches(nodes)
    assert ids(branches, None) == [f"m{number}" for number in range(30)]
    assert ids(branches, "a0") == ["a1", "a2", "a3", "a4"]
    assert [node.id for node in branches.beside(branches.nodes["a3"])] == ["b0"]
    assert [node.id for node in branches.beside(None)] == ["d0"]
    assert branches.tip is branches.nodes["m29"] and branches.num_ends == 5
    assert branches.below(branches.nodes["a0"]).count == 7
    assert branches.below(branches.nodes["a0"]).newest.id == "a4"


def test_after_a_rewind_the_line_ends_where_the_conversation_is() -> None:
    branches = Branches([*chain("m", 4, on_path=True), *chain("x", 2, "m3", 2)])
    assert ids(branches, None) == ["m0", "m1", "m2", "m3"]
    assert [node.id for node in branches.beside(branches.nodes["m3"])] == ["x0"]
    assert branches.num_ends == 2
    nothing = Branches([])
    assert nothing.tip is None and ids(nothing, None) == [] and nothing.num_ends == 0


def test_of_equally_new_ends_the_one_written_last_is_gone_to() -> None:
    branches = Branches([*chain("m", 2), *chain("x", 1, "m1"), *chain("y", 1, "m1")])
    assert branches.below(branches.nodes["m0"]).newest.id == "y0"


def test_long_straight_parts_are_folded_and_forks_are_not(nodes: list[Node]) -> None:
    branches = Branches(nodes)
    items = [*branches.folded([*branches.line(None)])]
    folds = [item for item in items if isinstance(item, Fold)]
    assert [fold.nodes[0].id for fold in folds] == ["m6"]
    shown = [item.id for item in items if isinstance(item, Node)]
    assert {"m3", "m20", "m29"} <= set(shown)
    assert sorted([*shown, *(node.id for node in folds[0].nodes)]) == sorted(ids(branches, None))


async def test_the_path_is_marked_and_enter_gives_the_message(nodes: list[Node]) -> None:
    async with hosting(BranchTree(nodes)) as (host, pilot):
        await wait_until(lambda: "text m29 ← here" in host.shown)
        assert "37 messages, 5 ends" not in host.shown and "40 messages, 5 ends" in host.shown
        assert "the conversation is here" in host.shown
        await pilot.press("home")
        await wait_until(lambda: "▸ ○   1 you   text d0  +1 · 2 d" in host.shown)
        assert "●   1 you   text m0" in host.shown and "⋯ 13 messages, turns 4 to 10" in host.shown
        await pilot.press("down", "down", "enter")
        assert host.results == ["m1"]


async def test_a_branch_is_filled_when_it_is_opened_and_indents_once(nodes: list[Node]) -> None:
    async with hosting(BranchTree(nodes)) as (host, pilot):
        lines = host.screen.query_one("#branches")
        await wait_until(lambda: "text m29" in host.shown)
        assert "a0" in lines.items and "a1" not in lines.items  # type: ignore[attr-defined]
        await pilot.press("home", *["down"] * 5)
        await wait_until(lambda: "newest end below, at turn 5: text a4" in host.shown)
        await pilot.press("right")
        await wait_until(lambda: "text a4" in host.shown.split("╰")[0])
        columns = {line.index("text") for line in host.shown.split("\n") if "text a" in line and "Enter" not in line}
        assert len(columns) <= 3
        assert "├─   ○     model text a1" in host.shown
        await pilot.press("left")
        await wait_until(lambda: "text a1" not in host.shown)
        await pilot.press("enter")
        assert host.results == ["a0"]


async def test_a_fold_opens_where_it_stands(nodes: list[Node]) -> None:
    async with hosting(BranchTree(nodes), WIDE) as (host, pilot):
        await wait_until(lambda: "⋯ 13 messages" in host.shown)
        lines = host.screen.query_one("#branches")
        fold = next(item for item in lines.root.children if isinstance(item.data, Fold))  # type: ignore[attr-defined]
        lines.move_cursor(fold)  # type: ignore[attr-defined]
        await wait_until(lambda: "Enter shows these messages" in host.shown)
        await pilot.press("enter")
        await wait_until(lambda: "text m12" in host.shown and "⋯" not in host.shown)
        order = [item.data.id for item in lines.root.children]  # type: ignore[attr-defined]
        assert order == ["d0", *(f"m{number}" for number in range(30))]
        assert host.results == []


async def test_the_whole_message_is_read_in_a_thread(nodes: list[Node]) -> None:
    def read(message: str) -> str:
        assert threading.current_thread() is not threading.main_thread()
        if message == "m28":
            raise StoreError("the database is busy")
        return f"whole {message}\n{HOSTILE}\n" + "long " * 100_000

    async with hosting(BranchTree(nodes, read), WIDE) as (host, pilot):
        await wait_until(lambda: "whole m29" in host.shown and SAFE in host.shown)
        await pilot.press("up")
        await wait_until(lambda: "the database is busy" in host.shown)
        await pilot.press("escape")
        assert host.results == [None]


async def test_thousands_of_messages_are_not_all_put_on_the_screen() -> None:
    straight = chain("m", 5000, on_path=True)
    beside = [node for number in range(0, 3000, 2) for node in chain(f"x{number}-", 1, f"m{number}", role="assistant")]
    async with hosting(BranchTree([*straight, *beside])) as (host, pilot):
        await wait_until(lambda: "text m4999 ← here" in host.shown)
        lines = host.screen.query_one("#branches")
        assert len(lines.items) < 1000  # type: ignore[attr-defined]
        await pilot.press("home", "enter")
        await wait_until(lambda: len(lines.items) > 400)  # type: ignore[attr-defined]
        assert host.results == []


async def test_many_answers_to_one_question_wait_until_they_are_asked_for() -> None:
    retries = [node for number in range(50) for node in chain(f"r{number}-", 1, "m0", 1, role="assistant")]
    async with hosting(BranchTree([*chain("m", 2, on_path=True), *retries])) as (host, pilot):
        await wait_until(lambda: "← here" in host.shown)
        assert "text r0-0" not in host.shown
        await pilot.press("up", "right")
        await wait_until(lambda: "text r0-0" in host.shown)


async def test_hostile_text_is_inert() -> None:
    (node,) = chain("m", 1, on_path=True)
    bad = Node("m0", None, "[red]\x1b[2J", HOSTILE, 1, True, node.created)
    other = Node("m1", None, "user", HOSTILE + "\nsecond", 1, False, node.created)
    async with hosting(BranchTree([bad, other]), WIDE) as (host, pilot):
        await wait_until(lambda: host.shown.count(SAFE) >= 2)
        shown = host.shown
        await pilot.press("up")
        await wait_until(lambda: "Enter goes on from here" in host.shown)
        shown += host.shown
        assert "[red]␛[2J" in shown and not any(char in shown for char in "\x1b\x07\x9b\u202e")


async def test_nothing_said_yet_is_said() -> None:
    async with hosting(BranchTree([])) as (host, pilot):
        await wait_until(lambda: "Nothing was said yet." in host.shown)
        await pilot.press("enter", "right", "up", "f5")
        assert host.results == [None]
