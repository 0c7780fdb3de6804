"""`kvchat fit`: learned scorers fitted to this model, from conversations like those it is to hold."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvchat.cli.flags import ModelFlags, command, examples
from kvchat.cli.store import open_store, print_json, print_table, spoken
from kvchat.errors import InputError

if TYPE_CHECKING:
    from kvchat.evals.cases import Case
    from kvchat.fitting.fit import Fitted, Fitting

app = typer.Typer(
    help="Fit a learned scorer to the model, and measure it on conversations held out. A stopped fit goes on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Files = Annotated[
    list[Path] | None, typer.Argument(help="Conversations: messages as JSON, or LoCoMo's files.", show_default=False)
]
Seed = Annotated[int, typer.Option(min=0, help="What is drawn depends on it.")]


@dataclass(frozen=True)
class FitFlags(ModelFlags):
    """What every fit takes."""

    session: Annotated[list[str] | None, typer.Option(help="A session of the store; may be given again.")] = None
    tokens: Annotated[int | None, typer.Option(min=1, help="Use so many tokens of each conversation at most.")] = None
    held_out: Annotated[
        int, typer.Option(min=1, help="Conversations held out, the last ones; of a single one its last quarter.")
    ] = 1
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever was collected or fitted.")] = False
    work: Annotated[Path | None, typer.Option(help="Folder for what is collected, which then stays there.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False


@app.command(
    short_help="Fit the scorer `gate`: KVzip's scores without a pass.",
    epilog=examples("kvchat fit gate chat.json", "kvchat fit gate --session trip --form best --json"),
)
@command
def gate(
    flags: FitFlags,
    files: Files = None,
    form: Annotated[
        Literal["ridge", "small", "best"],
        typer.Option(help="Ridge regression (KVzap), the small gate of Fast KVzip, or the better of both."),
    ] = "ridge",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the small gate, in each layer.")] = 500,
    seed: Seed = 0,
) -> None:
    """Fit the scorer `gate`: KVzip's scores foretold from what enters attention, with no pass."""
    _run(flags, files or [], lambda fitting, cases: fitting.gate(cases, flags.held_out, form, steps, seed))


@app.command(
    short_help="Fit the scorer `kvp`: what later turns will read.",
    epilog=examples("kvchat fit kvp chat.json --steps 100 --plot kvp.png"),
)
@command
def kvp(
    flags: FitFlags,
    files: Files = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps, of one segment each.")] = 300,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each head's policy.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate.")] = 3e-3,
    drawn: Annotated[bool, typer.Option("--drawn", help="Estimate gradients from orders drawn, as the paper.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the held-out figures to this file, as in kvp.png.")] = None,
    seed: Seed = 0,
) -> None:
    """Fit the scorer `kvp`: policies that say from keys and values what later turns will read."""
    from kvchat.evals.plot import require_matplotlib

    if plot:
        require_matplotlib()

    def fit(fitting: Fitting, cases: Sequence[Case]) -> Fitted:
        from kvchat.fitting.policies import Plan

        return fitting.kvp(cases, flags.held_out, Plan(steps, hidden, rate, drawn=drawn, seed=seed))

    rows = _run(flags, files or [], fit)
    if plot:
        from kvchat.fitting.figures import draw

        draw(rows, plot)


def _run(
    flags: FitFlags, files: Sequence[Path], fit: Callable[[Fitting, Sequence[Case]], Fitted]
) -> list[dict[str, Any]]:
    """Read conversations, fit, say what held-out ones say and where the weights are; the rows of the table."""
    from kvchat.cli.plain import Status, say
    from kvchat.engine import Engine
    from kvchat.evals.cases import read
    from kvchat.evals.grid import shortened
    from kvchat.fitting.fit import Fitting
    from kvchat.model import load

    cases = [*map(read, files), *_sessions(flags)]
    if not cases:
        raise InputError("there is nothing to learn from; give a file, or --session NAME")
    config, status = flags.settings(), Status()
    try:
        engine = Engine(load(config.model, status), config.model.prefill_chunk_size, config.model.residence)
        if flags.tokens:
            cases = [shortened(engine, case, flags.tokens) for case in cases]
        fitting = Fitting(engine, config, status, flags.work)
        if flags.fresh:
            fitting.forget()
        fitted = fit(fitting, cases)
    finally:
        status.clear()
    if flags.as_json:
        about = {"file": str(fitted.file), "segments": fitted.trained, "held_out": fitted.held_out}
        print_json({**about, "figures": fitted.rows})
    else:
        print_table(fitted.rows)
        sys.stdout.flush()
    say(f"fitted to {fitted.trained} segments, measured on {fitted.held_out} others; written to {fitted.file}")
    return fitted.rows


def _sessions(flags: FitFlags) -> list[Case]:
    """The sessions that the flags name."""
    from kvchat.cli.plain import say
    from kvchat.evals.cases import of_messages

    if not flags.session:
        return []
    with open_store(flags) as store:
        paths = {name: spoken(store.path(store.session(name).tip)) for name in flags.session}
    if flags.key:
        say("the store is encrypted; what is collected from it for the fit is not")
    return [
        of_messages(name, [{"role": message.role, "content": message.content} for message in path])
        for name, path in paths.items()
    ]
