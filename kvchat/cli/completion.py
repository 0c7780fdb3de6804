"""What a shell offers while a command is typed: the names of sessions, the last used first. No model, no torch.

The database is read as it lies there, without opening the store: completing a word must change nothing and ask nothing.
"""

from __future__ import annotations

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import typer

from kvchat.errors import ConfigError
from kvchat.terminal import neutralise

MOST_NAMES = 200
BUSY_S = 0.2
"""How long to wait for another process that writes."""


def session_names(context: typer.Context, incomplete: str) -> list[str]:
    """Sessions whose names begin so; none if there is no store, or none that can be read without a key."""
    given = _given(context)
    try:
        names = _read(_store_path(given.get("store"), given.get("config")))
    except (ConfigError, sqlite3.Error, OSError):
        return []
    found = [name for name in names if name.startswith(incomplete) and neutralise(name) == name]
    return [_quoted(name) for name in found[:MOST_NAMES]]


def _given(context: typer.Context) -> dict[str, Any]:
    """Options before and after the command's name; the ones after it win."""
    before = _given(context.parent) if isinstance(context.parent, type(context)) else {}
    return before | {key: value for key, value in context.params.items() if value}


def _store_path(store: Path | None, config: Path | None) -> Path:
    """Raises ConfigError."""
    if store:
        return Path(store)
    from kvchat.config import Config

    return Config.load(Path(config) if config else None).store_path


def _read(path: Path) -> list[str]:
    """Raises sqlite3.Error, as for a file that is not there or is encrypted."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)) as database:
        return [row[0] for row in database.execute("SELECT name FROM sessions ORDER BY updated DESC, id DESC")]


def _quoted(name: str) -> str:
    """For bash, which takes over what it is offered as it is; other shells quote by themselves."""
    if not os.environ.get("_KVCHAT_COMPLETE", "").endswith("bash"):
        return name
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", name)
