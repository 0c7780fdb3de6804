"""The cache of one conversation: per layer, sealed rows (ragged, packed) and the open tail (dense, causal).

With `tail.py` this is all that touches transformers' cache API. `SegmentedCache` is handed to the network as
`past_key_values` and, once more, as the keyword `segmented_cache`, which transformers passes through to the registered
attention function.

Sealed rows of a layer stand in one canonical order: head, then segment, then rank chunk, then time. So the order in
which pieces come and go leaves no trace, and dropping chunks gives the same tensors as never having attached them.

Letters: H KV heads, T tokens, N sealed rows of a layer, D head_dim, q new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvchat.cache.coded import CHUNK, PLAIN, ROWS, START, CodedKV, Form
from kvchat.cache.pack import Runs, before, merged, pack
from kvchat.cache.segment import LayerKV
from kvchat.cache.tail import Tail

Decode = Callable[[CodedKV], LayerKV]
"""Rows in any form to plain numbers, for passes over many tokens."""


class Tap(Protocol):
    """Sees what attention sees in a forward pass, after RoPE: scorers need no code for any model.

    Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens.
    """

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Called once a layer: `query` (H * G, q, D), and the whole tail, (H, T, D), the last q of them its own."""


class Step(Protocol):
    """Reads the cache for one new token, of which only the device knows the number."""

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention in layer `index`: (H * G, 1, D) queries over sealed rows and the tail, (H, room, D)."""


class Piece(NamedTuple):
    """One rank chunk of one segment; sorts in canonical order."""

    start: int
    """Position of the segment's first token: segments of one conversation never share it."""
    chunk: int


class RaggedLayer(Tail):
    """One layer: sealed rows are unchanged during a turn, the tail grows in place. Nothing is re-packed per token."""

    def __init__(
        self,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        decode: Decode | None = None,
    ) -> None:
        super().__init__(num_key_value_heads, head_dim, dtype, device)
        self._decode = decode
        self._nothing = LayerKV.dense(self.keys, self.values, 0)
        self.forms: tuple[CodedKV, ...] = ()
        """Sealed rows, those of each form packed together."""
        self._plain: LayerKV | None = self._nothing

    @property
    def sealed(self) -> LayerKV:
        """Sealed rows as plain numbers: as they lie, or decoded for who asks."""
        if self._plain is not None:
            return self._plain
        assert self._decode is not None
        return merged(self.forms, [self._decode(form) for form in self.forms])

    @property
    def pieces(self) -> set[Piece]:
        """What is attached."""
        return _pieces(self.forms)

    def attach(self, pieces: Sequence[CodedKV]) -> None:
        """Add rows; a piece that is there already is an error of ours."""
        assert not self.pieces & _pieces(pieces)
        self._set([(rows, rows.runs) for rows in (*self.forms, *pieces)])

    def keep(self, pieces: Collection[Piece]) -> None:
        """Drop every sealed piece that is not named; its memory is freed."""
        if dropped := self.pieces.difference(pieces):
            self._set([(form, form.runs[~_of_pieces(form.runs, dropped)]) for form in self.forms])

    def crop(self, position: int) -> None:
        """Forget every token from `position` on, in the tail and inside sealed segments."""
        if position >= self.tail_start:
            self.tail_length = min(self.tail_length, position - self.tail_start)
            return
        self.drop_tail(self.tail_length)
        cropped = [before(form, position) for form in self.forms]
        self._set([(form, form.runs) for form in cropped])
        self.tail_start = position

    def _set(self, chosen: Sequence[tuple[CodedKV, Runs]]) -> None:
        """Hold these runs and nothing else, what has one form packed together."""
        forms: dict[Form, list[tuple[CodedKV, Runs]]] = {}
        for rows, runs in chosen:
            if len(runs):
                forms.setdefault(rows.form, []).append((rows, runs))
        self.forms = tuple(pack(*zip(*forms[form], strict=True)) for form in sorted(forms, reverse=True))
        if not self.forms:
            self._plain = self._nothing
        else:
            self._plain = self.forms[0].rows() if forms.keys() == {PLAIN} else None


def _of_pieces(runs: Runs, pieces: Collection[Piece]) -> npt.NDArray[np.bool_]:
    """Which runs belong to one of these pieces."""
    # One number for a place: there are fewer than 256 chunks.
    numbers = [piece.start << 8 | piece.chunk for piece in pieces]
    found: npt.NDArray[np.bool_] = np.isin(runs[:, START] << 8 | runs[:, CHUNK], numbers)
    return found


def _pieces(parts: Iterable[CodedKV]) -> set[Piece]:
    """The pieces whose rows these are."""
    # Every head has a run of each piece; numpy finds the few that differ.
    places = [np.unique(part.runs[:, [START, CHUNK]], axis=0).tolist() for part in parts]
    return {Piece(*place) for some in places for place in some}


class SegmentedCache(Cache):  # type: ignore[misc]
    """All layers of one conversation. `num_seen` counts tokens and gives positions; rows are fewer after eviction."""

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        decode: Decode | None = None,
    ):
        shape = (num_key_value_heads, head_dim, dtype, device, decode)
        super().__init__(layers=[RaggedLayer(*shape) for _ in range(num_layers)])
        self.encoded = decode is not None
        """Whether rows may be attached in another form than as plain numbers."""
        self.tap: Tap | None = None
        self.step: Step | None = None

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
        return sum(len(form.positions) for layer in self.layers for form in layer.forms)

    @property
    def sealed_bytes(self) -> int:
        """Bytes of the storages behind sealed keys and values, with their scales."""
        tensors = [plane for layer in self.layers for form in layer.forms for plane in form.planes]
        return sum(plane.untyped_storage().nbytes() for plane in tensors)

    def nbytes(self, start: int) -> int:
        """Bytes that the segment at `start` takes as its rows lie."""
        return sum(form.nbytes(start) for layer in self.layers for form in layer.forms)

    @property
    def pieces(self) -> list[Piece]:
        """Attached pieces in canonical order."""
        return sorted(self.layers[0].pieces)

    def rows(self, piece: Piece) -> int:
        """Rows that a piece holds over all layers and heads."""
        runs = np.concatenate([form.runs for layer in self.layers for form in layer.forms])
        return int(runs[(runs[:, [START, CHUNK]] == piece).all(1), ROWS].sum())

    def attach(self, pieces: Mapping[Piece, Sequence[LayerKV | CodedKV]], end: int) -> None:
        """Add sealed pieces (rows of every layer) of tokens before `end`, to which an empty tail moves on."""
        assert self.tail_length == 0 or end <= self.tail_start
        for index, layer in enumerate(self.layers):
            given = ((piece, rows[index]) for piece, rows in pieces.items())
            layer.attach([CodedKV.plain(rows, *piece) if isinstance(rows, LayerKV) else rows for piece, rows in given])
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
    def stepping(self, step: Step, row: Tensor) -> Iterator[None]:
        """Inside, a forward pass of one token writes to `row` (1,) of the tail's room, and `step` reads the cache."""
        self.step = step
        for layer in self.layers:
            layer.row = row
        try:
            yield
        finally:
            self.step = None
            for layer in self.layers:
                layer.row = None

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
