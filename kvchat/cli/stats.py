"""`kvchat stats`: what a conversation holds, as lines, as a map or as a page, and what would give way to the limits."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat.cli.completion import session_names
from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.cli.store import decisions, open_store, print_json, stored_stats
from kvchat.errors import InputError, SessionBusy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

app = typer.Typer()

Episodes = list[dict[str, Any]]
AsMap = Annotated[
    bool, typer.Option("--map", "--plot", help="Draw the segments: how much of each is held, and where the rest lies.")
]
Html = Annotated[Path | None, typer.Option(help="Write the map to this file, as a page of its own.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


@app.command(
    short_help="What a session holds, in memory and on disk.",
    epilog=examples(
        "kvchat stats trip",
        "kvchat stats trip --map",
        "kvchat stats trip --html map.html --json",
        "kvchat stats --why",
    ),
)
@command
def stats(
    flags: ModelFlags,
    name: Annotated[
        str | None,
        typer.Argument(help="The session; with --why all.", show_default=False, autocompletion=session_names),
    ] = None,
    as_map: AsMap = False,
    html: Html = None,
    force: Force = False,
    why: Annotated[bool, typer.Option("--why", help="What would give way to the limits now, and why.")] = False,
    as_json: Json = False,
) -> None:
    """What a session holds, in memory and on disk; or what of all sessions would give way to the limits."""
    from kvchat.cli import plain

    if why:
        lines = decisions(flags, name)
        if as_json:
            print_json(lines)
        else:
            plain.write("\n".join(lines or ["nothing gives way: all keeps to the limits that are set"]) + "\n")
        return
    if name is None:
        raise InputError("name a session, or ask --why")
    if as_map or html:
        show_map(flags, name, html, force, drawn=as_map, as_json=as_json)
        return
    figures, _ = _figures(flags, name, named=False)
    if as_json:
        print_json(figures)
    else:
        plain.write(plain.format_stats(figures) + "\n")


def show_map(flags: ModelFlags, name: str, html: Path | None, force: bool, *, drawn: bool, as_json: bool) -> None:
    """A session's map: as a page in the file `html`, and `drawn` on the terminal or its figures as JSON."""
    figures, episodes = _figures(flags, name, named=True)
    if html:
        _write_page(flags, (figures, episodes), html, force)
    if as_json:
        print_json(figures)
    elif drawn:
        print(_map(figures, episodes), flush=True)


def _figures(flags: ModelFlags, name: str, named: bool) -> tuple[dict[str, Any], Episodes]:
    """Figures and, if they are to be `named`, episodes; of a session that is open elsewhere what the store holds."""
    from kvchat.cli import plain

    try:
        with plain.opened(flags, name, create=False) as (_, session, _):
            return session.stats(), session.episodes() if named else []
    except SessionBusy as error:
        plain.say(f"kvchat: {error}; shown is what the store holds")
        return stored_stats(flags, name), _stored_episodes(flags, name) if named else []


def _stored_episodes(flags: ModelFlags, name: str) -> Episodes:
    """As `Session.episodes`."""
    from kvchat.cli.episodes import embedder_of
    from kvchat.cli.plain import Status
    from kvchat.stats import stored_episodes

    with open_store(flags) as store:
        info = store.session(name)
        embedder = embedder_of(flags, info, Status())
        return stored_episodes(store, store.path(info.tip), embedder, flags.settings().episodes.clusters)


def _map(figures: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]) -> str:
    """For the terminal as wide as it is, and in colour if it has some; for a pipe 80 columns without."""
    from kvchat.segment_map import draw, heading, to_text

    typed = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if typed else 80
    colour = typed and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    lines = [*heading(figures, width), (), *draw(figures, episodes, width)]
    return to_text(lines, colour, sys.stdout.encoding or "utf-8")


def _write_page(flags: ModelFlags, told: tuple[dict[str, Any], Episodes], file: Path, force: bool) -> None:
    """The map as a page of its own."""
    from kvchat.cli import plain
    from kvchat.files import written
    from kvchat.segment_page import page

    with written(file, force) as stream:
        stream.write(page(*told).encode())
    plain.say(f"{file} is written")
    if flags.key:
        plain.say("the store is encrypted; what was written here is not")
