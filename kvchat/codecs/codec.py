"""What a codec is: how the KV pairs of a frame become planes of bytes, and back.

A codec joins a method for keys and a method for values. Each writes its own planes, named after its side.

Letters: L layers, H KV heads, T tokens, N rows of a frame, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.segment import Ranking
from kvchat.codecs.frame import Planes

_FRAME_BYTES = 16 * 1024 * 1024
"""Sealing and loading take time by the frame; but those of a short conversation should still occupy some threads."""

Tensors = Mapping[str, Tensor]
"""Planes before they are packed, where the exact KV lies."""


@dataclass(frozen=True, slots=True)
class FrameRows:
    """The rows of a frame: `counts` (layers, H) in (layer, head, time) order, each of `head_dim` numbers of `dtype`.

    `positions` (N,) says where each stood in the conversation, for who decodes.
    """

    counts: npt.NDArray[np.int64]
    head_dim: int
    dtype: torch.dtype
    positions: npt.NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return int(self.counts.sum()), self.head_dim

    @property
    def per_layer(self) -> npt.NDArray[np.int64]:
        """Rows of each layer, (layers,)."""
        rows: npt.NDArray[np.int64] = self.counts.sum(axis=1)
        return rows


Take = Callable[[FrameRows, Tensor], Tensors]
"""Rows of a frame, and their flat indices (N,) int64 into its layers' (layers, H, T), to their planes."""

Takes = Callable[[int, int], Take]
"""A group of layers, the first and one past the last, to what takes rows of them."""


@dataclass(frozen=True)
class Exact:
    """Exact keys or values of a segment: layers of (H, T, D)."""

    layers: Sequence[Tensor]

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.layers[0].shape[1])

    def of_layers(self, first: int, last: int) -> Exact:
        """Those of layers [first, last)."""
        return Exact([self.layers[index] for index in range(first, last)])

    def pick(self, rows: FrameRows, index: Tensor) -> Tensor:
        """The rows (N, D) of a frame over all these layers, given their flat indices; no layer is copied whole."""
        tokens, parts = self.tokens, index.split_with_sizes(rows.per_layer.tolist())
        picked = []
        for layer, part in zip(self.layers, parts, strict=True):
            heads, _, dim = layer.shape
            # A tail has room between its heads; indices can step over it where a row is one piece.
            kept = layer if layer.stride()[1:] == (dim, 1) and layer.stride(0) % dim == 0 else layer.contiguous()
            room = kept.stride(0) // dim
            flat = kept.as_strided(((heads - 1) * room + tokens, dim), (dim, 1))
            head, token = part // tokens % heads, part % tokens
            picked.append(flat.index_select(0, head * room + token))
        return torch.cat(picked)


class Method(Protocol):
    """One way to write keys or values. Stateless; decoding depends on bytes alone, not on device or thread count."""

    @property
    def bars(self) -> Mapping[str, float]:
        """For `frame.pack`: how far zstd must shrink a plane to be worth its time."""

    def layer_bytes(self, rows: FrameRows, scale_bytes: int) -> npt.NDArray[np.int64]:
        """Bytes of each layer's planes before zstd, (layers,), if a scale, min or norm takes `scale_bytes`."""

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Float32 planes that serve the whole segment and lie in its header; the first axis is L."""

    def read(self, exact: Exact) -> tuple[Tensors, Takes]:
        """Parameters, and what takes rows of the exact KV. Raises CodecError for what it cannot write."""

    def decode(self, planes: Planes, params: Planes, rows: FrameRows, device: torch.device) -> Tensor:
        """The rows (N, D); `params` are those of the frame's layers. Raises CorruptFrame."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A method for keys and one for values."""

    keys: Method
    values: Method

    @property
    def bars(self) -> Mapping[str, float]:
        """Those of both sides."""
        return {**self.keys.bars, **self.values.bars}

    def layer_bytes(self, rows: FrameRows, scale_bytes: int = 2) -> npt.NDArray[np.int64]:
        """Bytes of each layer's planes of both sides before zstd, (layers,)."""
        return self.keys.layer_bytes(rows, scale_bytes) + self.values.layer_bytes(rows, scale_bytes)

    def param_shapes(self, layers: int, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Those of both sides."""
        of_keys, of_values = (side.param_shapes(layers, heads, head_dim) for side in (self.keys, self.values))
        return {**of_keys, **of_values}


def group_size(ranking: Ranking, codecs: Sequence[Codec], head_dim: int, dtype: torch.dtype) -> int:
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
