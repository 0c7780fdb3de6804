"""What the input proposes while a command is typed: names of sessions, files, settings, themes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from kvchat.tui.commands import COMMANDS
from kvchat.tui.completion import Completer, Source, paths

if TYPE_CHECKING:
    from kvchat.tui.session_screen import SessionScreen


def completer(screen: SessionScreen) -> Completer:
    """Of the chat's commands, with what `screen` knows."""
    sources: Mapping[str, Source] = {
        "resume": _of(lambda: (name for name in screen.sessions.names if name != screen.session_name)),
        "theme": _of(lambda: sorted(screen.app.available_themes)),
        "copy": _of(lambda: ["code"]),
        "set": _of(_settings),
        "attach": paths,
        "export": paths,
    }
    return Completer(COMMANDS, sources)


def _of(values: Callable[[], Iterable[str]]) -> Source:
    return lambda _: values()


def _settings() -> Iterable[str]:
    from kvchat.config import OF_SESSIONS
    from kvchat.meanings import MEANINGS

    return [f"{key}=" for key in MEANINGS if key.partition(".")[0] in OF_SESSIONS]
