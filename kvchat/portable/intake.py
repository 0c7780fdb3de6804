"""A portable file into the store, all of it or nothing.

The file is read twice: once to check all of it, when nothing is written, and once more to take it in. Nothing is
written but what was read the first time. Between segments other processes may write to the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from kvchat.errors import InputError, SessionNotFound
from kvchat.locks import SessionLock
from kvchat.portable.form import Manifest
from kvchat.portable.read import Reader
from kvchat.store.records import Message, SessionInfo
from kvchat.store.store import Store


def take_in(
    store: Store, path: Path, manifest: Manifest, name: str, model: str, *, kv: bool, vocabulary: int
) -> SessionInfo:
    """A new session `name` of the file's messages and, with `kv`, of its segments. It keeps the file's fingerprint.

    A segment is left out if it is there already, has no room, or holds no question: KV of no more than a system prompt
    would serve every session that begins with it.

    Args:
        model: what the session is said to be made with.
        vocabulary: one past the largest token id of that model.

    Raises:
        InputError: the file is damaged or changes meanwhile, or holds token ids that the model does not know.
        SessionExists, SessionBusy, StoreError
    """
    with Reader(path) as whole:
        _check(whole, path, manifest, vocabulary)
    questions: set[str] = set()
    with Reader(path, whole.marks) as reader:
        info = store.take_in(name, model, manifest.fingerprint, _noted(reader.messages(), questions))
        if kv:
            with SessionLock(store.file, info.id, name):
                _take_segments(store, reader, info, questions)
    store.shed()
    store.fold()  # the log is as large as all that came
    return store.session(name)


def _check(reader: Reader, path: Path, manifest: Manifest, vocabulary: int) -> None:
    """Read all of a file, and keep nothing."""
    if reader.manifest != manifest:
        raise InputError(f"{path}: it was changed while it was read; nothing was taken in")
    for batch in reader.messages():
        highest = max((token for message in batch for token in message.token_ids), default=0)
        if highest >= vocabulary:
            raise InputError(f"{path}: token id {highest} is not one of the model's {vocabulary}")
    for _ in reader.segments():
        pass


def _noted(batches: Iterable[list[Message]], questions: set[str]) -> Iterator[list[Message]]:
    """The messages, of which the ids of the user's are noted."""
    for batch in batches:
        questions.update(message.id for message in batch if message.role == "user")
        yield batch


def _take_segments(store: Store, reader: Reader, info: SessionInfo, questions: set[str]) -> None:
    """Write the segments, one by one; if that fails, remove them, and the session."""
    written: list[str] = []
    with ExitStack() as undo:
        undo.callback(_remove, store, info, written)
        for record, frames in reader.segments():
            if not questions.isdisjoint(record.messages) and not store.equals(record):
                written.append(record.id)
                store.put_segment(record, frames, owner=info.id)
        undo.pop_all()


def _remove(store: Store, info: SessionInfo, segments: Iterable[str]) -> None:
    for segment in segments:
        store.drop_segment(segment)
    with suppress(SessionNotFound):
        store.delete(info.name, info.id)
