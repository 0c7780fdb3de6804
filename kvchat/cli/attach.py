"""The command that attaches documents to a session."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.cli.store import print_json
from kvchat.documents import read_document

if TYPE_CHECKING:
    from kvchat.attaching import Attached

app = typer.Typer()


@app.command(
    short_help="Take text files into a session.",
    epilog=examples("kvchat attach trip notes.txt", "kvchat attach review report.md notes.txt --json"),
)
@command
def attach(
    flags: ModelFlags,
    name: Annotated[str, typer.Argument(help="The session; it is created if there is none.", show_default=False)],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Texts in UTF-8.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Take text files into a session; each is computed once, for all sessions that it is attached to."""
    from kvchat.cli import plain

    texts = [(file.name, read_document(file)) for file in files]  # before anything is loaded
    with plain.opened(flags, name) as (_, session, status):
        attached = []
        for title, text in texts:
            attached.append(session.attach(title, text))
            status.clear()
            if not as_json:
                plain.say(told(title, attached[-1]))
        session.settle()
    if as_json:
        print_json([asdict(one) for one in attached])


def told(title: str, attached: Attached) -> str:
    """What was attached, as one line."""
    from kvchat.documents import title_of

    parts = "" if attached.parts == 1 else f" in {attached.parts} parts"
    return f"{title_of(title)}: attached, {attached.tokens} tokens{parts}, {attached.computed} computed"
