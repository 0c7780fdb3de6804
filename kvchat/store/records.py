"""What the store hands out and takes in: messages, sessions, segments and search hits, as values and as rows."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from kvchat.codecs.frame import with_head
from kvchat.errors import CodecError, InputError

Role = Literal["system", "user", "assistant"]
Kind = Literal["sealed", "open"]
Titled = Literal["", "model", "user"]
Row = sqlite3.Row
Place = tuple[int, int, int, int]
"""Depth in the tree, turn, first token and one past the last token of a message."""

TITLE_LENGTH = 60
# The columns of a message, in the order of `message_row`.
COLUMNS = (
    *("id", "parent", "role", "depth", "turn", "start_token", "end_token", "span_start", "span_end"),
    *("finish_reason", "usage", "timings", "created", "content", "token_ids"),
)


@dataclass(frozen=True, slots=True)
class Message:
    """One message, and the exact tokens that it occupies in the model's context, template tokens included.

    `content_span` is [first, last) of `token_ids` that is content. `created` is ISO 8601 in UTC. Build it with `new`.
    """

    id: str
    parent: str | None
    role: Role
    content: str
    token_ids: tuple[int, ...]
    content_span: tuple[int, int]
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    created: str = ""

    @classmethod
    def new(
        cls,
        parent: str | None,
        role: Role,
        content: str,
        token_ids: Sequence[int],
        content_span: tuple[int, int],
        **rest: Any,
    ) -> Message:
        """A message with its id, created now unless `rest` says otherwise.

        Raises:
            InputError: the content cannot be written as UTF-8.
        """
        first, last = content_span
        assert 0 <= first <= last <= len(token_ids)
        identity = message_id(parent, role, content, token_ids)
        return cls(identity, parent, role, content, tuple(token_ids), content_span, **{"created": now(), **rest})


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One line of a listing. Turns and tokens are those of the tip's path.

    `title` is the one that the user or the model gave, as `titled` says, else the start of the first user message.
    `nbytes` counts the stored KV of segments that touch the path,
    and what they share once.
    `stored` says how much of the path's KV that is, from 0 to 1, counted in tokens and rank chunks.
    """

    id: int
    name: str
    model: str
    fingerprint: dict[str, str]
    tip: str | None
    created: str
    updated: str
    title: str
    num_turns: int
    num_tokens: int
    nbytes: int
    stored: float
    settings: dict[str, Any]
    """The session's own, by dotted key."""
    titled: Titled = ""
    tags: tuple[str, ...] = ()
    """Sorted."""
    num_branches: int = 0
    """Ends of branches beside the present one."""


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A segment without its frames: which messages and tokens [start, end) it covers, and how it was made.

    `header` is opaque to the store; `nbytes` is what the store counted, header and frames. Of the rank chunks the first
    `stored_chunks` are there. `basis` is what the codec shares with other segments, if it does, and opaque too. One
    `from_file` was computed by someone else: it serves whole or not at all. One with `frames_of` has header, basis and
    frames from that segment, and takes no bytes of its own.
    """

    id: str
    fingerprint: str
    start: int
    end: int
    kind: Kind
    codec: str
    scorer: str
    messages: tuple[str, ...]
    header: bytes
    num_chunks: int
    num_groups: int
    stored_chunks: int
    nbytes: int = 0
    seal_s: float | None = None
    basis: bytes = b""
    from_file: bool = False
    frames_of: str = ""


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A message that matched, once for every session that holds it.

    `turn` counts user messages on the session's current path from 1; a system prompt before the first is turn 0, and a
    message that only an old branch holds has None. `spans` says where in `snippet` the words found are, each as
    [first, last) in characters.
    """

    session: str
    turn: int | None
    role: Role
    snippet: str
    spans: tuple[tuple[int, int], ...] = ()


def message_id(parent: str | None, role: str, content: str, token_ids: Sequence[int]) -> str:
    """The hash chain: equal messages after an equal past have one id in every process.

    Raises:
        InputError: the content cannot be written as UTF-8.
    """
    try:
        packed = json.dumps([parent, role, content, list(token_ids)], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError("the message holds half a surrogate pair, which is no text; remove it and try again") from None
    return "b2:" + hashlib.blake2b(packed, digest_size=16).hexdigest()


def segment_id(fingerprint: str, kind: Kind, scorer: str, codec: str, first: str, last: str) -> str:
    """Stands for model, method and, through the ids of its first and last message, all text up to its end."""
    names = (fingerprint, kind, scorer, codec, first, last)
    return "b2:" + hashlib.blake2b("\0".join(names).encode(), digest_size=16).hexdigest()


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """uint32, little endian."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_ids(packed: bytes) -> tuple[int, ...]:
    """What `pack_ids` packed."""
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def now() -> str:
    """ISO 8601 in UTC, always with microseconds, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def place_below(above: Place | None, role: str, num_tokens: int) -> Place:
    """Depth, turn, first and last token of a message, from those of its parent."""
    depth, turn, _, start = above or (-1, 0, 0, 0)
    return depth + 1, turn + (role == "user"), start, start + num_tokens


def turn_of(path: Sequence[Message], index: int) -> int:
    """Number of the turn, from 1, that a message of a path belongs to."""
    return max(1, sum(message.role == "user" for message in path[: index + 1]))


def num_answered(path: Sequence[Message]) -> int:
    """Messages of a path, less one at its end that waits for its answer."""
    return len(path) - bool(path and path[-1].role == "user")


def message_row(message: Message, place: Place) -> tuple[object, ...]:
    """The values of COLUMNS."""
    usage, timings = (value and json.dumps(value) for value in (message.usage, message.timings))
    rest = (message.finish_reason, usage, timings, message.created, message.content, pack_ids(message.token_ids))
    return (message.id, message.parent, message.role, *place, *message.content_span, *rest)


def message_of(row: Row) -> Message:
    """From a row of the table."""
    return Message(
        id=row["id"],
        parent=row["parent"],
        role=row["role"],
        content=row["content"],
        token_ids=unpack_ids(row["token_ids"]),
        content_span=(row["span_start"], row["span_end"]),
        finish_reason=row["finish_reason"],
        usage=row["usage"] and json.loads(row["usage"]),
        timings=row["timings"] and json.loads(row["timings"]),
        created=row["created"],
    )


def session_of(row: Row | Mapping[str, Any]) -> SessionInfo:
    """From a row of the listing."""
    return SessionInfo(
        id=row["id"],
        name=row["name"],
        model=row["model"],
        fingerprint=json.loads(row["fingerprint"]),
        tip=row["tip"],
        created=row["created"],
        updated=row["updated"],
        title=row["title"] or _title(row["opening"] or ""),
        num_turns=row["num_turns"] or 0,
        num_tokens=row["num_tokens"] or 0,
        nbytes=row["nbytes"] or 0,
        # A segment may go on beyond the path, and two may begin at one message.
        settings=json.loads(row["settings"]),
        titled=row["titled"],
        tags=tuple(sorted(json.loads(row["tags"]))),
        num_branches=row["num_branches"],
        stored=min(1.0, (row["stored_tokens"] or 0) / 1000 / (row["num_tokens"] or 1)),
    )


def segment_of(row: Row, messages: Sequence[str]) -> SegmentRecord:
    """From a row of the table and the ids of the messages it covers."""
    return SegmentRecord(
        id=row["id"],
        fingerprint=row["fingerprint"],
        start=row["start_token"],
        end=row["end_token"],
        kind=row["kind"],
        codec=row["codec"],
        scorer=row["scorer"],
        messages=tuple(messages),
        header=row["header"] if row["frames_of"] is None else _moved(row),
        num_chunks=row["num_chunks"],
        num_groups=row["num_groups"],
        nbytes=row["nbytes"],
        seal_s=row["seal_s"],
        stored_chunks=row["stored_chunks"],
        basis=row["basis_body"] or b"",
        from_file=bool(row["from_file"]),
        frames_of=row["frames_of"] or "",
    )


def _moved(row: Row) -> bytes:
    """The header that a segment has from another one, for its own place; if it is damaged, who reads it finds out."""
    header: bytes = row["source_header"] or b""
    place = {"start": row["start_token"], "offset": row["key_offset"], "onward": row["onward"]}
    with suppress(CodecError):
        return with_head(header, place)
    return header


def _title(content: str) -> str:
    """The beginning of a message on one line."""
    line = " ".join(content.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"
