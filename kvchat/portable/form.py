"""What the blocks of a portable file may hold: their limits, and the checks that writing and reading share."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any, ClassVar, Self, get_args

from kvchat.codecs import frame
from kvchat.errors import CorruptFrame, InputError
from kvchat.events import FinishReason, Timings, Usage
from kvchat.store.records import Message

MAGIC = b"KVCHAT\x1a\n"
VERSION = 1
START = struct.Struct("<8sH")
LENGTH = struct.Struct("<I")
SUFFIX = ".kvchat"

MAX_BLOCK = 64 << 20
"""Bytes of any block. A segment with a larger frame is not exported."""
MAX_BATCH = 16 << 20
"""Bytes of a block of messages. As Python objects they take up to 20 times as much; no file makes reading take more."""
MAX_BATCH_TOKENS = 1 << 20
MAX_NOTE = 2 << 20
"""Bytes of what is noted of one message: timings and the like."""
MAX_TOTALS = {
    "messages": 100_000,
    "tokens": 1 << 22,
    "text_bytes": 256 << 20,
    "segments": 100_000,
    "frames": 1_000_000,
    "kv_bytes": 1 << 42,
}
"""Of the whole file, by the manifest's names."""
MAX_CHUNKS = 256
MAX_GROUPS = 4096
MAX_HEADS = 1 << 14
"""KV heads of all layers together."""
MAX_HEAD_DIM = 1024
MAX_RANKING = 256 << 20
"""Bytes of a segment's ranking, one for each pair. In the file it is compressed, but it is read whole."""
MAX_NAME = 1000
MAX_MODEL = 2000

ROLES = ("system", "user", "assistant")
_USAGE = {field.name for field in fields(Usage)} - {"recalled"}
_TIMINGS = {field.name for field in fields(Timings)}
_METHOD = re.compile(r"[A-Za-z0-9_.,:+-]{0,200}")


@dataclass(frozen=True, slots=True)
class Block:
    """A block that is only a head: one value a field, and which block it is."""

    BLOCK: ClassVar[str]

    def to_bytes(self) -> bytes:
        """One frame."""
        return frame.pack({"block": self.BLOCK, **asdict(self)}, {})

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """What `to_bytes` wrote, every field checked. Raises CorruptFrame, and InputError for more than is allowed."""
        head = frame.read_head(blob)
        if head.pop("block", None) != cls.BLOCK or head.keys() != {field.name for field in fields(cls)}:
            raise CorruptFrame(f"another block stands in the place of the {cls.BLOCK}")
        block = cls(**head)
        block.check()
        return block

    def check(self) -> None:
        """Raise unless every field has its type and keeps within its limit."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Manifest(Block):
    """What a file holds.

    `text_bytes` are those of contents and notes, `kv_bytes` those of headers, bases and frames.
    """

    BLOCK = "manifest"
    name: str
    model: str
    fingerprint: dict[str, str]
    created: str
    messages: int
    tokens: int
    text_bytes: int
    segments: int
    frames: int
    kv_bytes: int

    def check(self) -> None:
        """Raises CorruptFrame, and InputError if the session is larger than a file may be."""
        prints = self.fingerprint
        if not (_is_line(self.name, MAX_NAME) and _is_line(self.model, MAX_MODEL) and _is_time(self.created)):
            raise CorruptFrame("its manifest has no usable name, model or date")
        if not isinstance(prints, dict) or len(prints) > 16:
            raise CorruptFrame("its manifest has no fingerprint")
        if not all(_is_line(key, 100) and _is_line(value, 100) for key, value in prints.items()):
            raise CorruptFrame("its manifest has a fingerprint that cannot be")
        for what, most in MAX_TOTALS.items():
            value = getattr(self, what)
            if not _is_count(value, 0, 1 << 62):
                raise CorruptFrame(f"its manifest counts {value!r} {what}")
            if value > most:
                raise InputError(f"a portable file has at most {most} {what.replace('_', ' ')}, this one {value}")


@dataclass(frozen=True, slots=True)
class Description(Block):
    """A segment without its bytes. Of the path's messages it covers `count` from number `first` on.

    `shares_basis` says that its basis is that of the segment before; else `has_basis` says whether one follows.
    """

    BLOCK = "segment"
    first: int
    count: int
    start: int
    end: int
    kind: str
    codec: str
    scorer: str
    num_chunks: int
    num_groups: int
    stored_chunks: int
    seal_s: float | None
    has_basis: bool
    shares_basis: bool

    def check(self) -> None:
        """Raises CorruptFrame."""
        counts = (
            _is_count(self.first, 0, MAX_TOTALS["messages"]),
            _is_count(self.count, 1, MAX_TOTALS["messages"]),
            _is_count(self.start, 0, MAX_TOTALS["tokens"]),
            _is_count(self.end, 1, MAX_TOTALS["tokens"]),
            _is_count(self.num_chunks, 1, MAX_CHUNKS),
            _is_count(self.num_groups, 1, MAX_GROUPS),
        )
        if not all(counts) or not self.start < self.end or not _is_count(self.stored_chunks, 1, self.num_chunks):
            raise CorruptFrame("it describes a segment of impossible size")
        if self.kind not in ("sealed", "open") or (self.kind == "open" and self.num_chunks > 1):
            raise CorruptFrame("it describes a segment of an unknown kind")
        if not all(isinstance(name, str) and _METHOD.fullmatch(name) for name in (self.codec, self.scorer)):
            raise CorruptFrame("it describes a segment of an unknown method")
        if self.seal_s is not None and not _is_number(self.seal_s):
            raise CorruptFrame("it describes a segment sealed in no time that can be")
        if type(self.has_basis) is not bool or type(self.shares_basis) is not bool:
            raise CorruptFrame("it describes a segment with half a basis")


@dataclass(frozen=True, slots=True)
class End(Block):
    """Number of blocks before it, and SHA-256 of every byte before it."""

    BLOCK = "end"
    blocks: int
    digest: str

    def check(self) -> None:
        """Raises CorruptFrame."""
        if not _is_count(self.blocks, 0, 1 << 32) or not isinstance(self.digest, str):
            raise CorruptFrame("its end cannot be read")


def check_header(blob: bytes, start: int, end: int) -> None:
    """Raise CodecError unless `blob` is an undamaged header of a segment of tokens [start, end), no larger than one is.

    Nothing in it is decompressed, and what needs torch is left to whoever uses it.
    """
    head = frame.read_head(blob)
    if (head.get("kind"), head.get("start")) != ("segment", start):
        raise CorruptFrame(f"the header of the segment at token {start} is that of another")
    dtype, shape = frame.plane_shapes(blob).get("chunk_of", ("", ()))
    if dtype != "|u1" or len(shape) != 3 or shape[2] != end - start:
        raise CorruptFrame(f"the header of the segment at token {start} ranks {shape}, not its {end - start} tokens")
    heads, head_dim = shape[0] * shape[1], head.get("head_dim")
    if not _is_count(heads, 1, MAX_HEADS) or not _is_count(head_dim, 1, MAX_HEAD_DIM):
        raise CorruptFrame(f"the segment at token {start} has {heads} heads of {head_dim!r} numbers: no model has that")
    ranking, rest = heads * (end - start), 16 * heads * int(head["head_dim"]) + 4 * MAX_CHUNKS
    if ranking > MAX_RANKING or frame.plane_bytes(blob) > ranking + rest:
        raise CorruptFrame(f"the header of the segment at token {start} is larger than one may be")


def check_rows(blob: bytes, chunk: int, group: int) -> None:
    """Raise CodecError unless `blob` is an undamaged frame of that place."""
    head = frame.read_head(blob)
    if (head.get("kind"), head.get("chunk"), head.get("group")) != ("rows", chunk, group):
        raise CorruptFrame(f"another block stands in the place of chunk {chunk}, group {group} of a segment")


def note_of(message: Message) -> bytes:
    """What is known of a message besides its text, as JSON. Timings too long for a note are left out."""
    note: dict[str, Any] = {
        "created": message.created,
        "finish_reason": message.finish_reason,
        "usage": message.usage if _is_usage(message.usage) else None,
        "timings": message.timings if _is_timings(message.timings) else None,
    }
    text = json.dumps(note).encode()
    return text if len(text) <= MAX_NOTE else json.dumps({**note, "timings": None}).encode()


def read_note(text: bytes) -> dict[str, Any]:
    """What `note_of` wrote. Raises CorruptFrame."""
    # Nested brackets cost a hundred times their bytes in memory; a note has three objects and two lists.
    if len(text) <= MAX_NOTE and text.count(b"{") <= 3 and text.count(b"[") <= 2:
        try:
            note = json.loads(text)
        except ValueError:
            note = None
        match note:
            case {"created": created, "finish_reason": reason, "usage": usage, "timings": timings} if (
                len(note) == 4
                and _is_time(created)
                and (reason is None or reason in get_args(FinishReason))
                and _is_usage(usage)
                and _is_timings(timings)
            ):
                return dict(note)
    raise CorruptFrame("what is noted of a message cannot be read")


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and -1e15 < value < 1e15


def _is_line(value: object, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most and not any(character < " " for character in value)


def _is_time(value: object) -> bool:
    if not isinstance(value, str) or len(value) > 40:
        return False
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _is_usage(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or value.keys() - {"recalled"} != _USAGE:
        return False
    recalled = value.get("recalled", ())  # files of before there was recall have none
    return (
        isinstance(recalled, list | tuple)
        and len(recalled) <= MAX_TOTALS["segments"]
        and all(_is_count(start, 0, MAX_TOTALS["tokens"]) for start in recalled)
        and all(_is_count(value[name], 0, 1 << 32) for name in _USAGE)
    )


def _is_timings(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, Mapping) or value.keys() != _TIMINGS:
        return False
    gaps, seal = value["itl_s"], value["seal_s"]
    return (
        isinstance(gaps, list | tuple)
        and all(map(_is_number, [*gaps, value["load_s"], value["ttft_s"]]))
        and (seal is None or _is_number(seal))
    )
