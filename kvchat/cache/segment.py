"""KV of one layer, ragged, and the ranking that cuts a segment into rank chunks.

A segment is the KV of one or several finished turns, sealed once. All its pairs are ranked at sealing and cut into rank
chunks; memory holds a prefix of the chunks, the store holds all.

Letters: L layers, H KV heads, T tokens of a segment, N kept pairs of a layer (all heads packed), D head_dim, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerKV:
    """Ragged KV of one layer: every KV head may keep a different number of tokens, even none.

    keys, values  (N, D)      head 0's rows first, then head 1's; keys keep the RoPE of their original position
    positions     (N,) int32  where each pair stood in the conversation
    cu_seqlens    (H + 1,)    int32 on the CPU; head h owns rows cu_seqlens[h] : cu_seqlens[h + 1]
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    def __post_init__(self) -> None:
        assert self.keys.shape == self.values.shape and self.keys.dim() == 2
        assert self.positions.shape == self.keys.shape[:1] and self.positions.dtype == torch.int32
        assert self.cu_seqlens.dtype == torch.int32

    @property
    def num_kept(self) -> int:
        """Rows held."""
        return len(self.keys)

    @cached_property
    def bounds(self) -> list[int]:
        """`cu_seqlens` as numbers."""
        return [int(bound) for bound in self.cu_seqlens.tolist()]

    @cached_property
    def even_rows(self) -> int | None:
        """Rows of each head if all heads hold as many, else None."""
        lengths = {high - low for low, high in pairwise(self.bounds)}
        return lengths.pop() if len(lengths) == 1 else None

    @classmethod
    def dense(cls, keys: Tensor, values: Tensor, start: int) -> LayerKV:
        """Every pair of (H, T, D) keys and values whose first token stands at `start`."""
        heads, tokens, dim = keys.shape
        positions = torch.arange(start, start + tokens, dtype=torch.int32, device=keys.device).repeat(heads)
        cu_seqlens = torch.arange(heads + 1, dtype=torch.int32) * tokens
        return cls(keys.reshape(-1, dim), values.reshape(-1, dim), positions, cu_seqlens)

    @classmethod
    def split(cls, counts: npt.NDArray[np.int64], keys: Tensor, values: Tensor, positions: Tensor) -> list[LayerKV]:
        """Layers of (layers, H) `counts` pairs that lie one after another, as views."""
        cu_seqlens = torch.zeros(len(counts), counts.shape[1] + 1, dtype=torch.int32)
        cu_seqlens[:, 1:] = torch.from_numpy(counts.cumsum(axis=1))
        per_layer = counts.sum(axis=1).tolist()
        parts = (*(rows.split_with_sizes(per_layer) for rows in (keys, values, positions)), cu_seqlens.unbind())
        return [cls(*layer) for layer in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Ranking:
    """Which rank chunk each pair of a segment lies in; within a chunk rows stand in time order.

    start     place of the segment's first token
    chunk_of  (L, H, T) uint8, 0 = best
    scores    the median score of each chunk, never rising; None where a program that did not tell them sealed it
    method    how it was ranked (`CompressConfig.method`): scores of different methods do not compare
    offset    by how much the positions at which its keys were computed are smaller than their places; less than 0 if
              they were computed in another conversation, further on
    onward    by how much positions are smaller than places behind it; None: as much as its own
    """

    start: int
    chunk_of: npt.NDArray[np.uint8]
    scores: tuple[float, ...] | None = None
    method: str = ""
    offset: int = 0
    onward: int | None = None

    def __post_init__(self) -> None:
        assert self.chunk_of.ndim == 3 and self.chunk_of.dtype == np.uint8

    @classmethod
    def single(cls, start: int, layers: int, heads: int, tokens: int) -> Ranking:
        """All pairs in one chunk: a segment that is not ranked."""
        return cls(start, np.zeros((layers, heads, tokens), np.uint8))

    @property
    def end(self) -> int:
        """One past the place of the last token."""
        return self.start + int(self.chunk_of.shape[2])

    @property
    def position(self) -> int:
        """At which the first token's keys were computed."""
        return self.start - self.offset

    @property
    def next_offset(self) -> int:
        """That of the conversation when this was its newest segment."""
        return self.offset if self.onward is None else self.onward

    @cached_property
    def num_chunks(self) -> int:
        """Chunks, at least one."""
        return int(self.chunk_of.max(initial=0)) + 1

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Pairs of every chunk over all layers and heads, (C,)."""
        # Chunks are few; numpy's bincount would make a copy in numbers of 8 bytes.
        return np.array([np.count_nonzero(self.chunk_of == chunk) for chunk in range(self.num_chunks)], np.int64)

    def counts(self, chunk: int) -> npt.NDArray[np.int64]:
        """Pairs of a chunk, (L, H)."""
        # numpy adds numbers of 32 bits three times as fast as of 64.
        counts: npt.NDArray[np.int64] = (self.chunk_of == chunk).sum(axis=2, dtype=np.uint32).astype(np.int64)
        return counts

    def rows(self, chunk: int, first_layer: int, last_layer: int) -> npt.NDArray[np.int64]:
        """Flat indices into the (layers, H, T) block of layers [first_layer, last_layer), by layer, head, time."""
        return np.flatnonzero(self.chunk_of[first_layer:last_layer] == chunk)
