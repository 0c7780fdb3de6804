"""An input for the name of a file, which Tab completes.

Names with control characters are shown with signs in their place; which file is meant is remembered.
"""

from __future__ import annotations

import os
import shlex
from asyncio import to_thread
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input

from kvchat.terminal import neutralise

MOST_NAMES = 12
"""That are proposed at once."""
MOST_READ = 5000
"""Entries of a folder that are looked at."""
LONGEST_PATH = 4096
"""Longer pastes are texts."""


@dataclass
class Shown(Message):
    """Names that what was typed could become."""

    names: list[str]


class PathInput(Input):
    """Tab extends what stands there as far as only one continuation is possible, then goes through them."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("tab", "complete", "Complete", show=False, id="attach.complete")]

    @dataclass
    class Pasted(Message):
        """A text was pasted that is no path."""

        text: str

    def __init__(self, path: str = "", *, id: str | None = None) -> None:
        super().__init__(_shown(path), placeholder="~/notes.md", compact=True, id=id)
        self._real = {_shown(path): path}
        self._begun = ""
        """What all of the cycle begin with."""
        self._cycle: list[str] = []

    @property
    def path(self) -> Path:
        """The file that is meant."""
        return Path(self._meant(self.value) or ".").expanduser()

    def _meant(self, shown: str) -> str:
        """The real name: names with signs in them were found in a folder before."""
        if shown in self._real or "/" not in shown.rstrip("/"):
            return self._real.get(shown, shown)
        folder, _, name = shown.rpartition("/")
        return f"{self._meant(folder) if folder else ''}/{name}"

    def _on_paste(self, event: events.Paste) -> None:
        """A line is typed in, more is a text of its own."""
        event.prevent_default()
        event.stop()
        text = event.text.strip("\r\n")
        if "\n" in text or "\r" in text or len(text) > LONGEST_PATH:
            self.post_message(self.Pasted(event.text))
        else:
            self.insert_text_at_cursor(_shown(_bare(text.strip())))

    async def action_complete(self) -> None:
        """Extend the name; if it is whole or nothing begins like it, go on to the next field."""
        if self.value in self._cycle or (self._cycle and self.value == self._begun):
            place = self._cycle.index(self.value) + 1 if self.value in self._cycle else 0
            self._put(self._cycle[place % len(self._cycle)])
            return
        found = await to_thread(self._continuations)
        self._begun, self._cycle = _common(found), found if len(found) > 1 else []
        if not found or found == [self.value]:
            self._propose([])
            self.screen.focus_next()
        else:
            self._put(self._begun)
            self._propose(self._cycle)

    def _put(self, value: str) -> None:
        self.value = value
        self.cursor_position = len(value)

    def _propose(self, found: list[str]) -> None:
        names = [one.rstrip("/").rpartition("/")[2] + "/" * one.endswith("/") for one in found[:MOST_NAMES]]
        self.post_message(Shown([*names, *(["…"] if len(found) > MOST_NAMES else [])]))

    def _continuations(self) -> list[str]:
        """Paths that begin with what stands there, folders with a slash; hidden ones only if asked for."""
        shown = self.value
        folder, slash, begin = shown.rpartition("/")
        if shown == "~":
            return ["~/"]
        below = Path(self._meant(folder) or ("/" if slash else ".")).expanduser()
        found = dict[str, str]()
        for name, is_folder in _entries(below):
            one = f"{folder}{slash}{_shown(name)}"
            if _shown(name).startswith(begin) and (begin.startswith(".") or not name.startswith(".")):
                found[one + "/" * is_folder] = f"{self._meant(folder) if folder else ''}{slash}{name}" + "/" * is_folder
        self._real |= {shown: real for shown, real in found.items() if shown != real}
        return sorted(found)


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder, and whether they are folders; none if it cannot be read."""
    found = list[tuple[str, bool]]()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.append((entry.name, entry.is_dir()))
                if len(found) >= MOST_READ:
                    break
    except (OSError, ValueError):  # no folder can be called that
        return []
    return found


def _bare(text: str) -> str:
    """A name without the quotes or backslashes that terminals put into names of files that are dropped on them."""
    try:
        words = shlex.split(text) if os.name == "posix" else []
    except ValueError:  # a quote that does not end is part of the name
        words = []
    return words[0] if len(words) == 1 else text


def _shown(path: str) -> str:
    return neutralise(path).replace("\n", "␤").replace("\t", "␉")


def _common(names: list[str]) -> str:
    """What all of them begin with."""
    low, high = min(names, default=""), max(names, default="")
    differ = (place for place, (one, other) in enumerate(zip(low, high, strict=False)) if one != other)
    return low[: next(differ, len(low))]
