"""The command that takes a conversation in, from text or from a portable file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvchat.cli import store as cli_store
from kvchat.cli.flags import Json, ModelFlags, command, examples
from kvchat.errors import SessionExists

if TYPE_CHECKING:
    from kvchat.events import Usage

app = typer.Typer()


@app.command("import", epilog=examples("kvchat import chat.json --name rome", "kvchat import trip.kvchat"))
@command
def import_(
    flags: ModelFlags,
    file: Annotated[Path, typer.Argument(help="A conversation.")],
    name: Annotated[str | None, typer.Option(help="The new session's name; without it the file's.")] = None,
    format: Annotated[
        Literal["auto", "json", "jsonl", "sharegpt", "md", "kvchat"], typer.Option(help="The file's format.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Take a conversation from a file into a new session."""
    from kvchat import portable
    from kvchat.cli import plain

    if format == "kvchat" or (format == "auto" and portable.is_portable(file)):
        taken = _import_session(flags, file, name)
    else:
        taken = _import_text(flags, file, name or file.stem, format)
    if as_json:
        cli_store.print_json({"session": taken.session, "messages": taken.messages, "usage": asdict(taken.usage)})
    else:
        plain.say(f"{taken.session}: {taken.messages} messages, {taken.told}")


@dataclass(frozen=True)
class Taken:
    """What was taken in: into which session, how many messages, and where their tokens come from."""

    session: str
    messages: int
    usage: Usage
    told: str
    """The same in words."""


def _import_text(flags: ModelFlags, file: Path, name: str, format: str) -> Taken:
    from kvchat import transcript
    from kvchat.cli import plain

    messages = transcript.read(file, format)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    _check_free(flags, name)
    with plain.opened(flags, name, system=system) as (worker, session, _):
        try:
            usage = session.append(messages)
        except BaseException:
            # Half a conversation would be taken for the whole one.
            session.close()
            worker.delete(name)
            raise
        session.settle()
    return Taken(name, len(messages), usage, f"{usage.prefilled_tokens} tokens")


def _import_session(flags: ModelFlags, file: Path, name: str | None) -> Taken:
    from kvchat import portable
    from kvchat.cli import plain

    manifest = portable.read_manifest(file)
    name = name or manifest.name
    _check_free(flags, name)
    with plain.working(flags) as (worker, _), worker.take_in(file, name, flags.model, flags.rebuild) as session:
        # Nothing is new: what the file's KV leaves out is computed, and counted.
        usage = session.append([])
        session.settle()
    if usage.prefilled_tokens:
        told = f"{usage.prompt_tokens} tokens: {usage.cached_tokens} from the file, {usage.prefilled_tokens} read again"
    else:
        told = f"{usage.prompt_tokens} tokens, all from the file"
    return Taken(name, manifest.messages, usage, told)


def _check_free(flags: ModelFlags, name: str) -> None:
    """Before anything is loaded."""
    if name in cli_store.names(flags):
        raise SessionExists(f"a session named {name!r} is there already; give another with --name")
