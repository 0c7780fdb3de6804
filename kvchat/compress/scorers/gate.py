"""A gate (Fast KVzip, arXiv 2601.17668; KVzap, arXiv 2601.07891): KVzip's scores, foretold from what enters attention.

The session asks the gate while it computes tokens, so a segment mostly brings its scores along. Tokens of which it does
not (restored from the store, or decoded by a captured graph) run once more where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from kvchat.compress.gates import Gate
from kvchat.compress.scorers.base import Pass, Subject


class Gated:
    """Scores as the gate was fitted to give them, comparable over layers and heads."""

    def __init__(self, subject: Subject, chunk_size: int) -> None:
        assert subject.learned is not None and subject.marks is not None
        self._gate = Gate(dict(subject.learned))
        self._marks = subject.marks
        self._chunk_size = chunk_size
        self._running = slice(0, 0)

    def passes(self) -> Iterator[Pass]:
        """The tokens that have no score yet."""
        unknown = self._marks[0, 0].isnan().tolist()
        for blank, run in groupby(range(len(unknown)), unknown.__getitem__):
            tokens = list(run)
            for start in range(tokens[0], tokens[-1] + 1, self._chunk_size) if blank else ():
                self._running = slice(start, min(start + self._chunk_size, tokens[-1] + 1))
                yield range(self._running.start, self._running.stop)

    def enter(self, layer: int, states: Tensor) -> None:
        """Score the running pass's tokens in one layer."""
        self._marks[layer][:, self._running] = self._gate(layer, states)

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """What attention sees is not asked for."""

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        return torch.nan_to_num(self._marks)
