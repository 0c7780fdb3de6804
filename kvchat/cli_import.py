"""The command that takes a conversation in, from text or from a portable file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvchat import cli_store
from kvchat.errors import SessionExists
from kvchat.flags import ModelFlags, command

app = typer.Typer()


@app.command("import")
@command
def import_(
    flags: ModelFlags,
    file: Annotated[Path, typer.Argument(help="A conversation.")],
    name: Annotated[str | None, typer.Option(help="The new session's name; without it the file's.")] = None,
    format: Annotated[
        Literal["auto", "json", "jsonl", "sharegpt", "md", "kvchat"], typer.Option(help="The file's format.")
    ] = "auto",
) -> None:
    """Take a conversation from a file into a new session."""
    from kvchat import portable

    if format == "kvchat" or (format == "auto" and portable.is_portable(file)):
        _import_session(flags, file, name)
    else:
        _import_text(flags, file, name or file.stem, format)


def _import_text(flags: ModelFlags, file: Path, name: str, format: str) -> None:
    from kvchat import plain, transcript

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
    plain.say(f"{name}: {len(messages)} messages, {usage.prefilled_tokens} tokens")


def _import_session(flags: ModelFlags, file: Path, name: str | None) -> None:
    from kvchat import plain, portable

    manifest = portable.read_manifest(file)
    name = name or manifest.name
    _check_free(flags, name)
    with plain.working(flags) as (worker, _), worker.take_in(file, name, flags.model, flags.rebuild) as session:
        # Nothing is new: what the file's KV leaves out is computed, and counted.
        usage = session.append([])
        session.settle()
    told = f"{name}: {manifest.messages} messages, {usage.prompt_tokens} tokens"
    if usage.prefilled_tokens:
        plain.say(f"{told}: {usage.cached_tokens} from the file, {usage.prefilled_tokens} read again")
    else:
        plain.say(f"{told}, all from the file")


def _check_free(flags: ModelFlags, name: str) -> None:
    """Before anything is loaded."""
    if name in cli_store.names(flags):
        raise SessionExists(f"a session named {name!r} is there already; give another with --name")
