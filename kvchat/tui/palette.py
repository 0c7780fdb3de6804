"""Slash commands in the command palette."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from textual.app import SystemCommand

from kvchat.tui.commands import COMMANDS


def commands(run: Callable[[str], None], ask: Callable[[str], None]) -> Iterator[SystemCommand]:
    """All of them: `run` is called with the line, `ask` with the beginning of one that lacks its argument."""
    for name, command in COMMANDS.items():
        title = f"/{name} {command.argument}".strip()
        yield SystemCommand(title, command.help, _act(command.needs_argument, name, run, ask))


def _act(asks: bool, name: str, run: Callable[[str], None], ask: Callable[[str], None]) -> Callable[[], None]:
    return lambda: ask(f"/{name} ") if asks else run(f"/{name}")
