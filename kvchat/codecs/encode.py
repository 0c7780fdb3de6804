"""A segment's exact KV to frames, one per (rank chunk, layer group), and each frame back to ragged KV.

`read_segment` gives the planes of each frame where the exact KV lies, so that rows can go from there into memory;
`pack_frame` makes bytes of them, in any thread.

Rows of a frame stand in (layer, head, time) order and are one plane for all layers of the group, so that decoding is a
few large operations. Each rank chunk has a codec, so that the pairs that matter most can have the most bits. What every
frame needs is in the segment's header.

Letters: L layers, H KV heads, T tokens of the segment, N rows of a frame, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvchat.cache.segment import LayerKV, Ranking
from kvchat.codecs.archive import Basis
from kvchat.codecs.codec import Codec, Exact, FrameRows, Method, Takes, Tensors, group_size
from kvchat.codecs.frame import Planes, pack, unpack
from kvchat.codecs.header import ARCHIVE, SegmentHeader, codec_of
from kvchat.codecs.lossless import Raw
from kvchat.errors import CorruptFrame
from kvchat.sections import without_repeats


@dataclass(frozen=True, slots=True)
class Taken:
    """A frame that is not packed yet.

    rows     which rows it holds; where each stood is not told
    index    their flat indices into the (layers, H, T) of its layers, (N,) int64
    planes   the codec's planes, where the exact KV lies
    """

    chunk: int
    group: int
    rows: FrameRows
    index: Tensor
    planes: Tensors


class Reading(NamedTuple):
    """A segment as its codecs have read it: its header, the header's parameters as tensors, and its frames.

    Frames come by group, so that a group's exact KV may go when its last frame has been made.
    """

    header: SegmentHeader
    params: Tensors
    frames: Iterator[Taken]


def encode_segment(
    codecs: str | Sequence[str],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ranking: Ranking,
    basis: bytes = b"",
) -> tuple[SegmentHeader, Iterator[tuple[int, int, bytes]]]:
    """Header, and the frames as (chunk, group, bytes), by group and then chunk; arguments and errors as below."""
    header, _, frames = read_segment(codecs, keys, values, ranking, basis)
    return header, ((one.chunk, one.group, pack_frame(header, one.chunk, one.group, one.planes)) for one in frames)


def read_segment(
    codecs: str | Sequence[str],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    ranking: Ranking,
    basis: bytes = b"",
) -> Reading:
    """A segment with frames that are made as they are asked for.

    codecs: one name for all, or the name of each rank chunk's codec, of which the last serves all further chunks.
    basis: for codec `archive`, what `fit_basis` gave.
    keys, values: L layers of (H, T, D) exact KV in bfloat16, float16 or float32, on any device. They must stay as they
    are until the last frame of their layer has been made.

    Raises UnknownCodec, and CodecError for values that a codec cannot write, before there is any frame.
    """
    assert len(keys) == len(values) == len(ranking.chunk_of) and ranking.chunk_of.size
    assert all(x.shape[:2] == ranking.chunk_of.shape[1:] and x.dtype == keys[0].dtype for x in (*keys, *values))
    names = without_repeats(([codecs] if isinstance(codecs, str) else codecs)[: ranking.num_chunks])
    dtype, head_dim = keys[0].dtype, keys[0].shape[2]
    shared = Basis.from_bytes(basis, len(keys), len(keys[0]), head_dim) if names == (ARCHIVE,) else None
    found = [codec_of(name, shared, ranking) for name in names]
    size = group_size(ranking, found, head_dim, dtype)
    params, takes = _read(found, keys, values)
    planes = {name: plane.cpu().numpy() for name, plane in params.items()}
    header = SegmentHeader(names, dtype, head_dim, ranking, size, planes, shared)
    return Reading(header, params, _frames(header, found, takes, keys[0].device))


def pack_frame(header: SegmentHeader, chunk: int, group: int, planes: Tensors) -> bytes:
    """A frame as bytes."""
    on_cpu = {name: plane.cpu().numpy() for name, plane in planes.items()}
    return pack(_frame_head(header, chunk, group), on_cpu, header.method(chunk).bars)


def decode_frame(header: SegmentHeader, chunk: int, group: int, blob: bytes, device: torch.device) -> list[LayerKV]:
    """One LayerKV per layer of the group, views of a tensor for all, rows in (head, time) order.

    Raises CorruptFrame if the bytes are damaged or are not this frame of this segment.
    """
    codec, rows, planes, params = open_frame(header, chunk, group, blob)
    keys, values = (method.decode(planes, params, rows, device) for method in (codec.keys, codec.values))
    for method, decoded in ((codec.keys, keys), (codec.values, values)):
        # `raw` writes whatever there is; the others refuse what is not finite, so they cannot have written it.
        if not isinstance(method, Raw) and len(decoded) and not bool(torch.stack(decoded.aminmax()).isfinite().all()):
            name = header.codec(chunk)
            raise CorruptFrame(f"chunk {chunk} of layer group {group} in {name} decodes to numbers that are not finite")
    return LayerKV.split(rows.counts, keys, values, torch.from_numpy(rows.positions).to(keys.device))


def open_frame(
    header: SegmentHeader, chunk: int, group: int, blob: bytes, placed: bool = True
) -> tuple[Codec, FrameRows, Planes, Planes]:
    """A frame's codec, which rows it holds, its planes, and the parameters of its layers. Raises CorruptFrame.

    placed: whether where each row stood is asked, which takes as long as all else where the frame was checked before.
    """
    assert 0 <= chunk < header.ranking.num_chunks and 0 <= group < header.num_groups, (chunk, group)
    name, codec = header.codec(chunk), header.method(chunk)
    first, last = header.layers(group)
    rows = FrameRows(header.ranking.counts(chunk)[first:last], header.head_dim, header.dtype)
    if placed:
        times = header.ranking.rows(chunk, first, last) % header.ranking.chunk_of.shape[2]
        rows = replace(rows, positions=(times + header.ranking.start).astype(np.int32))
    head, planes = unpack(blob, limit=int(codec.layer_bytes(rows, scale_bytes=4).sum()))
    if head != _frame_head(header, chunk, group):
        raise CorruptFrame(f"not chunk {chunk} of layer group {group} in {name}: {str(head)[:120]}")
    params = {name: plane[first:last] for name, plane in header.params.items()}
    if header.basis:
        params = header.basis.of_layers(first, last)
    return codec, rows, planes, params


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


def _read(
    codecs: Sequence[Codec], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensors, dict[Method, Takes]]:
    """What each method of the codecs has read, and the parameters of all."""
    of_keys, of_values = Exact(keys), Exact(values)
    sides = {method: side for codec in codecs for method, side in ((codec.keys, of_keys), (codec.values, of_values))}
    params: dict[str, Tensor] = {}
    takes: dict[Method, Takes] = {}
    for method, side in sides.items():
        more, takes[method] = method.read(side)
        params |= more
    return params, takes


def _frames(
    header: SegmentHeader, codecs: Sequence[Codec], takes: dict[Method, Takes], device: torch.device
) -> Iterator[Taken]:
    chunks = range(header.ranking.num_chunks)
    counts = [header.ranking.counts(chunk) for chunk in chunks]
    for group in range(header.num_groups):
        first, last = header.layers(group)
        of_group = {method: read(first, last) for method, read in takes.items()}
        rows = [header.ranking.rows(chunk, first, last) for chunk in chunks]
        # All at once: each copy to a device waits for what that is doing.
        index = torch.from_numpy(np.concatenate(rows)).to(device).split_with_sizes([len(part) for part in rows])
        for chunk in chunks:
            codec = codecs[min(chunk, len(codecs) - 1)]
            frame = FrameRows(counts[chunk][first:last], header.head_dim, header.dtype)
            planes = {**of_group[codec.keys](frame, index[chunk]), **of_group[codec.values](frame, index[chunk])}
            yield Taken(chunk, group, frame, index[chunk], planes)
        del of_group, planes  # or they would be in memory beside the next


def _frame_head(header: SegmentHeader, chunk: int, group: int) -> dict[str, Any]:
    return {"kind": "rows", "codec": header.codec(chunk), "chunk": chunk, "group": group}
