"""A portable file into the store, all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from kvchat.errors import InputError
from kvchat.portable.form import Manifest
from kvchat.portable.read import read
from kvchat.records import Part, SessionInfo
from kvchat.store import Store


def take_in(
    store: Store, path: Path, manifest: Manifest, name: str, model: str, *, kv: bool, vocabulary: int
) -> SessionInfo:
    """A new session `name` of the file's messages and, with `kv`, of its segments. It keeps the file's fingerprint.

    Args:
        model: what the session is said to be made with.
        vocabulary: one past the largest token id of that model.

    Raises:
        InputError: the file is damaged, or holds token ids that the model does not know.
        SessionExists, StoreError
    """
    with closing(read(path)) as parts:
        return store.take_in(name, model, manifest.fingerprint, _wanted(path, parts, kv, vocabulary))


def _wanted(path: Path, parts: Iterable[Part], kv: bool, vocabulary: int) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, list):
            highest = max((token for message in part for token in message.token_ids), default=0)
            if highest >= vocabulary:
                raise InputError(f"{path}: token id {highest} is not one of the model's {vocabulary}")
            yield part
        elif kv:
            yield part
