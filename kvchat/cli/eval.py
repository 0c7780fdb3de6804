"""`kvchat eval`: what compression costs in quality, measured on this machine's own conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kvchat.cli.flags import Json, ModelFlags, StoreFlags, command, examples
from kvchat.errors import InputError

if TYPE_CHECKING:
    from kvchat.cli.plain import Status
    from kvchat.config import Config
    from kvchat.engine import Engine
    from kvchat.evals.cases import Case
    from kvchat.evals.grid import Grid, Line, Setting

app = typer.Typer(
    help="Measure what compression costs in quality: a grid of settings over conversations. A stopped run goes on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Number = TypeVar("Number", int, float)
Files = Annotated[list[Path], typer.Argument(help="Conversations: messages as JSON, or LoCoMo's files.")]
Seed = Annotated[int, typer.Option(help="What is asked and planted depends on it.")]


@dataclass(frozen=True)
class RunFlags(ModelFlags):
    """What every evaluation takes: how much it reads, and where results go."""

    tokens: Annotated[int | None, typer.Option(min=1, help="Use so many tokens of each conversation at most.")] = None
    step: Annotated[int, typer.Option(min=1, help="Turns fed at once; more is faster.")] = 1
    out: Annotated[Path | None, typer.Option(help="Results, without suffix: OUT.jsonl, OUT.md, OUT.png.")] = None
    plot: Annotated[bool, typer.Option("--plot", help="Draw quality against bytes; needs matplotlib.")] = False
    as_json: Json = False


@dataclass(frozen=True)
class GridFlags(RunFlags):
    """The cells of a grid."""

    methods: Annotated[
        str, typer.Option(help="session (kvchat), full, window, recompress[-snapkv], one-shot, epicache.")
    ] = "full,session"
    keep: Annotated[str, typer.Option(help="Fractions of the pairs kept, as in 1,0.5,0.3.")] = "1,0.5,0.3"
    codecs: Annotated[str | None, typer.Option(help="As in raw,k8v8; a+b is one for each interval of ranks.")] = None
    scorers: Annotated[str | None, typer.Option(help="Scorers of the session, as in kvzip,random.")] = None
    segment_min: Annotated[str | None, typer.Option(help="Tokens until a segment is sealed.")] = None
    recent_tokens: Annotated[str | None, typer.Option(help="Newest tokens that hold everything.")] = None
    vary: Annotated[list[str] | None, typer.Option(metavar="SECTION.KEY=A,B", help="Values of any setting.")] = None
    cap: Annotated[int | None, typer.Option(min=1, help="Rows a head that all KV may take, on average.")] = None

    def _overrides(self) -> dict[str, Any]:
        return super()._overrides() | ({"compress.kv_budget": f"{self.cap} rows"} if self.cap else {})

    def cells(self, config: Config) -> list[Setting]:
        """Every method under every combination of values."""
        from kvchat.evals.grid import settings_of

        return settings_of(parts(self.methods), self._grid(), config)

    def _grid(self) -> dict[str, list[Any]]:
        """The values of each setting that varies."""
        given = {
            "compress.keep_ratio": self.keep,
            "codec.name": self.codecs,
            "compress.scorer": self.scorers,
            "compress.segment_min": self.segment_min,
            "compress.recent_tokens": self.recent_tokens,
        }
        for text in self.vary or ():
            key, found, values = text.partition("=")
            if not found:
                raise InputError(f"--vary {text}: write it as section.key=value,value")
            given[key.strip()] = values
        read = {key: str if key == "recall.by" else value for key in given}  # of which a+b is one value, and text
        return {key: [read[key](text) for text in parts(texts)] for key, texts in given.items() if texts}


@dataclass(frozen=True)
class ChoiceFlags(RunFlags):
    """The cells of a choice."""

    scorers: Annotated[str, typer.Option(help="NAME or NAME.AGGREGATE, as in kvzip,snapkv.defensive.")] = "kvzip,snapkv"
    allocate: Annotated[str, typer.Option(help="Values of compress.allocate.")] = "global,layer,uniform,pyramid"
    keep: Annotated[str, typer.Option(help="Fractions of the pairs kept.")] = "0.5,0.3,0.2,0.1"
    coverage: Annotated[str, typer.Option(help="In their place, with coverage: parts of the mass.")] = "0.9,0.95,0.99"

    def cells(self, config: Config) -> list[Setting]:
        """Every scorer with every allocation at every amount."""
        from kvchat.evals.choice import cells

        keeps, coverages = ([number(text, float) for text in parts(texts)] for texts in (self.keep, self.coverage))
        return cells(parts(self.scorers), parts(self.allocate), keeps, coverages, config)


@app.command(
    short_help="Distance from the full cache.",
    epilog=examples(
        "kvchat eval fidelity chat.json", "kvchat eval fidelity chat.json --keep 1,0.5,0.3 --codecs raw,k8v8 --plot"
    ),
)
@command
def fidelity(
    flags: GridFlags,
    files: Files,
    at: Annotated[str, typer.Option(help="Where questions are asked, as fractions of the turns.")] = "0.5,1",
    questions: Annotated[int, typer.Option(min=1, help="Questions at each such turn.")] = 12,
    seed: Seed = 0,
) -> None:
    """Distance from the full cache: KL, agreement and log-probability on its own greedy answers."""
    from kvchat.evals.cases import spread

    where = [number(text, float) for text in parts(at)]
    run_grid("fidelity", flags, files, lambda _, case: spread(case, where, questions, seed))


@app.command(
    short_help="As fidelity, of ways to choose what is kept.",
    epilog=examples("kvchat eval choice chat.json --scorers kvzip,snapkv.defensive --keep 0.3,0.2"),
)
@command
def choice(
    flags: ChoiceFlags,
    files: Files,
    questions: Annotated[int, typer.Option(min=1, help="Questions after the last turn.")] = 12,
    seed: Seed = 0,
) -> None:
    """As fidelity, of ways to choose what is kept, all on one prefill: quick, and nothing is evicted before the end."""
    from kvchat.evals.cases import spread
    from kvchat.evals.choice import Choice

    run_grid("choice", flags, files, lambda _, case: spread(case, [1.0], questions, seed), Choice)


@app.command(
    short_help="Planted facts, asked many turns later.",
    epilog=examples("kvchat eval recall chat.json --distances 5,20 --facts 8"),
)
@command
def recall(
    flags: GridFlags,
    files: Files,
    distances: Annotated[str, typer.Option(help="Turns between a fact and its question.")] = "5,20,50,100",
    facts: Annotated[int, typer.Option(min=1, help="Facts planted in each conversation.")] = 16,
    seed: Seed = 0,
) -> None:
    """Facts planted among the turns of real conversations, asked many turns later: exact match."""
    from kvchat.evals.planted import plant

    far = [number(text, int) for text in parts(distances)]
    run_grid("recall", flags, files, lambda _, case: plant(case, far, facts, seed))


@app.command(
    short_help="LoCoMo's questions after the whole conversation.",
    epilog=examples("kvchat eval locomo locomo.json --questions 12"),
)
@command
def locomo(
    flags: GridFlags,
    files: Annotated[list[Path], typer.Argument(help="LoCoMo's files.")],
    questions: Annotated[int, typer.Option(min=1, help="Questions of each conversation.")] = 24,
    seed: Seed = 0,
) -> None:
    """LoCoMo's questions after the whole conversation: F1 and log-probability of the right answer."""
    from kvchat.evals.cases import spread

    def asked(_: Engine, case: Case) -> Case:
        if not any(question.answer for question in case.questions):
            raise InputError(f"{case.name} is no LoCoMo file: it has no questions with answers")
        return spread(case, [1.0], questions, seed)

    run_grid("locomo", flags, files, asked)


@app.command(
    epilog=examples(
        "kvchat eval report eval-fidelity.jsonl",
        "kvchat eval report eval-fidelity.jsonl eval-recall.jsonl --plot plot.png",
    )
)
@command
def report(
    flags: StoreFlags,
    files: Annotated[list[Path], typer.Argument(help="Files of results, OUT.jsonl of earlier runs.")],
    plot: Annotated[Path | None, typer.Option(help="Draw to this file, as in plot.png or plot.svg.")] = None,
    as_json: Json = False,
) -> None:
    """Print the table of earlier results, several files together."""
    from kvchat.evals.grid import read_lines
    from kvchat.evals.plot import draw
    from kvchat.evals.report import markdown

    lines = read_lines(files)
    if not lines:
        raise InputError("there are no results in these files")
    show_lines(lines, markdown(lines), as_json)
    if plot:
        draw(lines, plot)


def show_lines(lines: Sequence[Line], table: str, as_json: bool) -> None:
    """Results on stdout, as JSON or as their table."""
    from kvchat.cli.plain import write
    from kvchat.cli.store import print_json

    if as_json:
        print_json(list(lines))
    else:
        write(table)


def parts(text: str) -> list[str]:
    """What commas part."""
    return [part.strip() for part in text.split(",")]


def value(text: str) -> Any:
    """A number or truth value where it is one, else the text; a+b is a tuple."""
    several = text.split("+")
    if len(several) > 1:
        return tuple(value(part.strip()) for part in several)
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return text
    return found if isinstance(found, int | float) else text


def number(text: str, kind: type[Number]) -> Number:
    """Raises InputError for what is none."""
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None


@contextmanager
def loaded(config: Config) -> Iterator[tuple[Engine, Status]]:
    """The model, and where its progress is shown."""
    from kvchat.cli.plain import Status
    from kvchat.engine import Engine
    from kvchat.model import load

    status = Status()
    try:
        yield Engine(load(config.model, status), config.model.prefill_chunk_size, config.model.residence), status
    finally:
        status.clear()


def run_grid(
    task: str,
    flags: GridFlags | ChoiceFlags,
    files: Sequence[Path],
    prepare: Callable[[Engine, Case], Case],
    make: Callable[..., Grid] | None = None,
    show: Callable[[Sequence[Line]], str] | None = None,
    join: Callable[[Sequence[Case]], Case] | None = None,
) -> None:
    """Read cases, all `join`ed if that is given, run what `make` gives, write results and `show` them."""
    from kvchat.evals.cases import read
    from kvchat.evals.grid import Grid, mend, shortened
    from kvchat.evals.plot import draw, require_matplotlib
    from kvchat.evals.report import markdown

    config, cases = flags.settings(), [read(file) for file in files]
    cases, settings = [join(cases)] if join else cases, flags.cells(config)
    out = str(flags.out or f"eval-{task}")
    results = Path(f"{out}.jsonl")
    mend(results)  # what cannot be written or drawn is said before the model is loaded
    if flags.plot:
        require_matplotlib()
    with loaded(config) as (engine, status):
        if flags.tokens:
            cases = [shortened(engine, case, flags.tokens) for case in cases]
        runner = (make or Grid)(task, engine, config, results, status, flags.step)
        lines = runner.run([prepare(engine, case) for case in cases], settings)
    table = (show or markdown)(lines)
    Path(f"{out}.md").write_text(table, "utf-8")
    show_lines(lines, table, flags.as_json)
    if flags.plot:
        draw(lines, Path(f"{out}.png"))
