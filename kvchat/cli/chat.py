"""The commands that talk: `kvchat chat`, on the screen or in lines, and `kvchat ask`, one question and its answer."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from kvchat.cli import store as cli_store
from kvchat.cli.completion import session_names
from kvchat.cli.flags import USAGE_ERROR, Json, ModelFlags, command, examples
from kvchat.errors import InputError, SessionExists

if TYPE_CHECKING:
    from kvchat.events import TurnDone

STDIN = "-"
Last = Annotated[bool, typer.Option("--continue", "-c", help="Go on with the session that was used last.")]

app = typer.Typer()


@app.command(
    epilog=examples(
        "kvchat chat trip",
        'kvchat chat trip --system "Answer briefly." --keep 0.3',
        "kvchat chat -c --plain",
    )
)
@command
def chat(
    flags: ModelFlags,
    name: Annotated[
        str | None, typer.Argument(help="The session; without it the last one.", autocompletion=session_names)
    ] = None,
    last: Last = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Lines instead of a screen: for screen readers, pipes, simple terminals.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt of a new session.")] = None,
    new: Annotated[bool, typer.Option("--new", help="Begin a new session.")] = False,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of older turns' KV to hold in memory, for this run.")
    ] = None,
) -> None:
    """Chat on the screen: resume a session or begin one."""
    if last and (name is not None or new):
        raise USAGE_ERROR("--continue goes on with the last session; leave it out to name one or to begin one")
    if keep is not None:
        flags = replace(flags, set=[*(flags.set or ()), f"compress.keep_ratio={keep}"])
    begin(flags, name, plain=plain, system=system, new=new)


def begin(
    flags: ModelFlags, name: str | None = None, *, plain: bool = False, system: str | None = None, new: bool = False
) -> None:
    """Chat in session `name`, None = the last one, until the user leaves."""
    if new:
        name = _new_name(flags, name)
    if plain or not (sys.stdin.isatty() and sys.stdout.isatty()):
        from kvchat.cli import line_chat
        from kvchat.cli.plain import opened
        from kvchat.hangup import as_exit

        with as_exit(), opened(flags, name, lines=True, system=system) as (worker, session, status):
            line_chat.chat(worker, session, status)
        return
    from kvchat import tui

    tui.run(flags.connect(), flags.settings(), name, system=system, model=flags.model, rebuild=flags.rebuild)


def _new_name(flags: ModelFlags, name: str | None) -> str:
    """`name` or one made from the time, known to be free."""
    from datetime import datetime

    taken = cli_store.names(flags)
    if name in taken:
        raise SessionExists(f"a session named {name!r} is there already; leave --new out to go on with it")
    return name or datetime.now().strftime("%Y-%m-%d-%H%M%S")


@app.command(
    epilog=examples(
        'kvchat ask trip "Where did we stay in Rome?"',
        'kvchat ask -c "And the second night?" --json',
        "git diff | kvchat ask review -",
        'kvchat ask review "Explain this:" - < notes.txt',
    )
)
@command
def ask(
    flags: ModelFlags,
    name: Annotated[
        str | None,
        typer.Argument(help="The session; it is created if there is none.", autocompletion=session_names),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Argument(help="The message; - at its end or beginning is what stdin says.")
    ] = None,
    last: Last = False,
    as_json: Json = False,
) -> None:
    """Ask one question and print the answer.

    Words that are given one by one make one message, and a text from stdin a paragraph of it. Without TEXT all of the
    message is read from stdin, if that is a pipe or a file. With --continue there is no NAME. The answer goes to
    stdout, everything else to stderr.
    """
    from kvchat.cli import plain
    from kvchat.transcript import check_text

    words = [*([name] if last and name is not None else ()), *(text or ())]
    if not last and name is None:
        raise USAGE_ERROR("Missing argument 'NAME': name a session, or go on with the last one with --continue.")
    message, unread = check_text(_message(words)), bool(words) and STDIN not in (words[0], words[-1])
    with plain.opened(flags, None if last else name) as (_, session, status):
        with plain.interruptible(session):
            done = plain.show_turn(session.send(message), status, quiet=as_json)
        reply = done.to_dict() | {"session": session.name}
        reply["timings"]["seal_s"] = session.settle()
    if unread and _stdin_waits():
        plain.say("what was piped in was not read: with - as the last word it is part of the message")
    _tell(done, reply, as_json)


def _tell(done: TurnDone, reply: dict[str, object], as_json: bool) -> None:
    from kvchat.cli import plain
    from kvchat.terminal import to_json

    if as_json:
        print(to_json(reply))
    else:
        plain.say(plain.summary(done))
    if done.finish_reason == "interrupted":
        raise typer.Exit(130)


def _message(words: Sequence[str]) -> str:
    """The message that these words make, with stdin where `-` stands; raises for stdin that nobody pipes in."""
    if not words and sys.stdin.isatty():
        raise USAGE_ERROR("Missing argument 'TEXT': the message, or - to read it from stdin.")
    words = words or [STDIN]
    first, final = words[0] == STDIN, len(words) > 1 and words[-1] == STDIN
    if first and final:
        raise USAGE_ERROR("stdin can be read once; leave one - out")
    said = " ".join(words[first : len(words) - final])
    parts = [_stdin() if first else "", said, _stdin() if final else ""]
    return "\n\n".join(part for part in parts if part)


def _stdin_waits() -> bool:
    """Whether stdin is a pipe with something in it, or a file of which nothing was read yet."""
    try:
        import fcntl
        import termios

        handle = sys.stdin.fileno()
        about = os.fstat(handle)
        if stat.S_ISREG(about.st_mode):
            return about.st_size > 0 and os.lseek(handle, 0, os.SEEK_CUR) == 0
        return stat.S_ISFIFO(about.st_mode) and any(fcntl.ioctl(handle, termios.FIONREAD, bytes(4)))
    except (ImportError, OSError):  # no such system, or no such stdin
        return False


def _stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin is not UTF-8 text: byte {error.start} cannot be read") from None
