"""How much of each segment is held: one budget over all, which goes to the best chunks wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence

from kvchat.cache.segment import Ranking
from kvchat.compress.compressor import chunks_within


def allocate(rankings: Sequence[Ranking], keep_ratio: float) -> list[int]:
    """Chunks of each segment so that all hold at most `keep_ratio` of their pairs (KVzip's one threshold over all).

    Every segment holds its first chunk. Then chunks are taken by falling score, equal ones the better-ranked and then
    the earlier first, up to the first that does not fit: a larger budget holds all that a smaller one does. A segment
    that was sealed without chunk scores holds `keep_ratio` of its own.
    """
    held = [chunks_within(ranking.sizes, keep_ratio) if ranking.scores is None else 1 for ranking in rankings]
    scored = [(index, ranking) for index, ranking in enumerate(rankings) if ranking.scores is not None]
    left = keep_ratio * sum(int(ranking.sizes.sum()) for _, ranking in scored) + 1e-6
    left -= sum(int(ranking.sizes[0]) for _, ranking in scored)
    for _, chunk, index in sorted(_candidates(scored)):
        left -= int(rankings[index].sizes[chunk])
        if left < 0:
            break
        held[index] = chunk + 1
    return held


def _candidates(scored: Sequence[tuple[int, Ranking]]) -> list[tuple[float, int, int]]:
    """(falling score, chunk, segment) of all but the first chunks; scores never rise within a segment."""
    return [
        (-float(score), chunk, index)
        for index, ranking in scored
        for chunk, score in enumerate(ranking.scores or ())
        if chunk > 0
    ]
