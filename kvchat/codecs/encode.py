"""A segment's exact KV to frames, one per (rank chunk, layer group), and each frame back to ragged KV.

Rows of a frame stand in (layer, head, time) order and are one plane for all layers of the group, so that decoding is a
few large operations. The segment's header holds what every frame needs: ranking, geometry, the codec's parameters.

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
from kvchat.codecs.codec import Codec, FrameRows, Take
from kvchat.codecs.frame import Planes, expect, pack, unpack
from kvchat.codecs.lossless import Raw
from kvchat.codecs.quant import K8V8
from kvchat.errors import CorruptFrame, UnknownCodec

CODECS: dict[str, Codec] = {"raw": Raw(), "k8v8": K8V8()}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_FRAME_BYTES = 4 * 1024 * 1024
_HEADER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What is needed before any frame of the segment can be decoded.

    group_size  layers per frame (the last group may have fewer)
    params      the codec's planes for the whole segment, first axis L
    """

    codec: str
    dtype: torch.dtype
    head_dim: int
    ranking: Ranking
    group_size: int
    params: Planes

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

    def layers(self, group: int) -> tuple[int, int]:
        """First layer of a group and one past its last."""
        return group * self.group_size, min((group + 1) * self.group_size, self.num_layers)

    def to_bytes(self) -> bytes:
        """The header as one frame."""
        head = {
            "kind": "segment",
            "codec": self.codec,
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": self.head_dim,
            "start": self.ranking.start,
            "group_size": self.group_size,
        }
        return pack(head, {"chunk_of": self.ranking.chunk_of, **self.params})

    @classmethod
    def from_bytes(cls, blob: bytes) -> SegmentHeader:
        """The header that `to_bytes` wrote. Raises CorruptFrame, or UnknownCodec for one of a newer version."""
        head, planes = unpack(blob, limit=_HEADER_BYTES)
        match head:
            case {
                "kind": "segment",
                "codec": str(name),
                "dtype": str(dtype),
                "head_dim": int(head_dim),
                "start": int(start),
                "group_size": int(group_size),
            } if dtype in DTYPES and head_dim > 0 and start >= 0 and group_size > 0:
                codec = find_codec(name)
            case _:
                raise CorruptFrame(f"not a segment's header: {str(head)[:120]}")
        chunk_of = planes.pop("chunk_of", np.zeros(0, np.uint8))
        if chunk_of.ndim != 3 or chunk_of.dtype != np.uint8 or not chunk_of.size:
            raise CorruptFrame(f"the segment's ranking has shape {chunk_of.shape}, expected (layers, heads, tokens)")
        layers, heads, _ = chunk_of.shape
        shapes = codec.param_shapes(layers, heads, head_dim)
        params = {key: expect(planes, key, shape, "<f4") for key, shape in shapes.items()}
        return cls(name, DTYPES[dtype], head_dim, Ranking(start, chunk_of), group_size, params)


def find_codec(name: str) -> Codec:
    """The codec of that name, or UnknownCodec."""
    if name not in CODECS:
        raise UnknownCodec(f"codec {name!r} is not known to this program; known: {', '.join(CODECS)}")
    return CODECS[name]


def encode_segment(
    codec: str, keys: Sequence[Tensor], values: Sequence[Tensor], ranking: Ranking
) -> tuple[SegmentHeader, Iterator[tuple[int, int, bytes]]]:
    """Header, and the frames as (chunk, group, bytes), made as they are asked for.

    keys, values: L layers of (H, T, D) exact KV in bfloat16, float16 or float32, on any device. The codec has read them
    when this returns. Raises UnknownCodec, and CodecError for values that the codec cannot write.
    """
    assert len(keys) == len(values) == len(ranking.chunk_of) and ranking.chunk_of.size
    assert all(x.shape[:2] == ranking.chunk_of.shape[1:] and x.dtype == keys[0].dtype for x in (*keys, *values))
    method, dtype, head_dim = find_codec(codec), keys[0].dtype, keys[0].shape[2]
    params, take = method.read(keys, values)
    group_size = _group_size(ranking, method.row_bytes(head_dim, dtype))
    header = SegmentHeader(codec, dtype, head_dim, ranking, group_size, params)
    return header, _frames(header, method, take)


def decode_frame(header: SegmentHeader, chunk: int, group: int, blob: bytes, device: torch.device) -> list[LayerKV]:
    """One LayerKV per layer of the group, views of a tensor for all, rows in (head, time) order.

    Raises CorruptFrame if the bytes are damaged or are not this frame of this segment.
    """
    assert 0 <= chunk < header.ranking.num_chunks and 0 <= group < header.num_groups, (chunk, group)
    codec = find_codec(header.codec)
    first, last = header.layers(group)
    counts = header.ranking.counts(chunk)[first:last]
    rows = FrameRows(counts, header.head_dim, header.dtype)
    head, planes = unpack(blob, limit=rows.shape[0] * codec.row_bytes(header.head_dim, header.dtype))
    if head != _frame_head(header, chunk, group):
        raise CorruptFrame(f"not chunk {chunk} of layer group {group} in {header.codec}: {str(head)[:120]}")
    params = {name: plane[first:last] for name, plane in header.params.items()}
    keys, values = codec.decode(planes, params, rows, device)
    return _layers(header.ranking, chunk, first, counts, keys, values)


def _group_size(ranking: Ranking, row_bytes: int) -> int:
    """The most layers of which no frame exceeds _FRAME_BYTES, at least one."""
    per_layer = np.stack([ranking.counts(chunk).sum(axis=1) for chunk in range(ranking.num_chunks)], axis=1)
    layers = len(per_layer)
    for groups in range(1, layers):
        size = -(-layers // groups)
        frames = np.add.reduceat(per_layer, np.arange(0, layers, size))
        if frames.max() * row_bytes <= _FRAME_BYTES:
            return size
    return 1


def _frames(header: SegmentHeader, codec: Codec, take: Take) -> Iterator[tuple[int, int, bytes]]:
    per_layer = header.num_kv_heads * header.ranking.chunk_of.shape[2]
    for chunk in range(header.ranking.num_chunks):
        for group in range(header.num_groups):
            first, last = header.layers(group)
            planes = take(header.ranking.rows(chunk, first, last) + first * per_layer)
            yield chunk, group, pack(_frame_head(header, chunk, group), planes, codec.bars)


def _frame_head(header: SegmentHeader, chunk: int, group: int) -> dict[str, Any]:
    return {"kind": "rows", "codec": header.codec, "chunk": chunk, "group": group}


def _layers(
    ranking: Ranking, chunk: int, first: int, counts: npt.NDArray[np.int64], keys: Tensor, values: Tensor
) -> list[LayerKV]:
    times = ranking.rows(chunk, first, first + len(counts)) % ranking.chunk_of.shape[2]
    positions = torch.from_numpy((times + ranking.start).astype(np.int32)).to(keys.device)
    cu_seqlens = torch.zeros(len(counts), counts.shape[1] + 1, dtype=torch.int32)
    cu_seqlens[:, 1:] = torch.from_numpy(counts.cumsum(axis=1))
    per_layer = counts.sum(axis=1).tolist()
    parts = (*(rows.split_with_sizes(per_layer) for rows in (keys, values, positions)), cu_seqlens.unbind())
    return [LayerKV(*layer) for layer in zip(*parts, strict=True)]
