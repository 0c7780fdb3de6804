"""A session of the store into a portable file, block by block."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from kvchat.codecs import frame
from kvchat.errors import CodecError, InputError, StoreError
from kvchat.fingerprint import fingerprint_id
from kvchat.portable import form
from kvchat.portable.form import Description, End, Manifest
from kvchat.store.records import Message, SegmentRecord
from kvchat.store.store import Store

BATCH = 1 << 20
"""Bytes after which a block of messages is full."""

Whole = tuple[SegmentRecord, Description, int]
"""A segment, its description and the bytes of its header and frames."""


def write(store: Store, name: str, stream: BinaryIO) -> Manifest:
    """Write the current path of session `name`, with the undamaged segments that lie on it whole; what was written.

    Raises:
        SessionNotFound
        InputError: the session is larger than a portable file may be.
        StoreError: another process changed it meanwhile.
    """
    info = store.session(name)
    path = store.path(info.tip)
    segments = _basis_once(list(_segments(store, path, fingerprint_id(info.fingerprint))))
    manifest = Manifest(
        name=info.name,
        model=info.model,
        fingerprint=info.fingerprint,
        created=info.created,
        messages=len(path),
        tokens=sum(len(message.token_ids) for message in path),
        text_bytes=sum(len(message.content.encode()) + len(form.note_of(message)) for message in path),
        segments=len(segments),
        frames=sum(about.stored_chunks * about.num_groups for _, about, _ in segments),
        kv_bytes=sum(size + len(record.basis) * _brings_basis(about) for record, about, size in segments),
    )
    manifest.check()
    out = _Writer(stream)
    out.put(manifest.to_bytes())
    for batch in _batches(path):
        out.put(_packed(batch))
    for record, about, _ in segments:
        _write_segment(store, record, about, out)
    out.end()
    return manifest


class _Writer:
    """Counts and hashes the blocks it writes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hasher = hashlib.sha256()
        self._blocks = 0
        self._put(form.START.pack(form.MAGIC, form.VERSION))

    def put(self, blob: bytes) -> None:
        assert len(blob) <= form.MAX_BLOCK
        self._put(form.LENGTH.pack(len(blob)))
        self._put(blob)
        self._blocks += 1

    def end(self) -> None:
        self.put(End(self._blocks, self._hasher.hexdigest()).to_bytes())

    def _put(self, data: bytes) -> None:
        self._hasher.update(data)
        self._stream.write(data)


def _segments(store: Store, path: Sequence[Message], fingerprint: str) -> Iterator[Whole]:
    """The segments to export, in the path's order; what they leave out is computed again from the token ids."""
    places = {message.id: index for index, message in enumerate(path)}
    for record, used in store.cover(list(places), fingerprint):
        if used < len(record.messages):
            continue  # it holds KV of messages that are not this path's
        about = Description(
            first=places[record.messages[0]],
            count=used,
            start=record.start,
            end=record.end,
            kind=record.kind,
            codec=record.codec,
            scorer=record.scorer,
            num_chunks=record.num_chunks,
            num_groups=record.num_groups,
            stored_chunks=record.stored_chunks,
            seal_s=record.seal_s,
            has_basis=bool(record.basis),
            shares_basis=False,
        )
        try:
            about.check()
            yield record, about, _checked_size(store, record)
        except CodecError:
            continue


def _checked_size(store: Store, record: SegmentRecord) -> int:
    """Bytes of a segment's header and frames. Raises CodecError if one is damaged, missing or too large."""
    form.check_header(record.header, record.start, record.end)
    if record.basis:
        frame.check(record.basis)
    size = len(record.header)
    for chunk, group, body in store.frames(record.id, range(record.stored_chunks)):
        form.check_rows(body, chunk, group)
        size += len(body)
        if len(body) > form.MAX_BLOCK:
            raise CodecError("a frame is larger than a block may be")
    if max(len(record.header), len(record.basis)) > form.MAX_BLOCK:
        raise CodecError("a header is larger than a block may be")
    return size


def _basis_once(segments: Sequence[Whole]) -> list[Whole]:
    """The segments, described so that a basis that follows itself is written once."""
    once, basis = [], b""
    for record, about, size in segments:
        once.append((record, replace(about, shares_basis=bool(basis) and record.basis == basis), size))
        basis = record.basis
    return once


def _brings_basis(about: Description) -> bool:
    return about.has_basis and not about.shares_basis


def _write_segment(store: Store, record: SegmentRecord, about: Description, out: _Writer) -> None:
    out.put(about.to_bytes())
    out.put(record.header)
    if _brings_basis(about):
        out.put(record.basis)
    try:
        for _, _, body in store.frames(record.id, range(record.stored_chunks)):
            out.put(body)
    except CodecError as error:
        raise StoreError(f"the session changed while it was exported; try again ({error})") from None


def _batches(path: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages, in blocks of some BATCH bytes; a larger message is a block of its own."""
    batch: list[Message] = []
    size = 0
    for number, message in enumerate(path, 1):
        new = len(message.content.encode()) + len(form.note_of(message)) + 4 * len(message.token_ids)
        if new > form.MAX_BATCH - BATCH or len(message.token_ids) > form.MAX_BATCH_TOKENS:
            raise InputError(f"message {number} is too long for a portable file: {len(message.token_ids)} tokens")
        if batch and size + new > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += new
    if batch:
        yield batch


def _packed(batch: Sequence[Message]) -> bytes:
    """Messages as one frame; nothing in it is compressed, so that a file brings no more than it weighs."""
    fields, texts = [], []
    ids: list[int] = []
    for message in batch:
        content, note = message.content.encode(), form.note_of(message)
        sizes = (len(message.token_ids), len(content), len(note))
        fields.append((form.ROLES.index(message.role), *message.content_span, *sizes))
        texts += [content, note]
        ids += message.token_ids
    digests = b"".join(bytes.fromhex(message.id.removeprefix("b2:")) for message in batch)
    planes: frame.Planes = {
        "fields": np.array(fields, "<u4"),
        "digests": np.frombuffer(digests, np.uint8).reshape(len(batch), -1),
        "ids": np.array(ids, "<u4"),
        "text": np.frombuffer(b"".join(texts), np.uint8),
    }
    return frame.pack({"block": "messages"}, planes, dict.fromkeys(planes, 0.0))
