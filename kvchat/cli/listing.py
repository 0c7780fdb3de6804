"""`kvchat ls` and `kvchat search`: which sessions there are, and which of them say something."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat.cli.flags import Json, StoreFlags, command, examples
from kvchat.cli.store import open_store, print_json, print_table, width_of
from kvchat.terminal import on_a_row

if TYPE_CHECKING:
    from kvchat.store.store import SessionInfo

LEAST_WANTED = ("model", "tokens", "saved", "disk", "branches", "updated")
"""Columns that a narrow terminal does without, in this order, before titles get shorter than this:"""
SHORT_TITLE = 20

app = typer.Typer()


@app.command(epilog=examples("kvchat ls", "kvchat ls --tag italy", "kvchat ls --json"))
@command
def ls(
    flags: StoreFlags,
    tag: Annotated[
        list[str] | None, typer.Option(metavar="TAG", help="Only those with this tag; may be given again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the sessions, the last used first."""
    wanted = set(tag or ())
    sessions = [session for session in _sessions(flags) if wanted <= set(session.tags)]
    if as_json:
        print_json([asdict(session) for session in sessions])
        return
    if not sessions:
        tags = " and ".join(map(repr, sorted(wanted)))
        none = f"no session has the tag {tags}" if tags else "no sessions yet; `kvchat chat` begins one"
        print(none, file=sys.stderr)
    rows = [_row(session) for session in sessions]
    print_table(_fitted(rows, shutil.get_terminal_size().columns) if sys.stdout.isatty() else rows)


def _sessions(flags: StoreFlags) -> list[SessionInfo]:
    if not flags.settings().store_path.exists():
        return []
    with open_store(flags) as store:
        return store.sessions()


def _row(session: SessionInfo) -> dict[str, Any]:
    from kvchat.cli.plain import part, size

    return {
        "name": session.name,
        "turns": session.num_turns,
        "branches": session.num_branches or None,
        "tokens": session.num_tokens,
        "disk": size(session.nbytes),
        "saved": part(session.stored),
        "model": session.model,
        "updated": session.updated[:16].replace("T", " "),
        "tags": " ".join(session.tags),
        "title": session.title,
    }


def _fitted(rows: Sequence[dict[str, Any]], columns: int) -> list[dict[str, Any]]:
    """Rows that stand on one line each if they can: without some columns, and with the beginnings of titles."""
    widths = {key: max(width_of(str(row[key] or "")) for row in [{key: key}, *rows]) + 2 for key in (rows or [{}])[0]}
    title = widths.pop("title", 0) - 2
    for key in LEAST_WANTED:
        if sum(widths.values()) + min(title, SHORT_TITLE) > columns:
            widths.pop(key, None)
    room = max(1, columns - sum(widths.values()))
    return [{**{key: row[key] for key in widths}, "title": _beginning(row["title"], room)} for row in rows]


def _beginning(text: str, columns: int) -> str:
    text = on_a_row(text, 4 * columns)
    if width_of(text) <= columns:
        return text
    while width_of(text) > columns - 1:
        text = text[:-1]
    return f"{text}…"


@app.command(epilog=examples("kvchat search Rome", 'kvchat search "blue bicycle" --limit 5 --json'))
@command
def search(
    flags: StoreFlags,
    text: Annotated[str, typer.Argument(help="Words to find.")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many hits.")] = 20,
    as_json: Json = False,
) -> None:
    """Find words in all conversations; on a terminal they are bold."""
    with open_store(flags) as store:
        hits = store.search(text, limit)
    if as_json:
        print_json([asdict(hit) for hit in hits])
        return
    rows = [{"session": hit.session, "turn": hit.turn, "role": hit.role, "text": hit.snippet} for hit in hits]
    bold = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    print_table(rows, bold=[hit.spans for hit in hits] if bold else None)
