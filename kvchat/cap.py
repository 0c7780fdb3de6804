"""Holds the open tail to a number of rows a head while one answer is generated: R-KV (arXiv 2505.24133).

Whenever the tail is full, each head keeps its best rows, and the others are put aside. All heads keep as many, so that
the tail stays dense. When the answer ends every row comes back: nothing is lost, and the turn is sealed whole.

Letters: H KV heads, G query heads per KV head, A observing tokens, T rows of the tail, R rows that stay, D head_dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kvchat import memory
from kvchat.cache.aside import Aside
from kvchat.cache.ragged import SegmentedCache, Tap
from kvchat.compress.scorers.rkv import OBSERVING, rkv
from kvchat.errors import OutOfMemory

BUFFER = 128
"""Tokens that are generated before rows are chosen again."""
SINKS = 4
"""Tokens at the beginning of the conversation that every head keeps."""


class Observe(Protocol):
    """`Engine.observe`."""

    def __call__(self, cache: SegmentedCache, ids: Sequence[int], tap: Tap, start: int) -> None: ...


class Cap:
    """The tail of one answer, which the next token never makes longer than a number of rows.

    Args:
        cache: whose tail it is.
        rows: most rows of a head. The answer's first 8 tokens are generated before any are chosen.
        observe: runs tokens of the tail once more under a tap.
        free: lets go what can be made again.
    """

    def __init__(self, cache: SegmentedCache, rows: int, observe: Observe, free: Callable[[], None]) -> None:
        assert rows >= 2 * BUFFER
        self._cache, self._rows, self._observe, self._free = cache, rows, observe, free
        self._aside: Aside | None = None
        self._newest: deque[int] = deque(maxlen=OBSERVING)
        self._kept: list[Tensor] = []
        self._open = True
        self.problem = ""
        """Why the tail is no longer held to its rows."""

    def add(self, token: int) -> None:
        """Say which token was added to the tail."""
        self._newest.append(token)

    def hold(self) -> bool:
        """Make room for the next token; whether rows have moved.

        Raises:
            OutOfMemory: rows could neither stay aside nor come back; the tail is empty then.
        """
        if not self._open or self._cache.tail_length < self._rows or len(self._newest) < OBSERVING:
            return False
        try:
            self._again(self._choose, "choosing what to keep of an answer")
            self._aside = self._aside or Aside(self._cache)
            for index, kept in enumerate(self._kept):
                self._again(partial(self._aside.put, index, kept), "putting rows of an answer aside")
        except (OSError, OutOfMemory) as error:
            self.problem = f"this answer is not held to compress.answer_rows: {error}"
            self.bring_back()
        return True

    def bring_back(self) -> None:
        """Give the tail all its rows again; from now on it is not held. Raises OutOfMemory: the tail is empty."""
        self._open = False
        if self._aside is None:
            return
        try:
            for index, layer in enumerate(self._cache.layers):
                if layer.aside:
                    self._again(partial(self._aside.bring_back, index), "bringing back rows of an answer")
        except (OSError, OutOfMemory) as error:
            for layer in self._cache.layers:
                layer.aside = 0
            self._cache.crop(self._cache.tail_start)
            raise OutOfMemory(f"the newest turns are computed again: {error}") from None
        finally:
            self._aside.close()
            self._aside = None

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """One layer of the newest tokens' pass; see `Tap`."""
        sinks = max(0, SINKS - self._cache.tail_start)
        self._kept.append(best(rkv(query, keys, scale), self._rows - BUFFER, query.shape[1], sinks))

    def _choose(self) -> None:
        """Find out which rows each layer keeps."""
        self._kept = []
        ids = [*self._newest]
        self._observe(self._cache, ids, self, self._cache.num_seen - len(ids))

    def _again(self, work: Callable[[], None], doing: str) -> None:
        memory.again(work, self._free, doing, self._cache.layers[0].device)


def best(scores: Tensor, rows: int, newest: int, sinks: int) -> Tensor:
    """Which rows (H, R) to keep, ascending: of those with scores (H, T - A) the `sinks` and the best, then A newest."""
    heads, older = scores.shape
    scores[:, :sinks] = torch.inf
    chosen = scores.topk(rows - newest, dim=1).indices.sort(dim=1).values
    return torch.cat([chosen, torch.arange(older, older + newest, device=scores.device).expand(heads, -1)], 1)
