"""Messages, segments and frames of made-up conversations, for the tests of the store. No model, no torch."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvchat.codecs.frame import pack
from kvchat.portable.read import Reader
from kvchat.store.store import Kind, Message, Role, SegmentRecord, SessionInfo, Store

MODEL = "tiny"
FINGERPRINT = {"weights": "w1", "template": "t1"}
Frames = list[tuple[int, int, bytes]]


def say(parent: Message | str | None, role: Role, content: str, **rest: Any) -> Message:
    """A message whose tokens are its bytes between two template tokens."""
    ids = (1000, *content.encode(), 1001)
    above = parent.id if isinstance(parent, Message) else parent
    return Message.new(above, role, content, ids, (1, len(ids) - 1), **rest)


def talk(parent: Message | None, *contents: str) -> list[Message]:
    """A chain of messages, user and assistant in turn."""
    chain: list[Message] = []
    for index, content in enumerate(contents):
        chain.append(say(chain[-1] if chain else parent, ("user", "assistant")[index % 2], content))
    return chain


def converse(store: Store, name: str, *contents: str) -> tuple[SessionInfo, list[Message]]:
    """A new session with these messages."""
    info = store.create_session(name, MODEL, FINGERPRINT)
    chain = talk(None, *contents)
    store.add_messages(info.id, chain, None)
    return store.session(name), chain


def segment(
    path: Sequence[Message],
    first: int,
    last: int,
    kind: Kind = "sealed",
    fingerprint: str = "f1",
    tag: str = "",
    num_chunks: int = 2,
    num_groups: int = 2,
) -> tuple[SegmentRecord, Frames]:
    """A segment over messages [first, last) of a path, with frames that pass the check; `tag` sets equal ones apart."""
    start = sum(len(message.token_ids) for message in path[:first])
    end = start + sum(len(message.token_ids) for message in path[first:last])
    identity = f"b2:{kind}-{path[last - 1].id[3:11]}-{first}-{last}-{fingerprint}{tag}"
    frames = [
        (chunk, grp, pack({"chunk": chunk, "grp": grp}, {"rows": np.full(50, chunk, np.uint8)}))
        for chunk in range(num_chunks)
        for grp in range(num_groups)
    ]
    record = SegmentRecord(
        id=identity,
        fingerprint=fingerprint,
        start=start,
        end=end,
        kind=kind,
        codec="raw",
        scorer="kvzip",
        messages=tuple(message.id for message in path[first:last]),
        header=pack({"of": identity}, {}),
        num_chunks=num_chunks,
        num_groups=num_groups,
        stored_chunks=num_chunks,
    )
    return record, frames


def bytes_on_disk(path: Path) -> Iterator[bytes]:
    """The contents of the database file and what lies beside it."""
    for file in path.parent.glob(path.name + "*"):
        yield file.read_bytes()


def copy_of(store: Path, number: int) -> Path:
    """A copy of a store that is open, in which its session is open nowhere."""
    copy = store.with_name(f"copy-{number}.db")
    with sqlite3.connect(store) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    source.close()
    target.close()
    return copy


def read_all(file: Path) -> Iterator[Any]:
    """All that a portable file holds: blocks of messages, then segments, each with its frames."""
    with Reader(file) as reader:
        yield from reader.messages()
        yield from reader.segments()
