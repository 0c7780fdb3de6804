"""How much of each segment is held: one budget over all, which goes to the best chunks wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvchat.compress.compressor import chunks_within
from kvchat.config import CompressConfig


class Ranked(Protocol):
    """What is asked of a `Ranking`: pairs and score of each chunk."""

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """As `Ranking` has them."""

    @property
    def scores(self) -> tuple[float, ...] | None:
        """As `Ranking` has them."""


def chunks_held(
    config: CompressConfig, segments: Sequence[tuple[Ranked, int]], stored: Sequence[int], newest: int
) -> list[int]:
    """Chunks that memory holds of segments, each given with the end of its use, when `stored` of each can be had.

    All of those with one of the newest tokens, which end at `newest`; of the others what `keep_ratio` gives each, or
    all of them together.
    """
    recent = [min(end, newest) > newest - config.recent_tokens for _, end in segments]
    old = [(ranking, most) for (ranking, _), most, new in zip(segments, stored, recent, strict=True) if not new]
    if config.budget == "session":
        held = iter(allocate([ranking for ranking, _ in old], config.keep_ratio, [most for _, most in old]))
    else:
        held = iter([min(chunks_within(ranking.sizes, config.keep_ratio), most) for ranking, most in old])
    return [most if new else next(held) for most, new in zip(stored, recent, strict=True)]


def allocate(rankings: Sequence[Ranked], keep_ratio: float, stored: Sequence[int] | None = None) -> list[int]:
    """Chunks of each segment so that all hold at most `keep_ratio` of their pairs (KVzip's one threshold over all).

    Every segment holds its first chunk. Then chunks are taken by falling score, equal ones the better-ranked and then
    the earlier first, up to the first that does not fit: a larger budget holds all that a smaller one does. A segment
    that was sealed without chunk scores holds `keep_ratio` of its own. None holds more than `stored` of its chunks
    (None: all can be had); what it cannot take is left to the others.
    """
    most = [len(ranking.sizes) for ranking in rankings] if stored is None else stored
    held = [
        min(chunks_within(ranking.sizes, keep_ratio), count) if ranking.scores is None else 1
        for ranking, count in zip(rankings, most, strict=True)
    ]
    scored = [(index, ranking) for index, ranking in enumerate(rankings) if ranking.scores is not None]
    left = keep_ratio * sum(int(ranking.sizes.sum()) for _, ranking in scored) + 1e-6
    left -= sum(int(ranking.sizes[0]) for _, ranking in scored)
    for _, chunk, index in sorted(_candidates(scored, most)):
        left -= int(rankings[index].sizes[chunk])
        if left < 0:
            break
        held[index] = chunk + 1
    return held


def _candidates(scored: Sequence[tuple[int, Ranked]], most: Sequence[int]) -> list[tuple[float, int, int]]:
    """(falling score, chunk, segment) of all but the first chunks; scores never rise within a segment."""
    return [
        (-float(score), chunk, index)
        for index, ranking in scored
        for chunk, score in enumerate((ranking.scores or ())[: most[index]])
        if chunk > 0
    ]
