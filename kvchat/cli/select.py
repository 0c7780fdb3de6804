"""`kvchat eval select`: how often the turns that a question concerns are found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.cli.store import print_json, print_table

app = typer.Typer()


@app.command(
    short_help="How often the turns with the evidence are found.",
    epilog=examples("kvchat eval select locomo.json --by recency,text --json"),
)
@command
def select(
    flags: ModelFlags,
    files: Annotated[list[Path], typer.Argument(help="LoCoMo's files.")],
    by: Annotated[str, typer.Option(help="Selectors: NAME, A+B or NAME:EMBEDDER, with commas.")] = (
        "recency,text,embedding,text+embedding"
    ),
    as_json: Json = False,
) -> None:
    """How often the segment with a question's evidence is found, of all conversations as one; nothing is computed."""
    from kvchat.cli.plain import Status
    from kvchat.engine import Engine
    from kvchat.evals.cases import read
    from kvchat.evals.selecting import select
    from kvchat.model import load

    config, status, cases = flags.settings(), Status(), [read(file) for file in files]
    names = [name.strip() for name in by.split(",")]
    try:
        engine = Engine(load(config.model, status), config.model.prefill_chunk_size)
        rows = select(engine, config, cases, names, status)
    finally:
        status.clear()
    if as_json:
        print_json(rows)
        return
    print_table(
        [{key: f"{cell:.3f}" if isinstance(cell, float) else cell for key, cell in row.items()} for row in rows]
    )
