"""`kvchat set`: settings that one session has for itself."""

from __future__ import annotations

from typing import Annotated

import typer

from kvchat.cli_store import Name, open_store, print_json
from kvchat.flags import Json, StoreFlags, assignment, command

app = typer.Typer()


@app.command()
@command
def set(
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
    from kvchat.locks import SessionLock

    given = dict(assignment(text) for text in values or ())
    with open_store(flags) as store:
        info = store.session(name)
        own = {key: value for key, value in {**info.settings, **given}.items() if value != ""}
        if given:
            lock = SessionLock(store.file, info.id, info.name)
            try:
                flags.settings().for_session(own)
                store.set_settings(info.id, own)
            finally:
                lock.release()
    if as_json:
        print_json(own)
    else:
        print("\n".join(f"{key}={value}" for key, value in sorted(own.items())) or f"{name} has no settings of its own")
