"""One layer of the cache: sealed rows (ragged, packed) and the open tail (dense, causal).

Sealed rows stand in one canonical order: head, then segment, then rank chunk, then time. So the order in which pieces
come and go leaves no trace, and dropping chunks gives the same tensors as never having attached them.

Letters: H KV heads, T tokens, N sealed rows of a layer, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.coded import CHUNK, PLAIN, ROWS, START, CodedKV, Form
from kvchat.cache.pack import Runs, before, merged, pack
from kvchat.cache.segment import LayerKV
from kvchat.cache.tail import Tail

Decode = Callable[[CodedKV], LayerKV]
"""Rows in any form to plain numbers, for passes over many tokens."""
Turn = Callable[[Tensor, Tensor], Tensor]
"""Keys (N, D) and by how many positions each is to be turned (N,), to keys in their dtype."""

FEW = 4096
"""Rows of a beginning that are worth keeping as plain numbers, because every sealing asks for them."""


class Piece(NamedTuple):
    """One rank chunk of one segment; sorts in canonical order."""

    start: int
    """Position of the segment's first token: segments of one conversation never share it."""
    chunk: int


def unturned(keys: Tensor, by: Tensor) -> Tensor:
    """The `Turn` of keys without RoPE."""
    return keys


class RaggedLayer(Tail):
    """One layer: sealed rows are unchanged during a turn, the tail grows in place. Nothing is re-packed per token.

    Where a segment stands for the network can change (`shifts`); its rows do not, they are what the store has. Keys are
    turned for who reads them, each time from the stored ones, so that nothing adds up.
    """

    def __init__(
        self,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        decode: Decode = CodedKV.rows,
        turn: Turn = unturned,
    ) -> None:
        super().__init__(num_key_value_heads, head_dim, dtype, device)
        self._decode = decode
        self._turn = turn
        self.shifts: Mapping[int, int] = {}
        """By how many positions the keys of a segment are to be turned, by its start; none is 0."""
        self._nothing = LayerKV.dense(self.keys, self.values, 0)
        self.forms: tuple[CodedKV, ...] = ()
        """Sealed rows, those of each form packed together."""
        self._plain: LayerKV | None = self._nothing
        self._pieces: frozenset[Piece] | None = frozenset()
        self._early: tuple[int, frozenset[Piece], LayerKV] | None = None
        """What `sealed_before` gave last, if that is little: the position, the pieces that it is of, and the rows."""
        self.version = 0
        """Another number whenever what is sealed has changed."""

    @property
    def sealed(self) -> LayerKV:
        """Sealed rows as plain numbers, where they stand now: as they lie, or decoded and turned for who asks."""
        if self._plain is not None:
            return self._plain
        rows = self._read(self.forms)
        if all(form.form == PLAIN for form in self.forms):  # only turned: else every pass would do it again
            self._plain = rows
        return rows

    def forget_turned(self) -> None:
        """Have no copy of rows that only stand elsewhere, until they are asked for."""
        self._plain = None if self.forms else self._plain

    def _read(self, forms: Sequence[CodedKV]) -> LayerKV:
        """Rows in any forms as plain numbers, keys turned."""
        return merged(forms, [self._turned(form, self._decode(form)) for form in forms])

    def _turned(self, form: CodedKV, rows: LayerKV) -> LayerKV:
        """Rows whose keys are turned to where their segments stand now."""
        if not self._turns(form):
            return rows
        by = np.array([self.shifts.get(start, 0) for start in form.runs[:, START].tolist()], np.int64)
        turns = torch.from_numpy(np.repeat(by, form.runs[:, ROWS])).to(rows.keys.device)
        if by.all():
            return replace(rows, keys=self._turn(rows.keys, turns))
        moved, keys = turns.nonzero()[:, 0], rows.keys.clone()
        keys[moved] = self._turn(keys[moved], turns[moved])
        return replace(rows, keys=keys)

    def arrange(self, shifts: Mapping[int, int], tail: Sequence[int]) -> None:
        """Have segments stand elsewhere, as `shifts` says, and turn the tail's keys each by so many positions."""
        shifts = {start: by for start, by in shifts.items() if by}
        if tail:
            assert not self.aside
            keys, _ = self.tail()
            self.rewrite_keys(self._turn(keys.flatten(0, 1), self._of_heads(tail)).view(keys.shape))
        if shifts != self.shifts:
            self.shifts, self._early = shifts, None
            self.place(self.forms)

    def _of_heads(self, tail: Sequence[int]) -> Tensor:
        return torch.tensor(tail, device=self.device).repeat(len(self.keys))

    def sealed_before(self, position: int) -> LayerKV:
        """Sealed rows of tokens before `position` as plain numbers; no others are decoded."""
        pieces = frozenset(piece for piece in self.pieces if piece.start < position)
        if self._early and self._early[:2] == (position, pieces):
            return self._early[2]
        forms = [before(form, position) for form in self.forms]
        rows = self._read(forms) if forms else self._nothing
        self._early = (position, pieces, rows) if len(rows.keys) <= FEW else None
        return rows

    @property
    def pieces(self) -> frozenset[Piece]:
        """What is attached."""
        if self._pieces is None:
            self._pieces = _pieces(self.forms)
        return self._pieces

    def attach(self, pieces: Sequence[CodedKV]) -> None:
        """Add rows, of pieces that are not there; they may lie in host memory."""
        self._set([(rows, rows.runs) for rows in (*self.forms, *pieces)])

    def keep(self, pieces: Collection[Piece]) -> None:
        """Drop every sealed piece that is not named; its memory is freed."""
        if dropped := self.pieces.difference(pieces):
            self._early = None if self._early and dropped & self._early[1] else self._early
            self._set([(form, form.runs[~_of_pieces(form.runs, dropped)]) for form in self.forms])

    def exchange(self, pieces: Collection[Piece], added: Sequence[CodedKV]) -> None:
        """`keep` and `attach` at once: everything is packed only once."""
        dropped = self.pieces.difference(pieces)
        self._early = None if self._early and dropped & self._early[1] else self._early
        kept = [(form, form.runs[~_of_pieces(form.runs, dropped)]) for form in self.forms]
        self._set([*kept, *((rows, rows.runs) for rows in added)])

    def crop(self, position: int) -> None:
        """Forget every token from `position` on, in the tail and inside sealed segments."""
        if position >= self.tail_start:
            self.tail_length = min(self.tail_length, position - self.tail_start - self.aside)
            return
        self._set([(form, form.runs) for form in (before(form, position) for form in self.forms)])
        self._early = self._early if self._early and self._early[0] <= position else None
        self.replace_tail(self.after(self.tail_length))
        self.tail_start = position

    def clear(self) -> None:
        """Forget everything."""
        self.shifts = {}
        self._set([])
        self._early = None
        self.aside = 0
        self.replace_tail(self.after(self.tail_length))
        self.tail_start = 0

    def _set(self, chosen: Sequence[tuple[CodedKV, Runs]]) -> None:
        """Hold these runs and nothing else, what has one form packed together."""
        forms: dict[Form, list[tuple[CodedKV, Runs]]] = {}
        for rows, runs in chosen:
            if len(runs):
                forms.setdefault(rows.form, []).append((rows, runs))
        packed = tuple(
            pack([rows for rows, _ in forms[form]], [runs for _, runs in forms[form]], self.device)
            for form in sorted(forms, reverse=True)
        )
        self.place(packed)

    def _turns(self, form: CodedKV) -> bool:
        """Whether keys of some of its segments are to be turned."""
        return bool(self.shifts) and not self.shifts.keys().isdisjoint(form.runs[:, START].tolist())

    def place(self, forms: tuple[CodedKV, ...]) -> None:
        """Hold these rows and no others: one CodedKV a form, as `pack` makes them, the form with most bits first."""
        plain = forms[0].rows() if len(forms) == 1 and forms[0].form == PLAIN and not self._turns(forms[0]) else None
        self.forms, self._plain, self._pieces = forms, plain if forms else self._nothing, None
        self.version += 1


def _of_pieces(runs: Runs, pieces: Collection[Piece]) -> npt.NDArray[np.bool_]:
    """Which runs belong to one of these pieces."""
    # Plain sets: of the few runs of a layer numpy's `isin` and `unique` take ten times as long, and layers are many.
    wanted = {piece.start << 8 | piece.chunk for piece in pieces}
    return np.array([place in wanted for place in _places(runs)], np.bool_)


def _pieces(parts: Iterable[CodedKV]) -> frozenset[Piece]:
    """The pieces whose rows these are."""
    places = {place for part in parts for place in _places(part.runs)}
    return frozenset(Piece(place >> 8, place & 255) for place in places)


def _places(runs: Runs) -> list[int]:
    """One number for the piece of each run: there are fewer than 256 chunks."""
    places: list[int] = (runs[:, START] << 8 | runs[:, CHUNK]).tolist()
    return places
