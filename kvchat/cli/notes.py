"""`kvchat title` and `kvchat tag`: what a session is about, in the user's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from kvchat.cli.flags import Json, StoreFlags, command, examples
from kvchat.cli.store import Name, open_store, print_json
from kvchat.errors import InputError

app = typer.Typer()

SIGNED = {"ignore_unknown_options": True, "help_option_names": ["--help"]}
"""So that -old is no group of options."""


@app.command(
    short_help="Show or change a session's title.",
    epilog=examples("kvchat title trip", 'kvchat title trip "Three days in Rome"'),
)
@command
def title(
    flags: StoreFlags,
    name: Name,
    text: Annotated[str | None, typer.Argument(metavar="[TITLE]", help='The title; "" takes it away.')] = None,
    as_json: Json = False,
) -> None:
    """Show or change a session's title; without one it has the beginning of its first question."""
    from kvchat.cli.plain import write

    with open_store(flags) as store:
        info = store.session(name)
        if text is not None:
            store.set_title(info.id, text, "user")
            info = store.session(name, info.id)
    if as_json:
        print_json({"name": info.name, "title": info.title, "titled": info.titled})
    elif text is None:
        write(f"{info.title}\n")


@app.command(context_settings=SIGNED, epilog=examples("kvchat tag trip", "kvchat tag trip +italy -draft"))
@command
def tag(
    flags: StoreFlags,
    name: Name,
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[+TAG|-TAG]...", help="Tags to add and to take away.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show or change a session's tags."""
    from kvchat.cli.plain import write

    more, fewer = _signed(changes or ())
    with open_store(flags) as store:
        info = store.session(name)
        tags = store.change_tags(info.id, more, fewer) if changes else info.tags
    if as_json:
        print_json({"name": info.name, "tags": tags})
    elif tags:
        write(f"{' '.join(tags)}\n")


def _signed(changes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The tags to add, and those to take away."""
    for change in changes:
        if change[:1] not in ("+", "-"):
            raise InputError(f"{change!r} has no sign; write +{change} to add the tag, -{change} to take it away")
    more, fewer = ([change[1:] for change in changes if change[0] == sign] for sign in "+-")
    if both := set(more) & set(fewer):
        raise InputError(f"{min(both)!r} is both added and taken away")
    return more, fewer
