"""A segment's header: ranking, geometry, the names and parameters of its codecs; and which codecs there are.

Letters: L layers, H KV heads, T tokens of the segment, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvchat.cache.segment import Ranking
from kvchat.codecs.archive import Basis
from kvchat.codecs.bounded import Bounded
from kvchat.codecs.channel import ChannelKeys
from kvchat.codecs.codec import Codec, Method
from kvchat.codecs.frame import Planes, expect, pack, read_head, unpack
from kvchat.codecs.lossless import Raw
from kvchat.codecs.quant import Keys8, Values8
from kvchat.codecs.rotate import RotatedValues
from kvchat.errors import CorruptFrame, UnknownCodec

if TYPE_CHECKING:
    from kvchat.store.records import SegmentRecord

_KEYS: dict[int, Method] = {8: Keys8(), **{bits: ChannelKeys(bits) for bits in (4, 3, 2)}}
_VALUES: dict[int, Method] = {8: Values8(), **{bits: RotatedValues(bits) for bits in (4, 3, 2)}}
CODECS: dict[str, Codec] = {
    "raw": Codec(Raw("key"), Raw("value")),
    **{f"k{k}v{v}": Codec(keys, values) for k, keys in _KEYS.items() for v, values in _VALUES.items() if k >= v},
    **{f"eb{step}": Codec(Bounded("key", step / 100), Bounded("value", step / 100)) for step in (2, 5, 10, 20)},
}
"""By name: `raw`; k and v with the bits of keys and values; eb with the step in percent of a unit's range.
sections.CODEC_NAMES repeats the names, without torch."""
ARCHIVE = "archive"
"""The codec that needs a basis, which other segments share; it serves all chunks of a segment."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_MOST_TOKENS = 2**31 - 1
# More than any model has: numbers of a head, and heads of all layers.
_MOST_DIM = 4096
_MOST_UNITS = 16384
_HEADER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What is needed before any frame of the segment can be decoded.

    codecs      name of each rank chunk's codec; the last serves all further chunks
    group_size  layers per frame (the last group may have fewer)
    params      the codecs' planes for the whole segment, first axis L
    basis       what codec `archive` shares with other segments
    """

    codecs: tuple[str, ...]
    dtype: torch.dtype
    head_dim: int
    ranking: Ranking
    group_size: int
    params: Planes
    basis: Basis | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.ranking.chunk_of)

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return int(self.ranking.chunk_of.shape[1])

    @property
    def num_groups(self) -> int:
        """Frames per rank chunk."""
        return -(-self.num_layers // self.group_size)

    def codec(self, chunk: int) -> str:
        """Name of a rank chunk's codec."""
        return self.codecs[min(chunk, len(self.codecs) - 1)]

    def method(self, chunk: int) -> Codec:
        """A rank chunk's codec."""
        return codec_of(self.codec(chunk), self.basis, self.ranking)

    def layers(self, group: int) -> tuple[int, int]:
        """First layer of a group and one past its last."""
        return group * self.group_size, min((group + 1) * self.group_size, self.num_layers)

    def to_bytes(self) -> bytes:
        """The header as one frame."""
        head = {
            "kind": "segment",
            # One text, so that a program that knows only single names calls it unknown and not damaged.
            "codec": ",".join(self.codecs),
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": self.head_dim,
            "start": self.ranking.start,
            "group_size": self.group_size,
        }
        if self.basis:
            head["basis"] = self.basis.identity
        if self.ranking.offset:
            head["offset"] = self.ranking.offset
        if self.ranking.onward is not None:
            head["onward"] = self.ranking.onward
        planes = {"chunk_of": self.ranking.chunk_of, **self.params}
        if self.ranking.scores is not None:
            planes["chunk_scores"] = np.array(self.ranking.scores, np.float32)
        return pack(head, planes)

    @classmethod
    def of(cls, record: SegmentRecord, shape: tuple[int, int, int] | None = None) -> SegmentHeader:
        """The header of a stored segment; `shape` is (L, H, D) of its model, where that is known.

        Raises CodecError, also if it is not that of this segment and model.
        """
        header = cls.from_bytes(record.header, record.basis, (record.start, record.end), shape)
        found, expected = (header.ranking.num_chunks, header.num_groups), (record.num_chunks, record.num_groups)
        if found != expected:
            raise CorruptFrame(f"the header is of another segment: chunks and groups are {found}, expected {expected}")
        return replace(header, ranking=replace(header.ranking, method=record.scorer))

    @classmethod
    def from_bytes(
        cls,
        blob: bytes,
        basis: bytes = b"",
        span: tuple[int, int] | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> SegmentHeader:
        """The header that `to_bytes` wrote; `basis` is what it shares with other segments, if it does.

        What it must cover can be told, tokens [start, end) and (L, H, D): then it takes no more memory than these need.

        Raises CorruptFrame, also if the basis is missing or another; or UnknownCodec for one of a newer version.
        """
        head = read_head(blob)
        match head:
            case {
                "kind": "segment",
                "codec": str(names),
                "dtype": str(dtype),
                "head_dim": int(head_dim),
                "start": int(start),
                "group_size": int(group_size),
            } if dtype in DTYPES and 0 < head_dim <= _MOST_DIM and start >= 0 and group_size > 0:
                codecs = tuple(names.split(","))
            case _:
                raise CorruptFrame(f"not a segment's header: {str(head)[:120]}")
        for name in codecs:
            if name != ARCHIVE:
                find_codec(name)
        _, planes = unpack(blob, limit=_most_bytes(head_dim, span, shape))
        chunk_of = planes.pop("chunk_of", np.zeros(0, np.uint8))
        if chunk_of.ndim != 3 or chunk_of.dtype != np.uint8 or not chunk_of.size:
            raise CorruptFrame(f"the segment's ranking has shape {chunk_of.shape}, expected (layers, heads, tokens)")
        if span and (start, start + chunk_of.shape[2]) != span:
            raise CorruptFrame(f"the header is of {chunk_of.shape[2]} tokens from {start} on, not of {span}")
        if shape and (*chunk_of.shape[:2], head_dim) != shape:
            raise CorruptFrame(
                f"the header is of {(*chunk_of.shape[:2], head_dim)} layers, heads and numbers, not {shape}"
            )
        scores = None
        if "chunk_scores" in planes:
            chunks = (int(chunk_of.max()) + 1,)
            scores = tuple(expect(planes, "chunk_scores", chunks, "<f4").tolist())
        layers, heads, tokens = chunk_of.shape
        if start + tokens > _MOST_TOKENS:
            raise CorruptFrame(f"the segment begins at token {start}, which no conversation has")
        shared = _shared(codecs, head.get("basis"), basis, (layers, heads, head_dim))
        ranking = Ranking(start, chunk_of, scores, "", *_offsets(head, start, start + tokens))
        shapes = {
            plane: shape
            for name in codecs
            for plane, shape in codec_of(name, shared, ranking).param_shapes(layers, heads, head_dim).items()
        }
        params = {plane: expect(planes, plane, shape, "<f4") for plane, shape in shapes.items()}
        return cls(codecs, DTYPES[dtype], head_dim, ranking, group_size, params, shared)


def _offsets(head: Mapping[str, Any], start: int, end: int) -> tuple[int, int | None]:
    """`Ranking.offset` and `Ranking.onward` of a segment of tokens [start, end). Raises CorruptFrame."""
    offset, onward = head.get("offset", 0), head.get("onward")
    least = 0 if onward is None else -_MOST_TOKENS
    if not isinstance(offset, int) or not least <= offset <= start:
        raise CorruptFrame(f"the segment's positions begin at {start} less {str(offset)[:40]}, which none can")
    if onward is not None and not (isinstance(onward, int) and 0 <= onward <= end):
        raise CorruptFrame(f"positions go on at {end} less {str(onward)[:40]}, which none can")
    return offset, onward


def _most_bytes(head_dim: int, span: tuple[int, int] | None, shape: tuple[int, int, int] | None) -> int:
    """What a header's planes may take: twice what they do, for a later version may have more to say."""
    if span is None:
        return _HEADER_BYTES
    units = shape[0] * shape[1] if shape else _MOST_UNITS
    return min(_HEADER_BYTES, 2 * units * (span[1] - span[0] + 8 * head_dim) + 64 * 1024)


def find_codec(name: str) -> Codec:
    """The codec of that name, or UnknownCodec; not `archive`, which only a basis makes a codec."""
    if name not in CODECS:
        raise UnknownCodec(f"codec {name!r} is not known to this program; known: {', '.join(CODECS)}")
    return CODECS[name]


def codec_of(name: str, basis: Basis | None, ranking: Ranking) -> Codec:
    """The codec of that name in a segment with that basis and ranking. Raises UnknownCodec."""
    return basis.codec(ranking) if basis and name == ARCHIVE else find_codec(name)


def _shared(codecs: tuple[str, ...], identity: Any, blob: bytes, shape: tuple[int, int, int]) -> Basis | None:
    """The basis of a segment that needs one. Raises CorruptFrame."""
    if ARCHIVE not in codecs:
        return None
    if codecs != (ARCHIVE,):
        raise CorruptFrame(f"codec {ARCHIVE} serves a whole segment, not as one of {', '.join(codecs)}"[:120])
    basis = Basis.from_bytes(blob, *shape)
    if basis.identity != identity:
        raise CorruptFrame(f"the segment was archived with basis {str(identity)[:40]}, not {basis.identity}")
    return basis
