"""`kvchat eval select`: how often the turns that a question concerns are found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvchat.cli.eval import number, parts
from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.cli.store import print_json, print_table

app = typer.Typer()


@app.command(
    short_help="How often the turns with the evidence are found.",
    epilog=examples(
        "kvchat eval select locomo.json --by recency,text --json",
        "kvchat eval select locomo.json --by text,text+embedding:minilm --facts 4 --distances 500,2000",
    ),
)
@command
def select(
    flags: ModelFlags,
    files: Annotated[list[Path], typer.Argument(help="LoCoMo's files; with --facts any conversations.")],
    by: Annotated[str, typer.Option(help="Selectors: NAME, A+B or NAME:EMBEDDER, with commas.")] = (
        "recency,text,embedding,text+embedding"
    ),
    facts: Annotated[int, typer.Option(min=0, help="Facts planted at each distance and asked; 0: their own.")] = 0,
    distances: Annotated[str, typer.Option(help="Tokens between facts and the end.")] = "5000,20000,100000,200000",
    seed: Annotated[int, typer.Option(help="Draws the facts.")] = 0,
    as_json: Json = False,
) -> None:
    """How often the turn with a question's evidence is found, of all conversations as one; nothing is computed.

    The questions are LoCoMo's, or ask for facts that are planted first, as in eval far.
    """
    from kvchat.cli.plain import Status
    from kvchat.engine import Engine
    from kvchat.evals.cases import read
    from kvchat.evals.far import joined, plant
    from kvchat.evals.selecting import select
    from kvchat.model import load

    config, status, cases = flags.settings(), Status(), [read(file) for file in files]
    names = [name.strip() for name in by.split(",")]
    try:
        engine = Engine(load(config.model, status), config.model.prefill_chunk_size)
        if facts:
            cases = [plant(engine, joined(cases), [number(text, int) for text in parts(distances)], facts, seed)]
        rows = select(engine, config, cases, names, status)
    finally:
        status.clear()
    if as_json:
        print_json(rows)
        return
    print_table(
        [{key: f"{cell:.3f}" if isinstance(cell, float) else cell for key, cell in row.items()} for row in rows]
    )
