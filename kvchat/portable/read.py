"""A portable file as messages and segments, each known to be sound before it is handed on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from kvchat.codecs import frame
from kvchat.errors import CodecError, CorruptFrame, InputError
from kvchat.fingerprint import fingerprint_id
from kvchat.portable import form
from kvchat.portable.form import Description, End, Manifest
from kvchat.records import Kind, Message, Part, Role, SegmentRecord, message_id, segment_id

Frames = Iterator[tuple[int, int, bytes]]


def is_portable(path: Path) -> bool:
    """Whether the file is in this form, or claims to be."""
    if not path.is_file():  # what is read from a pipe could not be read again
        return False
    with path.open("rb") as stream:
        return path.suffix == form.SUFFIX or stream.read(len(form.MAGIC)) == form.MAGIC


def read_manifest(path: Path) -> Manifest:
    """What the file says that it holds.

    Raises:
        InputError: it is no portable file, is damaged, is of a newer version, or is too large.
        OSError: it cannot be read.
    """
    with _named(path), path.open("rb") as stream:
        return Manifest.from_bytes(_Blocks(stream).next())


def read(path: Path) -> Generator[Part, None, None]:
    """All that the file holds, in the path's order; each part is to be used up before the next is asked for.

    What is wrong with the end shows only there, so keep nothing unless all of it came. Raises what `read_manifest`
    raises.
    """
    with _named(path), path.open("rb") as stream:
        blocks = _Blocks(stream)
        path_so_far = _Path(Manifest.from_bytes(blocks.next()))
        while len(path_so_far.ids) < path_so_far.manifest.messages:
            yield path_so_far.take(blocks.next(form.MAX_BATCH))
        path_so_far.check_complete()
        segments = _Segments(path_so_far, blocks)
        for _ in range(path_so_far.manifest.segments):
            record = segments.next()
            yield record, _each(path, segments.frames(record))
            segments.finish()
        segments.check_complete()
        blocks.check_end()


class _Blocks:
    """The blocks of a file, hashed and counted as they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size = os.fstat(stream.fileno()).st_size
        self._hasher = hashlib.sha256()
        self._count = 0
        start = stream.read(form.START.size)
        if len(start) < form.START.size or not start.startswith(form.MAGIC):
            raise CorruptFrame("this is no portable file of kvchat, or only the beginning of one")
        version = form.START.unpack(start)[1]
        if version != form.VERSION:
            raise InputError(f"it has format version {version}, this program reads {form.VERSION}: update kvchat")
        self._hasher.update(start)

    def next(self, limit: int = form.MAX_BLOCK) -> bytes:
        """The next block, which who asks for it checks. Raises CorruptFrame."""
        prefix = self._read(form.LENGTH.size)
        length = form.LENGTH.unpack(prefix)[0]
        if length > limit:
            raise CorruptFrame(f"block {self._count + 1} claims {length} bytes, at most {limit} are allowed")
        body = self._read(length)
        self._before = self._hasher.hexdigest()
        self._hasher.update(prefix)
        self._hasher.update(body)
        self._count += 1
        return body

    def _read(self, length: int) -> bytes:
        # What is not there is not asked for: reading allocates what it is asked for.
        data = self._stream.read(length) if length <= self._size - self._stream.tell() else b""
        if len(data) != length:
            raise CorruptFrame(f"it is cut short in block {self._count + 1}, at byte {self._size}")
        return data

    def check_end(self) -> None:
        """Read the end. Raises CodecError unless it is the end of just this."""
        end = End.from_bytes(self.next())
        if (end.blocks, end.digest) != (self._count - 1, self._before):
            raise CorruptFrame("its end does not agree with what stands before it")
        if self._stream.read(1):
            raise CorruptFrame("something follows its end")


class _Path:
    """The messages so far: their ids, and where each ends."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.ids: list[str] = []
        self.bounds = [0]
        self._text_bytes = 0

    def take(self, blob: bytes) -> list[Message]:
        """The messages of a block. Raises CorruptFrame."""
        # Nothing in it may be compressed, and so nothing is larger than the block.
        head, planes = frame.unpack(blob, limit=len(blob))
        fields = planes.get("fields", np.zeros((0, 0), "<u4"))
        if head != {"block": "messages"} or fields.shape[1:] != (6,) or not len(fields):
            raise CorruptFrame("another block stands in the place of messages")
        sizes = frame.expect(planes, "fields", fields.shape, "<u4")[:, 3:].astype(np.int64)
        tokens, contents, notes = (int(total) for total in sizes.sum(axis=0))
        ids = frame.expect(planes, "ids", (tokens,), "<u4")
        text = frame.expect(planes, "text", (contents + notes,), "|u1")
        digests = frame.expect(planes, "digests", (len(fields), 16), "|u1")
        self._text_bytes += contents + notes
        if (
            len(self.ids) + len(fields) > self.manifest.messages
            or self.bounds[-1] + tokens > self.manifest.tokens
            or self._text_bytes > self.manifest.text_bytes
            or tokens > form.MAX_BATCH_TOKENS
        ):
            raise CorruptFrame("it has more messages, tokens or text than its manifest says")
        messages, token, byte = [], 0, 0
        for row, digest in zip(fields.tolist(), digests, strict=True):
            role, low, high, num_ids, num_content, num_note = row
            middle, end = byte + num_content, byte + num_content + num_note
            own, content, note = ids[token : token + num_ids], text[byte:middle], text[middle:end]
            messages.append(self._message(role, (low, high), own.tolist(), content.tobytes(), note.tobytes()))
            if messages[-1].id != "b2:" + digest.tobytes().hex():
                raise CorruptFrame(f"message {len(self.ids)} is not the one that its id stands for")
            token, byte = token + num_ids, end
        return messages

    def _message(self, role: int, span: tuple[int, int], ids: list[int], content: bytes, note: bytes) -> Message:
        number = len(self.ids) + 1
        if role >= len(form.ROLES) or (form.ROLES[role] == "system" and self.ids):
            raise CorruptFrame(f"message {number} has a role that it cannot have")
        if not span[0] <= span[1] <= len(ids):
            raise CorruptFrame(f"the content of message {number} does not lie within its tokens")
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise CorruptFrame(f"message {number} is not UTF-8 text") from None
        parent = self.ids[-1] if self.ids else None
        about, name = form.read_note(note), cast(Role, form.ROLES[role])
        message = Message(message_id(parent, name, text, ids), parent, name, text, tuple(ids), span, **about)
        self.ids.append(message.id)
        self.bounds.append(self.bounds[-1] + len(ids))
        return message

    def check_complete(self) -> None:
        """Raise CorruptFrame unless the messages are just those that the manifest counts."""
        manifest = self.manifest
        if (self.bounds[-1], self._text_bytes) != (manifest.tokens, manifest.text_bytes):
            raise CorruptFrame("it has fewer tokens or less text than its manifest says")


class _Segments:
    """The segments so far: how far they reach, their frames and bytes, and the last one's basis."""

    def __init__(self, path: _Path, blocks: _Blocks) -> None:
        self._path = path
        self._blocks = blocks
        self._fingerprint = fingerprint_id(path.manifest.fingerprint)
        self._reached = self._frames = self._kv_bytes = 0
        self._basis = b""
        self._pending: Frames = iter(())

    def next(self) -> SegmentRecord:
        """The next segment, without frames. Raises CodecError."""
        about = Description.from_bytes(self._blocks.next())
        first, last = about.first, about.first + about.count
        bounds = self._path.bounds
        if first < self._reached or last >= len(bounds):
            raise CorruptFrame("a segment covers messages of another, or none of this file")
        if (about.start, about.end) != (bounds[first], bounds[last]):
            raise CorruptFrame(f"a segment of tokens [{about.start}, {about.end}) does not agree with its messages")
        self._reached = last
        self._frames += about.stored_chunks * about.num_groups
        if self._frames > self._path.manifest.frames:
            raise CorruptFrame("it has more frames than its manifest says")
        header = self._counted()
        form.check_header(header, about.start)
        if not about.shares_basis:
            self._basis = self._counted() if about.has_basis else b""
            if self._basis:
                frame.check(self._basis)
        if about.has_basis != bool(self._basis):
            raise CorruptFrame("a segment shares a basis that is not there")
        messages, kind = tuple(self._path.ids[first:last]), cast(Kind, about.kind)
        # Made from what the segment is: an id from the file could take the place of a segment still to be sealed.
        names = (self._fingerprint, kind, about.scorer, about.codec)
        return SegmentRecord(
            id=segment_id(*names, messages[0], messages[-1]),
            fingerprint=self._fingerprint,
            start=about.start,
            end=about.end,
            kind=kind,
            codec=about.codec,
            scorer=about.scorer,
            messages=messages,
            header=header,
            num_chunks=about.num_chunks,
            num_groups=about.num_groups,
            seal_s=about.seal_s,
            stored_chunks=about.stored_chunks,
            basis=self._basis,
        )

    def frames(self, record: SegmentRecord) -> Frames:
        """The frames that follow a segment's header."""
        self._pending = self._read_frames(record)
        return self._pending

    def finish(self) -> None:
        """Check the frames that were not asked for too."""
        for _ in self._pending:
            pass

    def check_complete(self) -> None:
        """Raise CorruptFrame unless the segments are just those that the manifest counts."""
        manifest = self._path.manifest
        if (self._frames, self._kv_bytes) != (manifest.frames, manifest.kv_bytes):
            raise CorruptFrame("it has fewer frames or bytes of KV than its manifest says")

    def _read_frames(self, record: SegmentRecord) -> Frames:
        for chunk in range(record.stored_chunks):
            for group in range(record.num_groups):
                body = self._counted()
                form.check_rows(body, chunk, group)
                yield chunk, group, body

    def _counted(self) -> bytes:
        blob = self._blocks.next()
        self._kv_bytes += len(blob)
        if self._kv_bytes > self._path.manifest.kv_bytes:
            raise CorruptFrame("it has more KV than its manifest says")
        return blob


def _each(path: Path, frames: Frames) -> Frames:
    """The frames; what is wrong with one is told with the file's name, wherever they are used."""
    with _named(path):
        yield from frames


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong with a file, as one line that names it."""
    try:
        yield
    except (CodecError, InputError) as error:
        raise InputError(f"{path}: {error}; nothing was taken in") from None
