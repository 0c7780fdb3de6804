"""Slash commands: their names, what they take, and what they do."""

from __future__ import annotations

from asyncio import to_thread
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from kvchat.errors import InputError, SessionExists
from kvchat.tui.numbers import stats_table

if TYPE_CHECKING:
    from kvchat.handle import Session
    from kvchat.tui.app import ChatApp
    from kvchat.worker import Worker


@dataclass(frozen=True, slots=True)
class Command:
    """One line of /help."""

    argument: str
    """What follows the name; in brackets if it may be left out; empty if nothing does."""
    help: str
    anytime: bool = False
    """May run while the model is busy."""


COMMANDS = {
    "help": Command("", "show this", anytime=True),
    "new": Command("[NAME]", "begin a session"),
    "resume": Command("NAME", "go on with another session"),
    "rename": Command("NEW", "rename this session"),
    "fork": Command("NAME", "go on in a copy of this session"),
    "rewind": Command("[N]", "take back the last N turns (1)"),
    "retry": Command("", "answer the last message again"),
    "keep": Command("[F]", "hold this fraction of older turns' KV"),
    "stats": Command("", "what is kept, in memory and on disk"),
    "map": Command("", "show or hide the map of segments", anytime=True),
    "quit": Command("", "leave", anytime=True),
}

KEYS = """\
Enter sends, Ctrl+J begins a new line, PageUp and PageDown scroll.
A message that begins with // is sent with one slash.
While an answer is being written, Enter lets one message wait for its end."""


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
    if bool(argument) != bool(command.argument) and not command.argument.startswith("["):
        raise InputError(f"usage: /{name} {command.argument}".strip())
    return name, argument


def number(argument: str) -> int:
    """The N of /rewind: 1 if it is left out.

    Raises:
        InputError: not a whole number above 0.
    """
    if not argument:
        return 1
    if not argument.isdecimal() or int(argument) < 1:
        raise InputError(f"usage: /rewind [N], N is a number of turns from 1, got {argument!r}")
    return int(argument)


def help_text() -> str:
    """All commands, one a line, then the keys that the footer does not show."""
    rows = [(f"/{name} {command.argument}", command.help) for name, command in COMMANDS.items()]
    return "\n".join([f"{usage:16}{text}" for usage, text in rows] + ["", KEYS])


class Commands:
    """What the commands do to `app`: one method for each, named after it, which takes the argument."""

    def __init__(self, app: ChatApp) -> None:
        self.app = app

    def run(self, line: str) -> None:
        """Run one line that begins with a slash.

        Raises:
            InputError: it cannot be run; the message says why.
        """
        name, argument = parse(line)
        if self.app.busy and not COMMANDS[name].anytime:
            raise InputError(f"/{name} has to wait until the model is idle; Escape stops an answer")
        getattr(self, name)(argument)

    def help(self, _: str) -> None:
        self.app.note(f"{help_text()}\nSessions are saved in {self.app.config.store_path}.")

    def quit(self, _: str) -> None:
        self.app.call_later(self.app.action_quit)

    def new(self, name: str) -> None:
        def make(engine: Worker) -> Session:
            fresh = name or f"{datetime.now():%Y-%m-%d-%H%M%S}"
            if fresh in [info.name for info in engine.sessions()]:
                raise SessionExists(f"a session named {fresh!r} is there already; /resume {fresh} goes on with it")
            return engine.open(fresh)

        self.app.begin("opening", self.app.open_session(make))

    def resume(self, name: str) -> None:
        if name != self.app.session_name:
            self.app.begin(f"opening {name}", self.app.open_session(lambda engine: engine.open(name, create=False)))

    def fork(self, name: str) -> None:
        chat = self.app.session()
        self.app.begin("forking", self.app.open_session(lambda _: chat.fork(name)))

    def retry(self, _: str) -> None:
        self.app.turns.retry()

    def rename(self, new: str) -> None:
        app, chat = self.app, self.app.session()

        async def rename() -> None:
            engine = await to_thread(app.connected)
            await to_thread(engine.rename, chat.name, new)
            app.show_name()
            await app.turns.measure(chat)

        app.begin("renaming", rename())

    def rewind(self, argument: str) -> None:
        app, chat, turns = self.app, self.app.session(), number(argument)

        async def rewind() -> None:
            text = await to_thread(chat.rewind, turns)
            await app.show_history(chat)
            app.prompt.give_back(text)
            await app.turns.measure(chat)

        app.begin("taking back", rewind())

    def keep(self, argument: str) -> None:
        app, chat = self.app, self.app.session()

        async def keep() -> None:
            await to_thread(chat.configure, {"compress.keep_ratio": argument or None})
            app.note(f"older turns now hold {argument or 'what config.toml says'} of their KV pairs in memory")
            await app.turns.measure(chat)

        app.begin("fitting memory", keep())

    def stats(self, _: str) -> None:
        app, chat = self.app, self.app.session()

        async def show() -> None:
            app.note(stats_table(await to_thread(chat.stats)))

        app.begin("measuring", show())

    def map(self, _: str) -> None:
        app = self.app
        if app.segment_map.toggle() and app.chat:
            app.beside(app.turns.measure(app.chat))
