"""The command that puts a conversation away: its saved KV is written anew with fewer bits. It needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat import cli_store
from kvchat.flags import Json, StoreFlags, command

if TYPE_CHECKING:
    from kvchat.store import SegmentRecord, SessionInfo, Store

app = typer.Typer()


@app.command()
@command
def archive(
    flags: StoreFlags,
    name: cli_store.Name,
    codec: Annotated[
        str, typer.Option(help="archive, or a codec of the setting codec.name, or several with commas, by rank.")
    ] = "archive",
    as_json: Json = False,
) -> None:
    """Write a session's saved KV anew with fewer bits."""
    from kvchat.locks import SessionLock
    from kvchat.plain import size

    with cli_store.open_store(flags) as store:
        info = store.session(name)
        with SessionLock(store.file, info.id, name):
            figures = _recoded(store, store.session(name), codec.split(","))
    if as_json:
        cli_store.print_json(figures)
    else:
        before, after = (size(figures[f"bytes_{when}"]) for when in ("before", "after"))
        print(f"{name}: {figures['recoded']} of {figures['segments']} segments; {before} before, {after} after")


def _recoded(store: Store, info: SessionInfo, codec: list[str]) -> dict[str, Any]:
    """Recode a session's segments, less those that another session which is open shares."""
    from kvchat.locks import held_elsewhere
    from kvchat.recode import recode

    sessions = {one.id: one for one in store.sessions() if one.id != info.id}
    in_use = {one.id for other in held_elsewhere(store.file, sessions) for one in _segments(store, sessions[other])}
    before = _segments(store, info)
    written = recode(store, [one for one in before if one.id not in in_use], codec)
    after = _segments(store, info)
    return {
        "session": info.name,
        "codec": ",".join(codec),
        "segments": len(before),
        "recoded": len(written),
        "bytes_before": _nbytes(before),
        "bytes_after": _nbytes(after),
    }


def _segments(store: Store, info: SessionInfo) -> list[SegmentRecord]:
    """Those that a session's path is restored from."""
    from kvchat.fingerprint import fingerprint_id

    path = [message.id for message in store.path(info.tip)]
    return [record for record, _ in store.cover(path, fingerprint_id(info.fingerprint))]


def _nbytes(records: Sequence[SegmentRecord]) -> int:
    """What segments take, and what they share once."""
    return sum(one.nbytes for one in records) + sum(len(basis) for basis in {one.basis for one in records})
