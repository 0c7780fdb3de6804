"""Slash commands: their names, what they take, and how a line is read. What they do stands in acts.py and shows.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvchat.errors import InputError


@dataclass(frozen=True, slots=True)
class Command:
    """One line of /help."""

    argument: str
    """What follows the name; in brackets if it may be left out; empty if nothing does."""
    help: str
    anytime: bool = False
    """May run while the model is busy."""

    @property
    def needs_argument(self) -> bool:
        """Something cannot be left out."""
        return bool(self.argument) and not re.fullmatch(r"\[[^\]]*\]", self.argument)

    @property
    def is_bare(self) -> bool:
        """It takes nothing."""
        return not self.argument


COMMANDS: Mapping[str, Command] = {
    "help": Command("", "keys and commands", anytime=True),
    "new": Command("[NAME]", "begin a session"),
    "resume": Command("[NAME]", "go on with another session"),
    "sessions": Command("", "find, open, or delete sessions", anytime=True),
    "fork": Command("[TURN] NAME", "go on in a copy, of all turns or up to TURN"),
    "rename": Command("NEW", "rename this session"),
    "title": Command("[TITLE]", "show or set this session's title; - takes it away"),
    "tag": Command("[+TAG -TAG]", "show, add, or take away tags"),
    "rewind": Command("[N]", "take back the last N turns (1)"),
    "edit": Command("[TURN]", "say the message of a turn anew (the last)"),
    "retry": Command("", "answer the last message again"),
    "continue": Command("", "go on with an answer that was cut"),
    "branches": Command("", "show all branches, and go to another"),
    "attach": Command("[FILE]", "take in a text file"),
    "system": Command("[TEXT]", "show the system prompt, or begin a session with another"),
    "set": Command("KEY=VALUE", "give this session a setting of its own; KEY= takes it away"),
    "keep": Command("[F]", "hold this fraction of older turns' KV"),
    "model": Command("[NAME]", "show the model, or go on with another"),
    "stats": Command("", "what is kept, in memory and on disk"),
    "map": Command("", "show or hide the map of segments", anytime=True),
    "inspect": Command("[TURN]", "what is kept of a turn, token by token"),
    "copy": Command("[code]", "copy the last answer, or its last block of code", anytime=True),
    "export": Command("FILE", "write this session to a file: .md, .json, .jsonl or .html"),
    "search": Command("WORDS", "find words in all sessions", anytime=True),
    "theme": Command("[NAME]", "choose the colours, for this run", anytime=True),
    "settings": Command("", "look at settings and change them", anytime=True),
    "clear": Command("", "empty the screen; the session stays as it is", anytime=True),
    "quit": Command("", "leave", anytime=True),
}

KEYS = """\
Enter sends, Ctrl+J begins a new line, PageUp and PageDown scroll.
A message that begins with // is sent with one slash.
While an answer is being written, Enter lets messages wait for its end; Escape gives the newest back."""


def parse(line: str) -> tuple[str, str]:
    """The command's name and its argument.

    Raises:
        InputError: no such command, an argument is missing, or there is one too many.
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise InputError(f"there is no command /{name}; /help lists them, and // begins a message with a slash")
    argument = argument.strip()
    if (argument and command.is_bare) or (not argument and command.needs_argument):
        raise usage(name)
    return name, argument


def usage(name: str, problem: str = "") -> InputError:
    """What to tell someone who gave a command a wrong argument."""
    return InputError(f"usage: /{name} {COMMANDS[name].argument}".strip() + (f"; {problem}" if problem else ""))


def number(name: str, argument: str, default: int) -> int:
    """A whole number from 1; `default` if it is left out.

    Raises:
        InputError: it is something else.
    """
    if not argument:
        return default
    if not argument.isdecimal() or int(argument) < 1:
        raise usage(name, f"a whole number from 1, got {argument!r}")
    return int(argument)


def turn_and_name(argument: str) -> tuple[int | None, str]:
    """What /fork takes: the turn, if two words or more begin with a number, and the name."""
    if found := re.fullmatch(r"(\d+)\s+(.+)", argument):
        return number("fork", found[1], 1), found[2]
    if argument.startswith("["):
        raise usage("fork")
    return None, argument


def assignment(argument: str) -> tuple[str, str | None]:
    """KEY=VALUE; None if no value is given.

    Raises:
        InputError: there is no key, or no equals sign.
    """
    key, sign, value = (part.strip() for part in argument.partition("="))
    if not sign or not key:
        raise usage("set", f"as in compress.keep_ratio=0.3, got {argument!r}")
    return key, value or None


def tags(argument: str, before: tuple[str, ...]) -> tuple[str, ...]:
    """`before` with the changes that /tag was given."""
    found = set(before)
    for word in argument.split():
        if word.startswith("-"):
            found.discard(word[1:])
        else:
            found.add(word.removeprefix("+"))
    return tuple(sorted(found))


def help_text() -> str:
    """All commands, one a line, then the keys that the footer does not show."""
    rows = [(f"/{name} {command.argument}", command.help) for name, command in COMMANDS.items()]
    return "\n".join([f"{usage:20}{text}" for usage, text in rows] + ["", KEYS])
