"""`kvchat set`: settings that one session has for itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat.cli.flags import Json, StoreFlags, assignment, command, examples
from kvchat.cli.store import Name, open_store, print_json

if TYPE_CHECKING:
    from kvchat.store.store import SessionInfo, Store

app = typer.Typer()


@app.command(
    "set",
    short_help="Show or change a session's own settings.",
    epilog=examples(
        "kvchat set trip",
        "kvchat set trip compress.keep_ratio=0.2 generate.temperature=0.7",
        "kvchat set trip compress.keep_ratio=",
    ),
)
@command
def change(
    flags: StoreFlags,
    name: Name,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings; without a value: as elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show or change a session's own settings of compress, codec and generate.

    New turns are kept as they say; what is held of older ones follows when the session is opened.
    """
    from kvchat.cli.plain import write

    given = dict(assignment(text) for text in values or ())
    with open_store(flags) as store:
        info = store.session(name)
        own = _changed(flags, store, info, given) if given else info.settings
    if as_json:
        print_json(own)
    else:
        lines = [f"{key}={value}" for key, value in sorted(own.items())] or [f"{name} has no settings of its own"]
        write("".join(f"{line}\n" for line in lines))


def _changed(flags: StoreFlags, store: Store, info: SessionInfo, given: Mapping[str, Any]) -> dict[str, Any]:
    """Store other settings of a session that is not open; what it has then."""
    from kvchat.locks import SessionLock

    lock = SessionLock(store.file, info.id, info.name)
    try:
        before = store.session(info.name, info.id).settings  # as they are now that nobody else can change them
        own = {key: value for key, value in {**before, **given}.items() if value != ""}
        if own.keys() & given.keys():  # taking away must be possible whatever is left
            flags.settings().for_session(own)
        store.set_settings(info.id, own)
    finally:
        lock.release()
    return own
