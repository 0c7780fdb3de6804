"""The command line. Commands that run the model stand here; those that only read the store are in cli_store.py.

Text goes to stdout, progress and notices to stderr. A user's mistake is one line on stderr and exit code 1.
torch and Textual are imported by the commands that need them, never to print help.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvchat import (
    cli_archive,
    cli_attach,
    cli_crypt,
    cli_episodes,
    cli_eval,
    cli_far,
    cli_fit,
    cli_import,
    cli_list,
    cli_notes,
    cli_select,
    cli_settings,
    cli_stats,
    cli_store,
    cli_tune,
    cli_verify,
)
from kvchat.cipher import database_errors
from kvchat.errors import InputError, KVChatError, SessionExists
from kvchat.flags import Json, ModelFlags, WorkerFactory, command

USAGE_ERROR: type[Exception] = typer.BadParameter.__base__ or Exception  # typer does not export the class itself
Name = Annotated[str, typer.Argument(help="The session.", show_default=False)]

app = typer.Typer(
    help="Long conversations with a local language model, resumed without computing them again.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: list[str] | None = None, worker: WorkerFactory | None = None) -> int:
    """Run one command line; the exit code. `worker` stands in for the real worker in tests."""
    program = typer.main.get_command(app)
    shared = {"factory": worker} if worker else {}
    try:
        code = program.main(args=argv, prog_name="kvchat", standalone_mode=False, obj=shared)
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
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        _chat(flags)
    else:
        context.obj.update(vars(flags))


@app.command()
@command
def chat(
    flags: ModelFlags,
    name: Annotated[str | None, typer.Argument(help="The session; without it the last one.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Read lines and print answers, without a screen.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt of a new session.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Begin a new session.")] = False,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of older turns' KV to hold in memory, for this run.")
    ] = None,
) -> None:
    """Chat on the screen: resume a session or begin one."""
    if keep is not None:
        flags = replace(flags, set=[*(flags.set or ()), f"compress.keep_ratio={keep}"])
    _chat(flags, name, plain=plain, system=system, new=new)


def _chat(
    flags: ModelFlags, name: str | None = None, *, plain: bool = False, system: str | None = None, new: bool = False
) -> None:
    if new:
        name = _new_name(flags, name)
    if plain or not (sys.stdin.isatty() and sys.stdout.isatty()):
        from kvchat import plain as terminal

        with terminal.opened(flags, name, system=system) as (_, session, status):
            terminal.chat(session, status)
            session.settle()
        return
    from kvchat import tui

    tui.run(flags.connect(), flags.settings(), name, system=system, model=flags.model, rebuild=flags.rebuild)


def _new_name(flags: ModelFlags, name: str | None) -> str:
    """`name` or one made from the time, known to be free."""
    from datetime import datetime

    taken = cli_store.names(flags)
    if name in taken:
        raise SessionExists(f"a session named {name!r} is there already; leave --new out to go on with it")
    return name or datetime.now().strftime("%Y-%m-%d %H.%M.%S")


@app.command()
@command
def ask(
    flags: ModelFlags,
    name: Annotated[str, typer.Argument(help="The session; it is created if there is none.")],
    text: Annotated[str, typer.Argument(help="The message; - reads it from stdin.")],
    as_json: Json = False,
) -> None:
    """Ask one question and print the answer."""
    from kvchat import plain
    from kvchat.transcript import check_text

    message = check_text(_stdin() if text == "-" else text)
    with plain.opened(flags, name) as (_, session, status):
        with plain.interruptible(session):
            done = plain.show_turn(session.send(message), status, quiet=as_json)
        reply = done.to_dict() | {"session": session.name}
        reply["timings"]["seal_s"] = session.settle()
    if as_json:
        print(json.dumps(reply, ensure_ascii=False))
    else:
        plain.say(plain.summary(done))
    if done.finish_reason == "interrupted":
        raise typer.Exit(130)


def _stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text: byte {error.start} cannot be read") from None


@app.command()
@command
def bench(
    flags: ModelFlags,
    kind: Annotated[
        Literal["all", "resume", "decode", "prefill", "store", "memory", "recall", "seal", "gpu", "tiers"],
        typer.Argument(help="What to measure."),
    ] = "all",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the history (6000; gpu 65536; tiers 2000).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 5,
    messages: Annotated[list[Path] | None, typer.Option(help="A conversation as the history; tiers: several.")] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine; the last line on stdout is one JSON object."""
    from kvchat import bench as benchmark
    from kvchat import transcript
    from kvchat.plain import Status

    histories = [transcript.read(file) for file in messages or ()]
    status = Status()
    try:
        figures = benchmark.run(kind, flags.settings(), status, tokens, rounds, next(iter(histories), None), histories)
    finally:
        status.clear()
    if not as_json:
        cli_store.print_table(list(benchmark.rows(figures)), sys.stderr)
    print(json.dumps(figures, ensure_ascii=False))


@app.command()
@command
def models(flags: ModelFlags, as_json: Json = False) -> None:
    """Models that are ready without a network, and the built-in one."""
    from kvchat import doctor

    rows = doctor.models()
    if as_json:
        cli_store.print_json(rows)
    else:
        cli_store.print_table(rows)


@app.command("doctor")
@command
def doctor_(flags: ModelFlags, as_json: Json = False) -> None:
    """Check versions, device, attention, store and disk."""
    from kvchat import doctor

    checks = doctor.checks(flags.settings())
    if as_json:
        cli_store.print_json(checks)
    else:
        cli_store.print_table(checks)
    if any(check["state"] == "fail" for check in checks):
        raise typer.Exit(1)


app.add_typer(cli_attach.app)
app.add_typer(cli_import.app)
app.add_typer(cli_list.app)
app.add_typer(cli_store.app)
app.add_typer(cli_notes.app)
app.add_typer(cli_stats.app)
app.add_typer(cli_settings.app)
app.add_typer(cli_verify.app)
app.add_typer(cli_archive.app)
app.add_typer(cli_crypt.app)
cli_eval.app.add_typer(cli_far.app)
cli_eval.app.add_typer(cli_select.app)
app.add_typer(cli_episodes.app)
app.add_typer(cli_eval.app, name="eval")
app.add_typer(cli_fit.app, name="fit")
app.add_typer(cli_tune.app)

if __name__ == "__main__":
    sys.exit(main())
