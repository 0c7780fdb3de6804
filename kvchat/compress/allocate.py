"""How much of each segment is held: one budget over all, which goes to the best chunks wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvchat.compress.compressor import chunks_within
from kvchat.sections import CompressConfig


class Ranked(Protocol):
    """What is asked of a `Ranking`: pairs and score of each chunk, and how it was ranked."""

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """As `Ranking` has them."""

    @property
    def scores(self) -> tuple[float, ...] | None:
        """As `Ranking` has them."""

    @property
    def method(self) -> str:
        """As `Ranking` has it."""


def chunks_held(
    config: CompressConfig, segments: Sequence[tuple[Ranked, int]], stored: Sequence[int], newest: int
) -> list[int]:
    """Chunks that memory holds of segments, each given with the end of its use, when `stored` of each can be had.

    All of those with one of the newest tokens, which end at `newest`. Of the others what `coverage` gives those that
    were ranked for it, and what `keep_ratio` gives the rest: each, or all together that were ranked alike.
    """
    held = [*stored]
    alike: dict[str, list[int]] = {}
    for index, (ranking, end) in enumerate(segments):
        if min(end, newest) > newest - config.recent_tokens:
            continue
        if ranking.method.endswith("-coverage") and ranking.scores is not None:
            held[index] = min(chunks_covering(ranking.scores, config.coverage), stored[index])
        elif config.budget == "session":
            alike.setdefault(ranking.method, []).append(index)
        else:
            held[index] = min(chunks_within(ranking.sizes, config.keep_ratio), stored[index])
    for members in alike.values():
        found = allocate([segments[at][0] for at in members], config.keep_ratio, [stored[at] for at in members])
        for at, count in zip(members, found, strict=True):
            held[at] = count
    return held


def chunks_covering(scores: Sequence[float], coverage: float) -> int:
    """Leading chunks that hold so much of a segment's score mass, of the chunks' numbers by `order.by_mass`."""
    return max(1, sum(score > 1 - coverage for score in scores))


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
