"""The slash commands of the line chat: their names, what they take, and how their arguments are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvchat.errors import InputError
from kvchat.terminal import on_a_row

if TYPE_CHECKING:
    from kvchat.branching import Node
    from kvchat.store.store import Message

WIDEST = 72
"""Characters of a text of which only the beginning is told."""


@dataclass(frozen=True, slots=True)
class Command:
    """One line of /help."""

    argument: str
    """What follows the name; in brackets if it may be left out."""
    help: str


COMMANDS = {
    "help": Command("", "show this"),
    "new": Command("[NAME]", "begin a session"),
    "resume": Command("NAME", "go on with another session"),
    "sessions": Command("", "list the sessions, the last used first"),
    "search": Command("WORDS", "find words in all sessions"),
    "rename": Command("NEW", "rename this session"),
    "title": Command("[TEXT]", 'show or change the title; /title "" takes it away'),
    "tag": Command("[+A -B]", "show or change the tags"),
    "fork": Command("NAME | TURN NAME", "go on in a copy of this session, up to that turn"),
    "rewind": Command("[N]", "take back the last N turns (1)"),
    "retry": Command("", "answer the last message again"),
    "continue": Command("", "go on with an answer that was cut"),
    "edit": Command("[TURN] [TEXT]", "say a message of yours anew, the last one without TURN; the old path stays"),
    "branches": Command("", "list where this session's paths end"),
    "switch": Command("N", "go to the end N of /branches"),
    "attach": Command("FILE", "take a text file in"),
    "system": Command("[TEXT]", "show the system prompt, or give a session one that is still empty"),
    "set": Command("[KEY=VALUE]", "show or change this session's own settings"),
    "keep": Command("[F]", "hold this fraction of older turns' KV, from now on"),
    "model": Command("", "which model answers"),
    "stats": Command("", "what is kept, in memory and on disk"),
    "map": Command("", "the same as a map of segments"),
    "copy": Command("[code]", "put the last answer, or its last block of code, on the terminal's clipboard"),
    "export": Command("FILE", "write the conversation to FILE.md, .json, .jsonl or .html"),
    "quit": Command("", "leave (or Ctrl+D); Ctrl+C stops an answer and keeps what was said"),
}
ALSO = {"exit": "quit", "undo": "rewind", "regenerate": "retry"}
"""What other programs call them."""


def parse(line: str) -> tuple[str, str] | None:
    """A command's name and its argument; None for a message. Two slashes begin one, and so does a path.

    Raises:
        InputError: no such command, an argument is missing, or there is one too many.
    """
    said, _, argument = line.partition(" ")
    if not said.startswith("/") or not said.removeprefix("/").isalpha():
        return None
    name, argument = said.removeprefix("/"), argument.strip()
    name = ALSO.get(name, name)
    if name not in COMMANDS:
        raise InputError(f"unknown command {said}; /help lists commands")
    wanted = COMMANDS[name].argument
    if bool(argument) != bool(wanted) and not wanted.startswith("["):
        raise InputError(f"usage: /{name} {wanted}".strip())
    return name, argument


def help_text() -> str:
    """All commands, one a line."""
    usages = {name: f"/{name} {command.argument}" for name, command in COMMANDS.items()}
    width = max(map(len, usages.values())) + 2
    lines = [f"{usages[name]:{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "All else is a message; one that begins with a slash is written with two."])


def turn_and_rest(argument: str) -> tuple[int | None, str]:
    """The number that begins an argument, if one does, and what follows."""
    first, _, rest = argument.partition(" ")
    return (int(first), rest.strip()) if first.isdecimal() else (None, argument)


def spoken(messages: Sequence[Message]) -> list[Mapping[str, str]]:
    """Messages for a file, less the opening that a model needs where there is no system prompt."""
    return [
        {"role": message.role, "content": message.content}
        for message in messages
        if message.content or message.role != "system"
    ]


def ends(nodes: Sequence[Node]) -> list[Node]:
    """Messages that nothing follows, the oldest first."""
    parents = {node.parent for node in nodes}
    return sorted((node for node in nodes if node.id not in parents), key=lambda node: node.created)


def ends_told(nodes: Sequence[Node]) -> Iterator[str]:
    """What sets each end apart from the present path."""
    by_id = {node.id: node for node in nodes}
    for end in ends(nodes):
        if end.on_path:
            yield f"here, turn {end.turn}: {on_a_row(end.text, WIDEST)}"
            continue
        first = end
        while first.parent in by_id and not by_id[first.parent].on_path:
            first = by_id[first.parent]
        yield f"to turn {end.turn}, another way from turn {first.turn}: {first.role}: {on_a_row(first.text, WIDEST)}"
