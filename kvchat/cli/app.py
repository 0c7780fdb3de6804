"""The command line: all commands, what the program does with none, and its exit codes.

Text goes to stdout, progress and notices to stderr. A user's mistake is one line on stderr and exit code 1.
torch and Textual are imported by the commands that need them, never to print help.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvchat.cipher import database_errors
from kvchat.cli import archive as cli_archive
from kvchat.cli import attach as cli_attach
from kvchat.cli import chat as cli_chat
from kvchat.cli import config as cli_config
from kvchat.cli import crypt as cli_crypt
from kvchat.cli import episodes as cli_episodes
from kvchat.cli import eval as cli_eval
from kvchat.cli import far as cli_far
from kvchat.cli import fit as cli_fit
from kvchat.cli import listing as cli_list
from kvchat.cli import notes as cli_notes
from kvchat.cli import select as cli_select
from kvchat.cli import settings as cli_settings
from kvchat.cli import show as cli_show
from kvchat.cli import stats as cli_stats
from kvchat.cli import store as cli_store
from kvchat.cli import take_in as cli_import
from kvchat.cli import tune as cli_tune
from kvchat.cli import verify as cli_verify
from kvchat.cli.flags import USAGE_ERROR, Json, ModelFlags, WorkerFactory, command, examples
from kvchat.cli.groups import Sections
from kvchat.errors import KVChatError

EXIT_CODES = {
    0: "done",
    1: "it could not be done, or `verify` or `doctor` found something wrong",
    2: "the command line is wrong",
    130: "stopped with Ctrl+C; what was said until then is kept",
    143: "ended by SIGTERM; 129 by SIGHUP: the terminal went away",
}
SPINS = 5000
"""Rounds that threads of a computation wait awake for each other. GNU's OpenMP takes 300,000: where other programs want
the cores too, each of the many small steps of a token then waits a time slice. Of the built-in model on 2 cores: 24
tokens/s alone with both, beside two busy programs 8 in place of 3.5."""
FRAMES_A_SECOND = 120
"""At most, of the screen. Textual paints at fixed moments, and leaves one out after a frame that took longer than from
one to the next: at its own 60 a key would wait for up to 33 ms until its frame begins."""
ABOUT = "\n\n".join(
    (
        examples(
            "kvchat",
            "kvchat -c",
            'kvchat ask trip "Where did we stay in Rome?"',
            "git diff | kvchat ask review -",
            "kvchat search Rome --json",
        ),
        "\n".join(("\b", "Exit codes:", *(f"  {code:3}  {meaning}" for code, meaning in EXIT_CODES.items()))),
        "Without a command the chat screen opens, on the session used last. `kvchat COMMAND --help` says more.",
    )
)

app = typer.Typer(
    help="Long conversations with a local language model, resumed without computing them again.",
    epilog=ABOUT,
    cls=Sections,
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None, worker: WorkerFactory | None = None) -> int:
    """Run one command line; the exit code. `worker` stands in for the real worker in tests."""
    shared = {"factory": worker} if worker else {}
    os.environ.setdefault("TEXTUAL_FPS", str(FRAMES_A_SECOND))  # which is read when Textual is imported
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))  # when torch is
    try:
        code = program().main(args=argv, prog_name="kvchat", standalone_mode=False, obj=shared)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 1
    except USAGE_ERROR as error:
        return _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    except Exception as error:
        if os.environ.get("KVCHAT_DEBUG"):
            raise
        return _fail(_one_line(error), 1)


@cache
def program() -> Any:
    """All commands and their options; making them takes as long as a short command runs."""
    return typer.main.get_command(app)


def _fail(message: str, code: int) -> int:
    from kvchat.terminal import neutralise

    print("kvchat:", neutralise(" ".join(message.split())), file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    """What went wrong, for the user; our own mistakes are said to be ours."""
    if isinstance(error, KVChatError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, database_errors()):
        return f"the store cannot be used: {error}"
    kind = type(error).__name__
    return f"internal error: {kind}: {error} (set KVCHAT_DEBUG=1 for the traceback)"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kvchat {version('kvchat')}")
        raise typer.Exit


@app.callback()
@command
def start(
    context: typer.Context,
    flags: ModelFlags,
    last: cli_chat.Last = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        cli_chat.begin(flags)
    elif last:
        raise USAGE_ERROR(f"--continue stands after the command: kvchat {context.invoked_subcommand} --continue")
    else:
        context.obj.update(vars(flags))


@app.command(
    short_help="Measure speed and size on this machine.",
    epilog=examples("kvchat bench resume", "kvchat bench decode --tokens 2000 --rounds 3 --json"),
)
@command
def bench(
    flags: ModelFlags,
    kind: Annotated[
        Literal["all", "resume", "decode", "prefill", "store", "memory", "recall", "seal", "gpu", "tiers", "tui"],
        typer.Argument(help="What to measure."),
    ] = "all",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the history (6000; gpu 65536; tiers, tui 2000).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 5,
    messages: Annotated[list[Path] | None, typer.Option(help="A conversation as the history; tiers: several.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine; the last line on stdout is one JSON object."""
    from kvchat import bench as benchmark
    from kvchat import transcript
    from kvchat.cli.plain import Status
    from kvchat.terminal import to_json

    histories = [transcript.read(file) for file in messages or ()]
    status = Status()
    try:
        figures = benchmark.run(kind, flags.settings(), status, tokens, rounds, next(iter(histories), None), histories)
    finally:
        status.clear()
    if not as_json:
        cli_store.print_table(list(benchmark.rows(figures)), sys.stderr)
    print(to_json(figures))


@app.command(epilog=examples("kvchat models", "kvchat models --json"))
@command
def models(flags: ModelFlags, as_json: Json = False) -> None:
    """Models that are ready without a network, and the built-in one."""
    from kvchat.cli import doctor

    rows = doctor.models()
    if as_json:
        cli_store.print_json(rows)
    else:
        cli_store.print_table(rows)


@app.command("doctor", epilog=examples("kvchat doctor", "kvchat doctor --json"))
@command
def doctor_(flags: ModelFlags, as_json: Json = False) -> None:
    """Check versions, device, attention, store and disk."""
    from kvchat.cli import doctor

    checks = doctor.checks(flags.settings())
    if as_json:
        cli_store.print_json(checks)
    else:
        cli_store.print_table(checks)
    if any(check["state"] == "fail" for check in checks):
        raise typer.Exit(1)


app.add_typer(cli_chat.app)
app.add_typer(cli_attach.app)
app.add_typer(cli_import.app)
app.add_typer(cli_list.app)
app.add_typer(cli_store.app)
app.add_typer(cli_notes.app)
app.add_typer(cli_show.app)
app.add_typer(cli_stats.app)
app.add_typer(cli_settings.app)
app.add_typer(cli_config.app)
app.add_typer(cli_verify.app)
app.add_typer(cli_archive.app)
app.add_typer(cli_crypt.app)
cli_eval.app.add_typer(cli_far.app)
cli_eval.app.add_typer(cli_select.app)
app.add_typer(cli_episodes.app)
app.add_typer(cli_eval.app, name="eval", short_help="Measure what compression costs in quality.")
app.add_typer(cli_fit.app, name="fit", short_help="Fit a learned scorer to the model.")
app.add_typer(cli_tune.app)

if __name__ == "__main__":
    sys.exit(main())
