"""The cache of one conversation: per layer, sealed rows (ragged, packed) and the open tail (dense, causal).

With `tail.py` this is all that touches transformers' cache API. `SegmentedCache` is handed to the network as
`past_key_values` and, once more, as the keyword `segmented_cache`, which transformers passes through to the registered
attention function.

Sealed rows of a layer stand in one canonical order: head, then segment, then rank chunk, then time. So the order in
which pieces come and go leaves no trace, and dropping chunks gives the same tensors as never having attached them.

Letters: H KV heads, T tokens, N sealed rows of a layer, D head_dim, q new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvchat.cache.segment import LayerKV
from kvchat.cache.tail import Tail


class Tap(Protocol):
    """Sees what attention sees in a forward pass, after RoPE: scorers need no code for any model.

    Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens.
    """

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Called once a layer: `query` (H * G, q, D), and the whole tail, (H, T, D), the last q of them its own."""


class Piece(NamedTuple):
    """One rank chunk of one segment; sorts in canonical order."""

    start: int
    """Position of the segment's first token: segments of one conversation never share it."""
    chunk: int


class RaggedLayer(Tail):
    """One layer: `sealed` is unchanged during a turn, the tail grows in place. Nothing is re-packed per token."""

    def __init__(self, num_key_value_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(num_key_value_heads, head_dim, dtype, device)
        self.counts: dict[Piece, list[int]] = {}
        self.sealed = LayerKV.dense(self.keys, self.values, 0)

    # -- sealed rows -------------------------------------------------------------------------------------------------

    def attach(self, pieces: Mapping[Piece, LayerKV]) -> None:
        """Add rows; a piece that is there already is an error of ours."""
        assert not self.counts.keys() & pieces.keys()
        sources = dict.fromkeys(self.counts, self.sealed) | dict(pieces)
        new_counts = {piece: rows.cu_seqlens.diff().tolist() for piece, rows in pieces.items()}
        self._pack(sources, self._offsets() | {p: rows.cu_seqlens.tolist() for p, rows in pieces.items()}, new_counts)

    def keep(self, pieces: Collection[Piece]) -> None:
        """Drop every sealed piece that is not named; its memory is freed."""
        if len(pieces) < len(self.counts):
            self._pack(dict.fromkeys(pieces, self.sealed), self._offsets(), {})

    def crop(self, position: int) -> None:
        """Forget every token from `position` on, in the tail and inside sealed segments."""
        if position >= self.tail_start:
            self.tail_length = min(self.tail_length, position - self.tail_start)
            return
        self.drop_tail(self.tail_length)
        old, offsets = self.sealed, self._offsets()
        self.sealed = old.before(position)
        # Rows of a piece stand in time order, so what remains of each run is its beginning.
        remain = (old.positions < position).cpu().cumsum(0)
        self.counts = {
            piece: [_between(remain, low, low + n) for low, n in zip(offsets[piece], held, strict=True)]
            for piece, held in self.counts.items()
            if piece.start < position
        }
        self.tail_start = position

    def _offsets(self) -> dict[Piece, list[int]]:
        """Where each attached piece's rows begin in `sealed`, per head."""
        offsets: dict[Piece, list[int]] = {piece: [] for piece in self.counts}
        for head, low in enumerate(self.sealed.bounds[:-1]):
            for piece in sorted(self.counts):
                offsets[piece].append(low)
                low += self.counts[piece][head]
        return offsets

    def _pack(
        self, sources: Mapping[Piece, LayerKV], offsets: Mapping[Piece, Sequence[int]], added: Mapping[Piece, list[int]]
    ) -> None:
        """Rebuild `sealed` from the given pieces in canonical order: one concatenation of as few slices as can be."""
        counts = {piece: added.get(piece) or self.counts[piece] for piece in sorted(sources)}
        slices: list[tuple[LayerKV, int, int]] = []
        cu_seqlens = [0]
        for head in range(len(self.sealed.cu_seqlens) - 1):
            for piece, held in counts.items():
                low, high = offsets[piece][head], offsets[piece][head] + held[head]
                if slices and slices[-1][0] is sources[piece] and slices[-1][2] == low:
                    slices[-1] = (sources[piece], slices[-1][1], high)
                elif high > low:
                    slices.append((sources[piece], low, high))
            cu_seqlens.append(sum(high - low for _, low, high in slices))
        self.counts = counts
        self.sealed = LayerKV(
            self._concat([rows.keys[low:high] for rows, low, high in slices], self.sealed.keys),
            self._concat([rows.values[low:high] for rows, low, high in slices], self.sealed.values),
            self._concat([rows.positions[low:high] for rows, low, high in slices], self.sealed.positions),
            torch.tensor(cu_seqlens, dtype=torch.int32),
        )

    @staticmethod
    def _concat(parts: Sequence[Tensor], like: Tensor) -> Tensor:
        return torch.cat(list(parts)) if parts else like.new_empty(0, *like.shape[1:])


def _between(cumulative: Tensor, low: int, high: int) -> int:
    """The sum of elements [low, high) of what `cumulative` is the running sum of."""
    return int(cumulative[high - 1] - (cumulative[low - 1] if low else 0)) if high > low else 0


class SegmentedCache(Cache):  # type: ignore[misc]
    """All layers of one conversation. `num_seen` counts tokens and gives positions; rows are fewer after eviction."""

    def __init__(
        self, num_layers: int, num_key_value_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(layers=[RaggedLayer(num_key_value_heads, head_dim, dtype, device) for _ in range(num_layers)])
        self.tap: Tap | None = None

    @property
    def num_seen(self) -> int:
        """Logical length: tokens that the cache stands for."""
        return int(self.layers[0].get_seq_length())

    @property
    def tail_start(self) -> int:
        """Position of the open tail's first token."""
        return int(self.layers[0].tail_start)

    @property
    def tail_length(self) -> int:
        """Tokens in the open tail."""
        return int(self.layers[0].tail_length)

    @property
    def num_sealed_rows(self) -> int:
        """KV pairs that sealed segments hold, over all layers and heads."""
        return sum(layer.sealed.num_kept for layer in self.layers)

    @property
    def sealed_bytes(self) -> int:
        """Bytes of the storages behind sealed keys and values."""
        tensors = [part for layer in self.layers for part in (layer.sealed.keys, layer.sealed.values)]
        return sum(part.untyped_storage().nbytes() for part in tensors)

    @property
    def pieces(self) -> list[Piece]:
        """Attached pieces in canonical order."""
        return sorted(self.layers[0].counts)

    def rows(self, piece: Piece) -> int:
        """Rows that a piece holds over all layers and heads."""
        return sum(sum(layer.counts[piece]) for layer in self.layers)

    def attach(self, pieces: Mapping[Piece, Sequence[LayerKV]], end: int) -> None:
        """Add sealed pieces (a LayerKV a layer) of tokens before `end`, to which an empty tail moves on."""
        assert self.tail_length == 0 or end <= self.tail_start
        for index, layer in enumerate(self.layers):
            layer.attach({piece: rows[index] for piece, rows in pieces.items()})
            layer.tail_start = max(layer.tail_start, end)

    def keep(self, pieces: Collection[Piece]) -> None:
        """Drop all other sealed pieces."""
        for layer in self.layers:
            layer.keep(pieces)

    def crop(self, position: int) -> None:
        """Forget every token from `position` on."""
        for layer in self.layers:
            layer.crop(position)

    def drop_tail(self, tokens: int) -> None:
        """Take the first `tokens` of the tail away."""
        for layer in self.layers:
            layer.drop_tail(tokens)

    # Rows written during a forward pass are inference tensors, which nothing outside inference mode may write to.
    @torch.inference_mode()
    def append_tail(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Append saved exact KV, a pair of (H, T, D) a layer."""
        for layer, (keys, values) in zip(self.layers, rows, strict=True):
            layer.append_tail(keys, values)

    @contextmanager
    def scratch(self, tap: Tap | None = None) -> Iterator[None]:
        """Whatever is computed inside leaves no trace in the cache; `tap` sees every attention call meanwhile."""
        length = self.tail_length
        self.tap = tap
        try:
            yield
        finally:
            self.tap = None
            for layer in self.layers:
                layer.tail_length = length
