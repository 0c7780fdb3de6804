"""`kvchat show`: a conversation as it was said, or as a map of what is kept of it."""

from __future__ import annotations

from typing import Annotated

import typer

from kvchat.cli.flags import USAGE_ERROR, Json, ModelFlags, Name, StoreFlags, command, examples
from kvchat.cli.stats import AsMap, Force, Html, show_map
from kvchat.cli.store import open_store, print_json, spoken, turn_numbers
from kvchat.errors import InputError

app = typer.Typer()


@app.command(
    epilog=examples(
        "kvchat show trip",
        "kvchat show trip --turn 2 --json",
        "kvchat show trip --map",
        "kvchat show trip --html map.html",
    )
)
@command
def show(
    flags: ModelFlags,
    name: Name,
    turn: Annotated[int | None, typer.Option(min=0, help="Only this turn; 0 is the system prompt.")] = None,
    as_map: AsMap = False,
    html: Html = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Print a conversation, or draw what is kept of it.

    The map opens the session, and so loads the model; of one that is open elsewhere it shows what the store holds.
    """
    if not (as_map or html):
        _print(flags, name, turn, as_json)
    elif turn is not None:
        raise USAGE_ERROR("a map is of all turns; leave --turn out")
    else:
        show_map(flags, name, html, force, drawn=as_map, as_json=as_json)


def _print(flags: StoreFlags, name: str, turn: int | None, as_json: bool) -> None:
    """What was said in all turns, or in one."""
    from kvchat.cli.plain import write

    with open_store(flags) as store:
        messages = spoken(store.path(store.session(name).tip))
    turns = turn_numbers(messages)
    shown = [pair for pair in zip(turns, messages, strict=True) if turn in (None, pair[0])]
    if turn is not None and not shown:
        raise InputError(f"{name} has no turn {turn}; it has turns 1 to {max(turns, default=0)}")
    if as_json:
        print_json([{"turn": number, "role": message.role, "content": message.content} for number, message in shown])
        return
    for number, message in shown:
        write(f"[{number}] {message.role}:\n{message.content}\n\n")
