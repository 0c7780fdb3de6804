"""Commands that need the store only: they start at once and never load a model."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from kvchat.cli.flags import Json, StoreFlags, command, examples
from kvchat.cli.flags import Name as Name
from kvchat.errors import InputError, StoreError

if TYPE_CHECKING:
    from kvchat.store.store import Message, Store

New = Annotated[str, typer.Argument(help="The new name.", show_default=False)]

Spans = Sequence[tuple[int, int]]

MOST_OF_A_CELL = 200
"""Characters of a name or the like that a table on a terminal shows."""

app = typer.Typer()


@contextmanager
def open_store(flags: StoreFlags) -> Iterator[Store]:
    """The store, which must exist: reading a mistyped path must not create a database there."""
    from kvchat.store.shed import Allowance
    from kvchat.store.store import Store

    settings = flags.settings()
    path, limits = settings.store_path, Allowance(settings.store.disk_budget, settings.store.min_free)
    if not path.exists():
        raise StoreError(f"there is no store at {path} yet; `kvchat chat` begins one")
    store = Store(path, allowance=limits, key=flags.key)
    try:
        yield store
    finally:
        store.close()


def names(flags: StoreFlags) -> set[str]:
    """The names of all sessions; none if there is no store yet."""
    if not flags.settings().store_path.exists():
        return set()
    with open_store(flags) as store:
        return {session.name for session in store.sessions()}


def stored_stats(flags: StoreFlags, name: str) -> dict[str, Any]:
    """What the store holds of a session, which may be open elsewhere."""
    from kvchat.stats import describe_stored

    with open_store(flags) as store:
        return describe_stored(store, store.session(name))


def decisions(flags: StoreFlags, name: str | None) -> list[str]:
    """What would give way if all sessions were opened now, or of one session, and why."""
    from kvchat.locks import held_elsewhere
    from kvchat.planning import would_decide
    from kvchat.recode import recode

    with open_store(flags) as store:
        spared = partial(held_elsewhere, store.file)
        store.allowance = replace(store.allowance, recode=partial(recode, store), spared=spared)
        wanted = None if name is None else store.session(name).name
        decided = would_decide(store, flags.settings())
        # What is decided about is called by its session and, behind a space, its positions.
        return [str(one) for one in decided if wanted in (None, one.name.rpartition(" ")[0])]


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    from kvchat.terminal import to_json

    print(to_json(value, indent=2))


def print_table(
    rows: Sequence[dict[str, Any]], stream: TextIO | None = None, bold: Sequence[Spans] | None = None
) -> None:
    """Rows of equal keys as aligned columns; control characters lose their effect on a terminal.

    `bold` says for each row where its last cell, which is one line then, is shown bold: [first, last) in characters.
    """
    from kvchat.terminal import on_a_row

    if not rows:
        return
    most = MOST_OF_A_CELL if (stream or sys.stdout).isatty() else sys.maxsize // 8
    lines = [list(rows[0])] + [
        [on_a_row("" if cell is None else str(cell), most) for cell in row.values()] for row in rows
    ]
    widths = [max(width_of(line[column]) for line in lines) for column in range(len(lines[0]))]
    for row, spans in enumerate(bold or (), start=1):
        lines[row][-1] = _emphasised([*rows[row - 1].values()][-1], spans)
    for line in lines:
        padded = "  ".join(cell + " " * (width - width_of(cell)) for cell, width in zip(line, widths, strict=True))
        print(padded.rstrip(), file=stream or sys.stdout)


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal."""
    narrow = sum(unicodedata.category(character) not in ("Mn", "Me", "Cf") for character in text)
    return narrow + sum(unicodedata.east_asian_width(character) in "WF" for character in text)


def _emphasised(text: str, spans: Spans) -> str:
    """`text` without effect but that its spans are bold."""
    from kvchat.terminal import neutralise

    shown, end = "", 0
    for first, last in spans:
        shown += f"{neutralise(text[end:first])}\x1b[1m{neutralise(text[first:last])}\x1b[22m"
        end = last
    return shown + neutralise(text[end:])


def spoken(messages: Sequence[Message]) -> list[Message]:
    """`messages` less the opening that a model needs where there is no system prompt."""
    return [message for message in messages if message.content or message.role != "system"]


def turn_numbers(messages: Sequence[Message]) -> list[int]:
    """The turn of each message: a user message begins one, what stands before the first is turn 0."""
    turn, turns = 0, []
    for message in messages:
        turn += message.role == "user"
        turns.append(turn)
    return turns


@app.command(epilog=examples("kvchat rename trip rome-2026"))
@command
def rename(flags: StoreFlags, old: Name, new: New) -> None:
    """Give a session another name."""
    with open_store(flags) as store:
        store.rename(old, new)


@app.command(epilog=examples("kvchat rm trip", "kvchat rm trip --yes"))
@command
def rm(
    flags: StoreFlags,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a session: its text and its KV."""
    from kvchat.locks import SessionLock
    from kvchat.terminal import neutralise

    with open_store(flags) as store:
        session = store.session(name)
        if not yes and not sys.stdin.isatty():
            raise InputError(f"deleting {name!r} needs a yes; add --yes")
        with SessionLock(store.file, session.id, name):
            asked = neutralise(f"Delete {name!r} with {session.num_turns} turns for good?")
            if yes or typer.confirm(asked, err=True):
                store.delete(name, session.id)


@app.command(
    short_help="Copy a session, or its first turns.",
    epilog=examples("kvchat fork trip trip-2", "kvchat fork trip trip-3 --at 2"),
)
@command
def fork(
    flags: StoreFlags,
    name: Name,
    new: New,
    at: Annotated[int | None, typer.Option(min=1, help="The last turn to take over; without it all.")] = None,
) -> None:
    """Copy a session, or its first turns; both share the saved KV."""
    with open_store(flags) as store:
        tip = store.session(name).tip
        store.fork(name, new, tip if at is None else _end_of_turn(store.path(tip), name, at))


def _end_of_turn(messages: Sequence[Message], name: str, turn: int) -> str:
    """The id of the last message of `turn`."""
    ends = dict(zip(turn_numbers(messages), messages, strict=True))
    if turn not in ends:
        raise InputError(f"{name} has no turn {turn}; it has turns 1 to {max(ends, default=0)}")
    return ends[turn].id


@app.command(
    short_help="Write a conversation as text, or as a file with its KV.",
    epilog=examples(
        "kvchat export trip",
        "kvchat export trip --format json --output trip.json",
        "kvchat export trip --format html --output trip.html",
        "kvchat export trip --format kvchat --output trip.kvchat",
    ),
)
@command
def export(
    flags: StoreFlags,
    name: Name,
    format: Annotated[
        Literal["json", "jsonl", "md", "html", "sharegpt", "kvchat"],
        typer.Option(help="The form; html is a page to read, kvchat takes the KV along."),
    ] = "md",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file; without it stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a conversation as text that other programs read, or as one file with its KV for another machine."""
    from kvchat.cli import plain

    if format == "kvchat":
        _export_session(flags, name, output, force)
    else:
        _export_text(flags, name, format, output, force)
    if flags.key:
        plain.say("the store is encrypted; what was written here is not")


def _export_text(flags: StoreFlags, name: str, format: str, output: Path | None, force: bool) -> None:
    from kvchat.cli import plain
    from kvchat.files import written
    from kvchat.transcript_page import text_of

    with open_store(flags) as store:
        messages = spoken(store.path(store.session(name).tip))
    text = text_of([{"role": message.role, "content": message.content} for message in messages], format, name)
    if output is None:
        plain.write(text)
        return
    with written(output, force) as stream:
        stream.write(text.encode())


def _export_session(flags: StoreFlags, name: str, output: Path | None, force: bool) -> None:
    from kvchat import portable
    from kvchat.cli import plain
    from kvchat.files import written

    if output is None and sys.stdout.isatty():
        raise InputError("a portable file is no text for a terminal; add --output FILE")
    with open_store(flags) as store:
        if output is None:
            manifest = portable.write(store, name, sys.stdout.buffer)
        else:
            with written(output, force) as stream:
                manifest = portable.write(store, name, stream)
    counts = f"{manifest.messages} messages, {manifest.tokens} tokens, {manifest.segments} segments"
    plain.say(f"{name}: {counts}, {plain.size(manifest.kv_bytes)} of KV")


@app.command(
    short_help="Give free space of the store back to the disk.",
    epilog=examples("kvchat vacuum", "kvchat vacuum --json"),
)
@command
def vacuum(flags: StoreFlags, as_json: Json = False) -> None:
    """Give free space back to the file system: of deleted sessions, and of KV that was archived or given up."""
    from kvchat.cli.plain import size

    with open_store(flags) as store:
        before, after = store.vacuum()
    if as_json:
        print_json({"bytes_before": before, "bytes_after": after})
    else:
        print(f"{size(before)} before, {size(after)} after")
