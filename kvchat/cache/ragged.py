"""The cache of one conversation: what all layers hold.

With `tail.py` this is all that touches transformers' cache API. `SegmentedCache` is handed to the network as
its cache and, once more, as the keyword `segmented_cache`, which transformers passes through to the registered
attention function.

Letters: H KV heads, T tokens, D head_dim, q new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvchat.cache.coded import CHUNK, ROWS, START, CodedKV
from kvchat.cache.gap import NO_GAP, Gap
from kvchat.cache.layer import Decode, Piece, RaggedLayer, Turn, unturned
from kvchat.cache.marks import Marks
from kvchat.cache.segment import LayerKV


class Tap(Protocol):
    """Sees what attention sees in a forward pass, after RoPE: scorers need no code for any model.

    Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens.
    """

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Called once a layer: `query` (H * G, q, D), and the whole tail, (H, T, D), the last q of them its own."""


@runtime_checkable
class Enters(Protocol):
    """A tap that also sees what enters attention."""

    def enter(self, layer: int, states: Tensor) -> None:
        """Called once a layer, before `observe`: (q, n) normed states of the pass's tokens."""


class Step(Protocol):
    """Reads the cache for one new token, of which only the device knows the number."""

    def attend(self, index: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Attention in layer `index`: (H * G, 1, D) queries over sealed rows and the tail, (H, room, D)."""


class SegmentedCache(Cache):  # type: ignore[misc]
    """All layers of one conversation. `num_seen` counts tokens and gives places; rows are fewer after eviction.

    A token's place is its number in the conversation, which never changes. Its position is what RoPE sees: the same,
    until the conversation is re-based (`arrange`) because it has more tokens than the model has positions.
    """

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        decode: Decode | None = None,
        turn: Turn = unturned,
    ):
        shape = (num_key_value_heads, head_dim, dtype, device, decode or CodedKV.rows, turn)
        super().__init__(layers=[RaggedLayer(*shape) for _ in range(num_layers)])
        self.turn = turn
        self.encoded = decode is not None
        """Whether rows may be attached in another form than as plain numbers."""
        self.tap: Tap | None = None
        self.step: Step | None = None
        self.marks: Marks | None = None
        """A gate's scores of the tail, if one is asked."""
        self.padding = 0
        """Tokens at the end of the running pass that are there to round its length up."""
        self.offset = 0
        """By how much the positions of the tail, and of what comes next, are smaller than their places."""
        self.gap = NO_GAP

    @property
    def position(self) -> int:
        """Of the next token."""
        return self.num_seen - self.offset + self.gap.after(self.num_seen)

    @property
    def num_seen(self) -> int:
        """Logical length: tokens that the cache stands for, and the place of the next."""
        return int(self.layers[0].get_seq_length())

    @property
    def tail_start(self) -> int:
        """Position of the open tail's first token."""
        return int(self.layers[0].tail_start)

    @property
    def tail_length(self) -> int:
        """Rows in the open tail: its tokens, but for those aside."""
        return int(self.layers[0].tail_length)

    def tail(self, start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        """Exact keys and values of the open tail's tokens at positions start .. end, (H, end - start, D) a layer."""
        assert not self.layers[0].aside
        part, rows = slice(start - self.tail_start, end - self.tail_start), [layer.tail() for layer in self.layers]
        return [keys[:, part] for keys, _ in rows], [values[:, part] for _, values in rows]

    @property
    def num_sealed_rows(self) -> int:
        """KV pairs that sealed segments hold, over all layers and heads."""
        return sum(len(form.positions) for layer in self.layers for form in layer.forms)

    @property
    def sealed_bytes(self) -> int:
        """Bytes of the storages behind sealed keys and values, with their scales."""
        tensors = [plane for layer in self.layers for form in layer.forms for plane in form.planes]
        return sum(plane.untyped_storage().nbytes() for plane in tensors)

    @property
    def is_whole(self) -> bool:
        """Whether all layers stand for the same tokens and pieces, as they do unless memory ran out between two."""
        stands = {(frozenset(layer.pieces), layer.tail_start, layer.tail_length) for layer in self.layers}
        return len(stands) == 1

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

    def attach(self, pieces: Mapping[Piece, Sequence[LayerKV | CodedKV]], end: int, tail: int = 0) -> None:
        """Add sealed pieces (rows of every layer) of tokens before `end`, to which an empty tail moves on.

        They take the place of the first `tail` tokens of the tail, in all layers or, should it fail, in none.
        """
        assert self.tail_length == tail or end <= self.tail_start + tail
        assert not pieces.keys() & set(self.pieces)
        with self.attaching(tail):
            for index, layer in enumerate(self.layers):
                given = ((piece, rows[index]) for piece, rows in pieces.items())
                layer.attach([CodedKV.plain(kv, *piece) if isinstance(kv, LayerKV) else kv for piece, kv in given])
        for layer in self.layers:
            layer.tail_start = max(layer.tail_start, end)

    def place(self, layers: Sequence[tuple[CodedKV, ...]], end: int) -> None:
        """Hold these sealed rows of tokens before `end`, of every layer those of each form; nothing is held yet."""
        assert not self.num_seen
        for layer, forms in zip(self.layers, layers, strict=True):
            layer.place(forms)
            layer.tail_start = end

    def go_on_at(self, place: int) -> None:
        """The empty tail begins no earlier than at `place`: what stands before it need not be in memory."""
        assert not self.tail_length or place <= self.tail_start
        for layer in self.layers:
            layer.tail_start = max(layer.tail_start, place)

    def arrange(self, shifts: Mapping[int, int], offset: int, gap: Gap = NO_GAP) -> None:
        """Have the network see tokens at other positions.

        shifts: by how much the position of each segment, by its start, differs from the one that it was computed at.
        offset, gap: of the tail, whose keys are turned.
        """
        start, before = self.tail_start, (self.offset, self.gap)
        self.offset, self.gap = offset, gap
        by = [before[0] - offset + gap.after(place) - before[1].after(place) for place in range(start, self.num_seen)]
        for layer in self.layers:
            layer.arrange(shifts, by if any(by) else [])

    @contextmanager
    def attaching(self, tail: int) -> Iterator[None]:
        """Inside, pieces are attached to layers; at the end of it they have taken the place of that much of the tail.

        Should it fail, it is undone; only if memory does not even suffice for that is the cache no longer whole.
        """
        with ExitStack() as undo:
            undo.callback(self.keep, self.pieces)
            yield
            self.drop_tail(tail)
            undo.pop_all()

    def keep(self, pieces: Collection[Piece]) -> None:
        """Drop all other sealed pieces, layer by layer, so that memory is freed on the way; see `is_whole`."""
        for layer in self.layers:
            layer.keep(pieces)

    def exchange(self, pieces: Collection[Piece], added: Sequence[Sequence[CodedKV]]) -> None:
        """Drop all sealed pieces but these, and add rows of other pieces to every layer, in one go; see `is_whole`."""
        for layer in self.layers:
            layer.forget_turned()
        for layer, rows in zip(self.layers, added, strict=True):
            layer.exchange(pieces, rows)

    def crop(self, position: int) -> None:
        """Forget every token from `position` on; inside sealed segments as by `keep`."""
        if self.marks:
            self.marks.crop(position)
        for layer in self.layers:
            layer.crop(position)

    def clear(self) -> None:
        """Forget everything, whatever state a failure has left; needs no memory."""
        if self.marks:
            self.marks.crop(0)
        self.offset, self.gap = 0, NO_GAP
        for layer in self.layers:
            layer.clear()

    def drop_tail(self, tokens: int) -> None:
        """Take the first `tokens` of the tail away, in all layers or, should it fail, in none."""
        rest = [layer.after(tokens) for layer in self.layers]
        for layer, rows in zip(self.layers, rest, strict=True):
            layer.replace_tail(rows)

    # Rows written during a forward pass are inference tensors, which nothing outside inference mode may write to.
    @torch.inference_mode()
    def append_tail(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Append saved exact KV, a pair of (H, T, D) a layer."""
        with self.appending():
            for layer, (keys, values) in zip(self.layers, rows, strict=True):
                layer.append_tail(keys, values)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Inside, the tails grow, of all layers or, should it fail, of none."""
        with ExitStack() as undo:
            undo.callback(self.crop, self.num_seen)
            yield
            undo.pop_all()

    @contextmanager
    def padded(self, more: int) -> Iterator[None]:
        """Inside, a pass has so many tokens more at its end than are meant; observers do not see them."""
        self.padding = more
        try:
            yield
        finally:
            self.padding = 0

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
    def again(self, start: int, end: int, tap: Tap | None = None) -> Iterator[None]:
        """Inside, the tail ends at position `start`, and its tokens up to `end` can be computed once more under `tap`.

        Afterwards it has them as they were, to the last bit.
        """
        first = self.tail_start + self.layers[0].aside  # the newest are not aside, and stand at the end
        length, low, high = self.tail_length, start - first, end - first
        assert 0 <= low <= high <= length
        before = [tuple(rows[:, low:high].clone() for rows in layer.tail()) for layer in self.layers]
        for layer in self.layers:
            layer.tail_length = low
        self.tap = tap
        try:
            yield
        finally:
            self.tap = None
            for layer, (keys, values) in zip(self.layers, before, strict=True):
                layer.rewrite(low, keys, values)
                layer.tail_length = length

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
            if self.marks:
                self.marks.crop(self.num_seen)
