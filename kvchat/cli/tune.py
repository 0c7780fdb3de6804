"""`kvchat tune`: how much of the budget each layer gets, searched on this machine's own conversations."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.cli.store import print_json, print_table

app = typer.Typer()


@dataclass(frozen=True)
class TuneFlags(ModelFlags):
    """What is tuned."""

    scorer: Annotated[str | None, typer.Option(help="NAME or NAME.AGGREGATE, as in snapkv.")] = None
    keep: Annotated[float | None, typer.Option(help="Fraction of the pairs kept.")] = None

    def _overrides(self) -> dict[str, Any]:
        from kvchat.evals.scored import named

        given: dict[str, Any] = {} if self.keep is None else {"compress.keep_ratio": self.keep}
        if self.scorer:
            scorer, aggregate = named(self.scorer)
            given |= {"compress.scorer": scorer, "compress.aggregate": aggregate}
        return super()._overrides() | given


@app.command(
    short_help="Search how much of the budget each layer gets.",
    epilog=examples("kvchat tune chat.json other.json --keep 0.2", "kvchat tune chat.json --sensitivity --json"),
)
@command
def tune(
    flags: TuneFlags,
    files: Annotated[list[Path], typer.Argument(help="Conversations: messages as JSON, or LoCoMo's files.")],
    generations: Annotated[int, typer.Option(min=1, help="Of each group of layers.")] = 10,
    group: Annotated[int, typer.Option(min=1, help="Neighbouring layers searched together.")] = 8,
    tokens: Annotated[int | None, typer.Option(min=1, help="Use so many tokens of each conversation at most.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions to each conversation.")] = 12,
    step: Annotated[int, typer.Option(min=1, help="Turns fed at once; more is faster.")] = 4,
    seed: Annotated[int, typer.Option(help="What is asked and tried depends on it.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever an earlier run has found.")] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure how much layers depend on far tokens instead, in seconds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search how much of the budget each layer gets (EvolKV), for compress.allocate = "evolved".

    All files but the last are learned from, the last is held out; of one alone, half of the questions. A stopped search
    goes on with the same command. With --sensitivity (EpiCache) it is measured on the first file instead, for
    compress.allocate = "sensitivity"; --tokens says on how much of it.
    """
    if sensitivity:
        _measure(flags, files[0], tokens, as_json)
        return
    from kvchat.cli.plain import Status
    from kvchat.compress.evolve import require_cmaes
    from kvchat.engine import Engine
    from kvchat.evals.cases import read, spread
    from kvchat.evals.grid import shortened
    from kvchat.evals.tuning import Plan, settled, tune
    from kvchat.model import load

    require_cmaes()  # what is missing is said before the model is loaded
    config, cases, status = settled(flags.settings()), [read(file) for file in files], Status()
    try:
        engine = Engine(load(config.model, status), config.model.prefill_chunk_size, config.model.residence)
        if tokens:
            cases = [shortened(engine, case, tokens) for case in cases]
        cases = [spread(case, [1.0], questions, seed) for case in cases]
        tuned = tune(engine, config, cases, Plan(generations, group, seed, step), status, fresh)
    finally:
        status.clear()
    if as_json:
        print_json({"shares": tuned.shares, "file": str(tuned.file), "compared": tuned.rows})
        return
    print_table([{name: _text(value) for name, value in row.items()} for row in tuned.rows])
    print(f"written to {tuned.file}; --set compress.allocate=evolved uses it", file=sys.stderr)


def _measure(flags: TuneFlags, file: Path, tokens: int | None, as_json: bool) -> None:
    """Measure the layers' sensitivity, write the shares that follow, and print both."""
    from kvchat.cli.plain import Status
    from kvchat.engine import Engine
    from kvchat.evals.cases import read
    from kvchat.evals.selecting import as_one
    from kvchat.evals.sensitivity import shares_of, similarities
    from kvchat.learned import save_shares
    from kvchat.model import load

    config, case, status = flags.settings(), read(file), Status()
    try:
        engine = Engine(load(config.model, status), config.model.prefill_chunk_size)
        ids = [token for message in as_one(engine, [case])[0] for token in message.token_ids]
        ids = ids[: min(tokens or 16_000, engine.model.context_window)]
        sigmas = similarities(engine, ids, min(4096, len(ids) // 4), status)
    finally:
        status.clear()
    shares = shares_of(sigmas)
    path = save_shares(engine.model, config.compress, shares, "sensitivity")
    rows = [{"layer": at, "sigma": sigma, "share": shares[at]} for at, sigma in enumerate(sigmas)]
    if as_json:
        print_json({"layers": rows, "file": str(path)})
        return
    print_table([{name: _text(value) for name, value in row.items()} for row in rows])
    print(f"written to {path}; --set compress.allocate=sensitivity uses it", file=sys.stderr)


def _text(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
