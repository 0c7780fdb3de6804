"""`kvchat eval far`, `work` and `rebase`: a session without end, what it remembers and what it costs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvchat.cli.eval import Files, GridFlags, RunFlags, Seed, loaded, number, parts, run_grid, show_lines
from kvchat.cli.flags import command, examples

if TYPE_CHECKING:
    from kvchat.evals.steady import Span

app = typer.Typer()


@dataclass(frozen=True)
class FarFlags(GridFlags):
    """The cells of a session without end."""

    methods: Annotated[str, typer.Option(help="What is fed, as for the other commands.")] = "session"
    keep: Annotated[str, typer.Option(help="Fractions of the pairs kept, as far as the cap has room.")] = "1"


@app.command(
    short_help="Facts planted thousands of tokens back.",
    epilog=examples("kvchat eval far chat.json --cap 4096 --distances 5000,20000"),
)
@command
def far(
    flags: FarFlags,
    files: Files,
    distances: Annotated[str, typer.Option(help="Tokens between facts and the end.")] = "5000,20000,100000,200000",
    facts: Annotated[int, typer.Option(min=1, help="Facts planted at each distance.")] = 12,
    every: Annotated[int, typer.Option(min=1, help="Tokens after which memory and time are told.")] = 10_000,
    seed: Seed = 0,
) -> None:
    """Facts planted thousands of tokens back: all conversations in one session, memory and time along the way."""
    from kvchat.evals.far import Far, Plan, joined, plant
    from kvchat.evals.far_report import markdown

    places = [number(text, int) for text in parts(distances)]

    def tell(span: Span) -> None:
        print(json.dumps(asdict(span)), file=sys.stderr if flags.as_json else sys.stdout, flush=True)

    make = partial(Far, plan=Plan(every, seed), tell=tell)
    run_grid("far", flags, files, lambda engine, case: plant(engine, case, places, facts, seed), make, markdown, joined)


@app.command(short_help="What a turn more costs.", epilog=examples("kvchat eval work chat.json --at 0.5,1"))
@command
def work(
    flags: GridFlags,
    files: Files,
    at: Annotated[str, typer.Option(help="After which fractions of the turns.")] = "0.25,0.5,0.75,1",
) -> None:
    """What a turn more costs: tokens of forward passes for it, and more until a question can be asked."""
    from kvchat.evals.cases import read
    from kvchat.evals.far_report import table
    from kvchat.evals.grid import METHODS, shortened
    from kvchat.evals.work import added

    config, cases = flags.settings(), [read(file) for file in files]
    settings, fractions, rows = flags.cells(config), [number(text, float) for text in parts(at)], []
    with loaded(config) as (engine, _):
        for case in [shortened(engine, case, flags.tokens) for case in cases] if flags.tokens else cases:
            probes = sorted({max(1, round(len(case.turns) * fraction)) for fraction in fractions})
            for setting in settings:
                settled = config.replaced(dict(setting.values))
                named = {"case": case.name, "method": setting.method, "settings": dict(setting.values)}
                found = added(engine, settled, METHODS[setting.method], case, probes)
                rows += [{**named, **asdict(one), "in all": one.all} for one in found]
    out = str(flags.out or "eval-work")
    Path(f"{out}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    show_lines(rows, f"{table(rows)}\n", flags.as_json)


@app.command(
    short_help="Perplexity with re-bases against that without.",
    epilog=examples("kvchat eval rebase chat.json --window 4096 --cap 1024"),
)
@command
def rebase(
    flags: RunFlags,
    files: Files,
    window: Annotated[int, typer.Option(help="Positions that the model is taken to have.")] = 4096,
    cap: Annotated[int, typer.Option(min=1, help="Rows a head that all KV may take, on average.")] = 1024,
) -> None:
    """Perplexity of the next replies with re-bases against that without: a smaller window against the model's own."""
    from kvchat.evals.cases import read
    from kvchat.evals.far_report import table
    from kvchat.evals.grid import shortened
    from kvchat.evals.rebasing import costs

    given = {"compress.kv_budget": f"{cap} rows", "recall.by": "off"}
    config, cases, found = flags.settings().replaced(given), [read(file) for file in files], []
    with loaded(config) as (engine, _):
        for case in cases:
            fitted = shortened(engine, case, flags.tokens) if flags.tokens else case
            found += [{"case": case.name, **asdict(cost)} for cost in costs(engine, config, fitted, window)]
    out = str(flags.out or "eval-rebase")
    Path(f"{out}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    show_lines(found, f"{table(found)}\n", flags.as_json)
