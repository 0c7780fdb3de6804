"""The command that puts a conversation away: its saved KV is written anew with fewer bits. It needs no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvchat.cli import store as cli_store
from kvchat.cli.flags import Json, StoreFlags, command, examples
from kvchat.errors import InputError, SessionBusy

if TYPE_CHECKING:
    from kvchat.store.store import SegmentRecord, SessionInfo, Store

app = typer.Typer()


@app.command(
    short_help="Write a session's saved KV with fewer bits.",
    epilog=examples("kvchat archive trip", "kvchat archive trip --codec k8v8,k4v4 --json"),
)
@command
def archive(
    flags: StoreFlags,
    name: cli_store.Name,
    codec: Annotated[
        str, typer.Option(help="archive, or a codec of the setting codec.name, or several with commas, by rank.")
    ] = "archive",
    as_json: Json = False,
) -> None:
    """Write a session's saved KV anew with fewer bits, that of its branches too."""
    from kvchat.cli.plain import write
    from kvchat.locks import SessionLock

    codecs = _codecs(codec)
    with cli_store.open_store(flags) as store:
        info = store.session(name)
        with SessionLock(store.file, info.id, name):
            figures = _recoded(store, store.session(name), codecs)
    if as_json:
        cli_store.print_json(figures)
    else:
        write("".join(f"{line}\n" for line in _told(figures)))


def _codecs(text: str) -> tuple[str, ...]:
    """The codecs of a list with commas. Raises InputError."""
    from kvchat.sections import CODEC_NAMES, without_repeats

    names = [one.strip() for one in text.split(",")]
    if names != ["archive"] and not all(one in CODEC_NAMES for one in names):
        raise InputError(
            f"--codec {text!r} is none; known: {', '.join(CODEC_NAMES)}, one or several of them with commas, or "
            "archive by itself"
        )
    return without_repeats(names)


def _recoded(store: Store, info: SessionInfo, codecs: tuple[str, ...]) -> dict[str, Any]:
    """Recode a session's segments, less those with as few bits, and those that a session which is open shares."""
    from kvchat.recode import recode
    from kvchat.stats import bytes_of

    with ExitStack() as locks:
        before = _segments(store, info)
        borrowed = {one.id for one in before if one.frames_of}
        sealed = [one for one in before if one.kind == "sealed" and one.id not in borrowed]
        few = {one.id for one in sealed if _bits(one, one.codec.split(",")) <= _bits(one, codecs)}
        closed, opened = _sharing(store, info, {one.id for one in sealed} - few, locks)
        in_use = {one for shared in opened.values() for one in shared}
        chosen = {one.id for one in sealed} - few - in_use
        # With those that are archived already: the others take over their basis.
        given = [one for one in sealed if one.id in chosen or one.codec == ",".join(codecs)]
        written = recode(store, given, codecs)
        after = _segments(store, info)
    return {
        "session": info.name,
        "codec": ",".join(codecs),
        "segments": len(before),
        "recoded": len(written),
        "few_bits": len(few),
        "in_use": len(in_use),
        "in_use_by": list(opened),
        "attached": len(borrowed),
        "unsealed": len(before) - len(sealed) - len(borrowed),
        "shared_with": [name for name, shared in closed.items() if shared & chosen],
        "bytes_before": bytes_of(before),
        "bytes_after": bytes_of(after),
        "bytes_free": store.room().reusable,
    }


def _sharing(
    store: Store, info: SessionInfo, segments: set[str], locks: ExitStack
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """What each other session shares of these segments: the closed ones, which are locked, and those that are open."""
    from kvchat.locks import SessionLock

    closed, opened = dict[str, set[str]](), dict[str, set[str]]()
    reaching = store.reaching(segments) - {info.id}
    for other in store.sessions() if reaching else ():
        if other.id not in reaching or other.fingerprint != info.fingerprint:
            continue
        if shared := segments & {one.frames_of or one.id for one in _segments(store, other)}:
            try:
                locks.enter_context(SessionLock(store.file, other.id, other.name))
                closed[other.name] = shared
            except SessionBusy:
                opened[other.name] = shared
    return closed, opened


def _segments(store: Store, info: SessionInfo) -> list[SegmentRecord]:
    """Those that a session's path, and each of its branches, are restored from."""
    from kvchat.fingerprint import fingerprint_id

    found: dict[str, SegmentRecord] = {}
    for tip in (info.tip, *store.branches(info.id)):
        path = [message.id for message in store.path(tip)]
        found |= {record.id: record for record, _ in store.cover(path, fingerprint_id(info.fingerprint))}
    return list(found.values())


def _bits(record: SegmentRecord, codecs: Sequence[str]) -> float:
    """Bits of an element of a segment's stored chunks in these codecs, by rank. Raises CodecError."""
    from kvchat.codecs import SegmentHeader
    from kvchat.sections import without_repeats
    from kvchat.store.shed import bits

    names = without_repeats(codecs)
    if len(names) == 1:
        return bits(names[0])
    sizes = SegmentHeader.from_bytes(record.header, record.basis).ranking.sizes[: record.stored_chunks]
    each = [bits(names[min(chunk, len(names) - 1)]) for chunk in range(len(sizes))]
    return float(each @ sizes / sizes.sum())


def _told(figures: dict[str, Any]) -> Iterable[str]:
    """What was done, what was not and why, and whom else it concerns."""
    from kvchat.cli.plain import size

    before, after, free = (size(figures[f"bytes_{which}"]) for which in ("before", "after", "free"))
    gives = f"; `kvchat vacuum` gives {free} back to the disk" if figures["bytes_free"] else ""
    yield (
        f"{figures['session']}: {figures['recoded']} of {figures['segments']} segments; {before} before, {after} after"
        + gives
    )
    few = "archived already" if figures["codec"] == "archive" else "written with as few bits already"
    users = ", ".join(map(repr, figures["in_use_by"]))
    reasons = {
        few: figures["few_bits"],
        f"in use by {users}, which {_be(len(figures['in_use_by']))} open": figures["in_use"],
        "of attached documents, which have sessions of their own": figures["attached"],
        "waiting to be sealed": figures["unsealed"],
    }
    said = [
        f"{'all' if count == figures['segments'] else count} {_be(count)} {reason}"
        for reason, count in reasons.items()
        if count
    ]
    if said:
        yield "; ".join(said)
    if figures["shared_with"]:
        yield f"shared with, and so written anew for, {', '.join(map(repr, figures['shared_with']))}"


def _be(count: int) -> str:
    return "is" if count == 1 else "are"
