"""A segment's exact KV to frames, one per (rank chunk, layer group), and each frame back to ragged KV.

Rows of a frame stand in (layer, head, time) order and are one plane for all layers of the group, so that decoding is a
few large operations. Each rank chunk has a codec, so that the pairs that matter most can have the most bits. The
segment's header holds what every frame needs: ranking, geometry, the names and parameters of the codecs.

Letters: L layers, H KV heads, T tokens of the segment, N rows of a frame, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.segment import LayerKV, Ranking
from kvchat.codecs.archive import Basis
from kvchat.codecs.bounded import Bounded
from kvchat.codecs.channel import ChannelKeys
from kvchat.codecs.codec import Codec, FrameRows, Method, Take
from kvchat.codecs.frame import Planes, expect, pack, unpack
from kvchat.codecs.lossless import Raw
from kvchat.codecs.quant import Keys8, Values8
from kvchat.codecs.rotate import RotatedValues
from kvchat.errors import CorruptFrame, UnknownCodec

_KEYS: dict[int, Method] = {8: Keys8(), **{bits: ChannelKeys(bits) for bits in (4, 3, 2)}}
_VALUES: dict[int, Method] = {8: Values8(), **{bits: RotatedValues(bits) for bits in (4, 3, 2)}}
CODECS: dict[str, Codec] = {
    "raw": Codec(Raw("key"), Raw("value")),
    **{f"k{k}v{v}": Codec(keys, values) for k, keys in _KEYS.items() for v, values in _VALUES.items() if k >= v},
    **{f"eb{step}": Codec(Bounded("key", step / 100), Bounded("value", step / 100)) for step in (2, 5, 10, 20)},
}
"""By name: `raw`; k and v with the bits of keys and values; eb with the step in percent of a unit's range.
config.CODEC_NAMES repeats the names, without torch."""
ARCHIVE = "archive"
"""The codec that needs a basis, which other segments share; it serves all chunks of a segment."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_FRAME_BYTES = 4 * 1024 * 1024
_MOST_TOKENS = 2**31 - 1
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
        return _codec(self.codec(chunk), self.basis, self.ranking)

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
        planes = {"chunk_of": self.ranking.chunk_of, **self.params}
        if self.ranking.scores is not None:
            planes["chunk_scores"] = np.array(self.ranking.scores, np.float32)
        return pack(head, planes)

    @classmethod
    def from_bytes(cls, blob: bytes, basis: bytes = b"") -> SegmentHeader:
        """The header that `to_bytes` wrote; `basis` is what it shares with other segments, if it does.

        Raises CorruptFrame, also if the basis is missing or another; or UnknownCodec for one of a newer version.
        """
        head, planes = unpack(blob, limit=_HEADER_BYTES)
        match head:
            case {
                "kind": "segment",
                "codec": str(names),
                "dtype": str(dtype),
                "head_dim": int(head_dim),
                "start": int(start),
                "group_size": int(group_size),
            } if dtype in DTYPES and head_dim > 0 and start >= 0 and group_size > 0:
                codecs = tuple(names.split(","))
            case _:
                raise CorruptFrame(f"not a segment's header: {str(head)[:120]}")
        chunk_of = planes.pop("chunk_of", np.zeros(0, np.uint8))
        if chunk_of.ndim != 3 or chunk_of.dtype != np.uint8 or not chunk_of.size:
            raise CorruptFrame(f"the segment's ranking has shape {chunk_of.shape}, expected (layers, heads, tokens)")
        scores = None
        if "chunk_scores" in planes:
            chunks = (int(chunk_of.max()) + 1,)
            scores = tuple(expect(planes, "chunk_scores", chunks, "<f4").tolist())
        layers, heads, tokens = chunk_of.shape
        if start + tokens > _MOST_TOKENS:
            raise CorruptFrame(f"the segment begins at token {start}, which no conversation has")
        shared = _shared(codecs, head.get("basis"), basis, (layers, heads, head_dim))
        ranking = Ranking(start, chunk_of, scores)
        shapes = {
            plane: shape
            for name in codecs
            for plane, shape in _codec(name, shared, ranking).param_shapes(layers, heads, head_dim).items()
        }
        params = {plane: expect(planes, plane, shape, "<f4") for plane, shape in shapes.items()}
        return cls(codecs, DTYPES[dtype], head_dim, ranking, group_size, params, shared)


def find_codec(name: str) -> Codec:
    """The codec of that name, or UnknownCodec; not `archive`, which only a basis makes a codec."""
    if name not in CODECS:
        raise UnknownCodec(f"codec {name!r} is not known to this program; known: {', '.join(CODECS)}")
    return CODECS[name]


def _codec(name: str, basis: Basis | None, ranking: Ranking) -> Codec:
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


def encode_segment(
    codecs: str | Sequence[str],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ranking: Ranking,
    basis: bytes = b"",
) -> tuple[SegmentHeader, Iterator[tuple[int, int, bytes]]]:
    """Header, and the frames as (chunk, group, bytes), made as they are asked for.

    codecs: one name for all, or the name of each rank chunk's codec, of which the last serves all further chunks.
    basis: for codec `archive`, what `fit_basis` gave.
    keys, values: L layers of (H, T, D) exact KV in bfloat16, float16 or float32, on any device. The codecs have read
    them when this returns. Raises UnknownCodec, and CodecError for values that a codec cannot write.
    """
    assert len(keys) == len(values) == len(ranking.chunk_of) and ranking.chunk_of.size
    assert all(x.shape[:2] == ranking.chunk_of.shape[1:] and x.dtype == keys[0].dtype for x in (*keys, *values))
    names = _shortest((codecs,) if isinstance(codecs, str) else tuple(codecs), ranking.num_chunks)
    dtype, head_dim = keys[0].dtype, keys[0].shape[2]
    shared = Basis.from_bytes(basis, len(keys), len(keys[0]), head_dim) if names == (ARCHIVE,) else None
    found = [_codec(name, shared, ranking) for name in names]
    group_size = _group_size(ranking, found, head_dim, dtype)
    params, takes = _read(found, keys, values)
    header = SegmentHeader(names, dtype, head_dim, ranking, group_size, params, shared)
    return header, _frames(header, found, takes)


def decode_frame(header: SegmentHeader, chunk: int, group: int, blob: bytes, device: torch.device) -> list[LayerKV]:
    """One LayerKV per layer of the group, views of a tensor for all, rows in (head, time) order.

    Raises CorruptFrame if the bytes are damaged or are not this frame of this segment.
    """
    assert 0 <= chunk < header.ranking.num_chunks and 0 <= group < header.num_groups, (chunk, group)
    name, codec = header.codec(chunk), header.method(chunk)
    first, last = header.layers(group)
    counts = header.ranking.counts(chunk)[first:last]
    times = header.ranking.rows(chunk, first, last) % header.ranking.chunk_of.shape[2]
    positions = (times + header.ranking.start).astype(np.int32)
    rows = FrameRows(counts, header.head_dim, header.dtype, positions)
    head, planes = unpack(blob, limit=int(codec.layer_bytes(rows, scale_bytes=4).sum()))
    if head != _frame_head(header, chunk, group):
        raise CorruptFrame(f"not chunk {chunk} of layer group {group} in {name}: {str(head)[:120]}")
    params = {name: plane[first:last] for name, plane in header.params.items()}
    if header.basis:
        params = header.basis.of_layers(first, last)
    keys, values = (method.decode(planes, params, rows, device) for method in (codec.keys, codec.values))
    return _layers(counts, keys, values, torch.from_numpy(positions).to(keys.device))


def packed_bytes(header: SegmentHeader, chunk: int) -> int:
    """Bytes of one rank chunk's keys and values as encoded, before zstd: codes, scales, mins; plain numbers for `raw`.

    That is what memory would need to hold these pairs encoded. Positions, the ranking and the segment's parameters
    (`param_bytes`) are not counted. Scales count as float16; in the rare frame where they overflow it they take twice
    as much.
    """
    rows = FrameRows(header.ranking.counts(chunk), header.head_dim, header.dtype)
    return int(header.method(chunk).layer_bytes(rows, scale_bytes=2).sum())


def param_bytes(header: SegmentHeader) -> int:
    """Bytes of the parameters that serve all chunks of the segment."""
    return sum(plane.nbytes for plane in header.params.values())


def _shortest(names: tuple[str, ...], num_chunks: int) -> tuple[str, ...]:
    """The names of `num_chunks` chunks, without repeating the last."""
    assert names
    kept = names[:num_chunks]
    while len(kept) > 1 and kept[-1] == kept[-2]:
        kept = kept[:-1]
    return kept


def _group_size(ranking: Ranking, codecs: Sequence[Codec], head_dim: int, dtype: torch.dtype) -> int:
    """The most layers of which no frame exceeds _FRAME_BYTES, at least one; `codecs` is that of each chunk."""
    of_chunk = [codecs[min(chunk, len(codecs) - 1)] for chunk in range(ranking.num_chunks)]
    rows = [FrameRows(ranking.counts(chunk), head_dim, dtype) for chunk in range(ranking.num_chunks)]
    per_layer = np.stack([codec.layer_bytes(one, 4) for codec, one in zip(of_chunk, rows, strict=True)], axis=1)
    layers = len(per_layer)
    for groups in range(1, layers):
        size = -(-layers // groups)
        frames = np.add.reduceat(per_layer, np.arange(0, layers, size))
        if frames.max() <= _FRAME_BYTES:
            return size
    return 1


def _read(
    codecs: Sequence[Codec], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Planes, dict[Method, Take]]:
    """What each method of the codecs has read, and the parameters of all."""
    sides = {method: side for codec in codecs for method, side in ((codec.keys, keys), (codec.values, values))}
    params: Planes = {}
    takes: dict[Method, Take] = {}
    for method, side in sides.items():
        more, takes[method] = method.read(side)
        params |= more
    return params, takes


def _frames(
    header: SegmentHeader, codecs: Sequence[Codec], takes: dict[Method, Take]
) -> Iterator[tuple[int, int, bytes]]:
    per_layer = header.num_kv_heads * header.ranking.chunk_of.shape[2]
    for chunk in range(header.ranking.num_chunks):
        codec = codecs[min(chunk, len(codecs) - 1)]
        for group in range(header.num_groups):
            first, last = header.layers(group)
            rows = header.ranking.rows(chunk, first, last) + first * per_layer
            planes = {**takes[codec.keys](rows), **takes[codec.values](rows)}
            yield chunk, group, pack(_frame_head(header, chunk, group), planes, codec.bars)


def _frame_head(header: SegmentHeader, chunk: int, group: int) -> dict[str, Any]:
    return {"kind": "rows", "codec": header.codec(chunk), "chunk": chunk, "group": group}


def _layers(counts: npt.NDArray[np.int64], keys: Tensor, values: Tensor, positions: Tensor) -> list[LayerKV]:
    cu_seqlens = torch.zeros(len(counts), counts.shape[1] + 1, dtype=torch.int32)
    cu_seqlens[:, 1:] = torch.from_numpy(counts.cumsum(axis=1))
    per_layer = counts.sum(axis=1).tolist()
    parts = (*(rows.split_with_sizes(per_layer) for rows in (keys, values, positions)), cu_seqlens.unbind())
    return [LayerKV(*layer) for layer in zip(*parts, strict=True)]
