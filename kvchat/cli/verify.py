"""The command that checks what is saved, asks sessions again what they answered before, and mends damage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat.cli import store as cli_store
from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.errors import KVChatError

if TYPE_CHECKING:
    from kvchat.store.store import SessionInfo

OUTCOMES = {
    "same": "answers as recorded",
    "recorded": "recorded",
    "differs": "answers otherwise than recorded",
    "no answer": "gives no answer",
    "not asked": "not asked",
}
Rows = list[dict[str, Any]]

app = typer.Typer()


@app.command(epilog=examples("kvchat verify", "kvchat verify trip --deep", "kvchat verify --repair --json"))
@command
def verify(
    flags: ModelFlags,
    name: Annotated[str | None, typer.Argument(help="The session; without it all.")] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Load the model too, and compare a short answer with the recorded one.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Remove damaged KV and mend the search index.")] = False,
    as_json: Json = False,
) -> None:
    """Check all that is saved; exit code 1 if damaged."""
    from kvchat.cli.plain import write

    with cli_store.open_store(flags) as store:
        repaired = store.repair(name) if repair else []
        problems = store.verify(name)
        sessions = [store.session(name)] if name else store.sessions() if deep and not problems else []
    # With damage that is known, a session would be mended by opening it, not checked.
    asked = _ask(flags, sessions, name) if deep and not problems else []
    problems += [problem for row in asked for problem in row.pop("problems")]
    if as_json and (deep or repair):
        cli_store.print_json({"repaired": repaired, "problems": problems, "sessions": asked})
    elif as_json:
        cli_store.print_json(problems)
    else:
        answers = [f"{row['name']}: {OUTCOMES[row['outcome']]}{row['why']}" for row in asked]
        write("".join(f"{line}\n" for line in [*repaired, *answers, *(problems or ["no problems"])]))
    if problems:
        raise typer.Exit(1)


def _ask(flags: ModelFlags, sessions: list[SessionInfo], name: str | None) -> Rows:
    """Each session's answer to the probe; the models are loaded one after the other."""
    from kvchat.cli.plain import working

    rows: Rows = []
    models = sorted({session.model for session in sessions})
    for model in models:
        with working(flags) as (worker, status):
            for session in [session for session in sessions if session.model == model]:
                try:
                    with worker.open(session.name, model=flags.model, rebuild=flags.rebuild, create=False) as chat:
                        found = chat.check()
                        rows.append(
                            {"name": found.name, "outcome": found.outcome, "why": "", "problems": found.problems}
                        )
                except KVChatError as error:  # it is open elsewhere, or its model cannot be loaded
                    if name:
                        raise
                    why = f": {error}"
                    rows.append({"name": session.name, "outcome": "not asked", "why": why, "problems": ()})
                status.clear()
    return rows
