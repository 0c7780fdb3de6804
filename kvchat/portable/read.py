"""A portable file as messages and segments, each known to be sound before it is handed on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self, cast

import numpy as np

from kvchat.codecs import frame
from kvchat.errors import CorruptFrame
from kvchat.fingerprint import fingerprint_id
from kvchat.portable import form
from kvchat.portable.blocks import Blocks, named
from kvchat.portable.form import Description, Manifest
from kvchat.store.records import Kind, Message, Role, SegmentRecord, message_id, segment_id

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
    with named(path), path.open("rb") as stream:
        return Manifest.from_bytes(Blocks(stream).next())


class Reader:
    """A file that is read once, from its beginning to its end. Use it as a context manager.

    Args:
        path: the file.
        marks: those of another reader that has read all of it: then every part is the one that was read there, or
            reading it raises.

    Raises what `read_manifest` raises, and so do its methods.
    """

    def __init__(self, path: Path, marks: list[bytes] | None = None) -> None:
        self.marks: list[bytes] = []
        """Digests of the file up to the end of each part that was read."""
        self._file, self._expected = path, marks
        with ExitStack() as opened, named(path):
            self._blocks = Blocks(opened.enter_context(path.open("rb")))
            self._path = _Path(Manifest.from_bytes(self._blocks.next()))
            self.manifest = self._path.manifest
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def messages(self) -> Iterator[list[Message]]:
        """All messages, a block at a time."""
        with named(self._file):
            while len(self._path.ids) < self.manifest.messages:
                batch = self._path.take(self._blocks.next(form.MAX_BATCH))
                self._mark()
                yield batch
            self._path.check_complete()

    def segments(self) -> Iterator[tuple[SegmentRecord, Frames]]:
        """After the messages: all segments. The frames of each are to be used up before the next is asked for."""
        with named(self._file):
            segments = _Segments(self._path, self._blocks)
            for _ in range(self.manifest.segments):
                record = segments.next()
                pending = self._marked(segments.frames(record))
                yield record, self._each(pending)
                for _frame in pending:  # those that were not asked for are checked too
                    pass
            segments.check_complete()
            self._blocks.check_end()

    def _marked(self, frames: Frames) -> Frames:
        yield from frames
        self._mark()

    def _each(self, frames: Frames) -> Frames:
        """The frames; what is wrong with one is told with the file's name, wherever they are used."""
        with named(self._file):
            yield from frames

    def _mark(self) -> None:
        """A part was read. Raises CorruptFrame if another stood there before."""
        number = len(self.marks)
        self.marks.append(self._blocks.digest())
        if self._expected is not None and self._expected[number : number + 1] != self.marks[number:]:
            raise CorruptFrame("it was changed while it was read")


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

    def __init__(self, path: _Path, blocks: Blocks) -> None:
        self._path = path
        self._blocks = blocks
        self._fingerprint = fingerprint_id(path.manifest.fingerprint)
        self._reached = self._frames = self._kv_bytes = 0
        self._basis = b""

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
        form.check_header(header, about.start, about.end)
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
            from_file=True,
        )

    def check_complete(self) -> None:
        """Raise CorruptFrame unless the segments are just those that the manifest counts."""
        manifest = self._path.manifest
        if (self._frames, self._kv_bytes) != (manifest.frames, manifest.kv_bytes):
            raise CorruptFrame("it has fewer frames or bytes of KV than its manifest says")

    def frames(self, record: SegmentRecord) -> Frames:
        """The frames that follow a segment's header. Raises CodecError."""
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
