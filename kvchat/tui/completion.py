"""What a line that begins with a slash could become: names of commands, then what they take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from kvchat.errors import KVChatError

MOST_READ = 5000
"""Entries of a folder that are looked at."""
MOST_FOUND = 100
"""Candidates that are listed."""

Source = Callable[[str], Iterable[str]]
"""Gives values that an argument may have, given what is typed of it. It may wait: it is called in a thread."""


class Usage(Protocol):
    """What is told of a command."""

    @property
    def argument(self) -> str:
        """What follows the name; in brackets if it may be left out; empty if nothing does."""

    @property
    def help(self) -> str:
        """What it does."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing that the line could become."""

    line: str
    label: str
    """As it is listed."""
    hint: str = ""
    is_complete: bool = False
    """Nothing must follow."""


class Completer:
    """Proposes commands by their names, and arguments by the source that goes with the command, if one does."""

    def __init__(self, commands: Mapping[str, Usage], sources: Mapping[str, Source]) -> None:
        self.commands = commands
        self.sources = sources

    def candidates(self, line: str) -> list[Candidate]:
        """All for a line, the best first; none if it is a message."""
        if not line.startswith("/") or line.startswith("//") or "\n" in line:
            return []
        name, blank, argument = line[1:].partition(" ")
        if not blank:
            return [self._named(found) for found in matching(name, self.commands)]
        if name not in self.sources or name not in self.commands:
            return []
        return list(islice(self._arguments(name, argument.lstrip()), MOST_FOUND))

    def is_command(self, line: str) -> bool:
        """The line begins with the whole name of a command."""
        return line.startswith("/") and line[1:].partition(" ")[0] in self.commands

    def _named(self, name: str) -> Candidate:
        usage = self.commands[name]
        needs_more = bool(usage.argument)
        label = f"/{name} {usage.argument}".rstrip()
        return Candidate(f"/{name}{' ' * needs_more}", label, usage.help, not needs_more)

    def _arguments(self, name: str, typed: str) -> Iterator[Candidate]:
        try:
            values = [value for value in self.sources[name](typed) if value.isprintable()]
        except KVChatError:
            return
        for value in matching(typed, values):
            is_begun = value.endswith(("/", "="))
            yield Candidate(f"/{name} {value}", value, "", not is_begun)


def matching(typed: str, values: Iterable[str]) -> list[str]:
    """The values that begin with what is typed, then those that have it inside; case does not matter."""
    wanted, all_values = typed.casefold(), list(values)
    first = [value for value in all_values if value.casefold().startswith(wanted)]
    return first + [value for value in all_values if wanted in value.casefold() and value not in set(first)]


def paths(typed: str) -> list[str]:
    """Files and folders, these with a slash, that a path which is begun could be; none where nothing can be read."""
    folder, slash, begin = typed.rpartition("/")
    try:
        with os.scandir(Path(folder + slash or ".").expanduser()) as entries:
            some = sorted((entry.name, entry.is_dir()) for entry in islice(entries, MOST_READ))
    except (OSError, ValueError, RuntimeError):  # no folder can be called that, or nobody has that home
        return []
    shown = [(name, is_folder) for name, is_folder in some if begin.startswith(".") or not name.startswith(".")]
    return [f"{folder}{slash}{name}{'/' * is_folder}" for name, is_folder in shown if name.startswith(begin)]
