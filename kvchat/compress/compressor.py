"""Scores to rank chunks: one global order over layers, heads and tokens of a segment, cut at fixed fractions.

A smaller budget drops the last chunks, so shrinking to a and then to b equals sealing at b, and growing back is exact.

Letters: L layers, H KV heads, T tokens of the segment, C chunks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvchat.cache.segment import Ranking


def rank(scores: Tensor, protected: Sequence[bool], cuts: Sequence[float], start: int) -> Ranking:
    """Cut a segment's pairs into rank chunks (KVzip's global threshold, arXiv 2505.23416, with exact counts).

    Args:
        scores: (L, H, T), higher = keep; must be finite.
        protected: T flags; all pairs of a protected token are in chunk 0, which grows for them if it must.
        cuts: rising cumulative fractions of all pairs, the last 1.0.
        start: position of the first token.

    Ties go to the lower layer, then the lower head, then the earlier token.
    """
    assert scores.shape[2] == len(protected) and cuts[-1] == 1.0
    flat = scores.double().flatten()
    shield = torch.tensor(protected, device=scores.device).expand(scores.shape).flatten()
    order = torch.where(shield, torch.inf, flat).argsort(descending=True, stable=True)
    shielded = sum(protected) * scores.shape[0] * scores.shape[1]
    bounds = [max(int(cut * len(flat) + 1e-6), shielded) for cut in cuts]
    ranks = torch.empty(len(flat), dtype=torch.int64, device=scores.device)
    ranks[order] = torch.arange(len(flat), device=scores.device)
    # A pair of rank r lies in the first chunk whose bound is above r.
    chunk_of = torch.bucketize(ranks, torch.tensor(bounds, device=scores.device), right=True)
    middles = [min((low + high) // 2, len(flat) - 1) for low, high in pairwise([0, *bounds])]
    medians = flat[order[torch.tensor(middles, device=scores.device)]]
    # Protected pairs stand first whatever their scores: a chunk counts as no worse than those after it.
    falling = medians.float().flip(0).cummax(0).values.flip(0)[: 1 + sum(bound < len(flat) for bound in bounds)]
    return Ranking(start, chunk_of.to(torch.uint8).view(scores.shape).cpu().numpy(), tuple(falling.tolist()))


def chunks_within(sizes: npt.NDArray[np.int64], keep_ratio: float) -> int:
    """How many leading chunks of the given pair counts (C,) hold at most `keep_ratio` of all pairs; at least one."""
    within = np.cumsum(sizes) <= keep_ratio * sizes.sum() + 1e-6
    # An empty chunk costs nothing: it counts as held with those before it.
    return max(1, int(np.count_nonzero(within)))


def codecs_for(cuts: Sequence[float], rank_chunks: Sequence[float], names: Sequence[str]) -> list[str]:
    """The codec of each chunk of a ranking that is cut at `cuts`, cumulative fractions as in `rank`.

    `names` belong to the intervals that end at `rank_chunks`; the last serves all further ones. A chunk takes the name
    of the interval that it lies in, so that more cuts than `rank_chunks` change no pair's codec. (Below 8 bits they
    change its group: key scales serve up to 32 rows of a chunk.)
    """
    return [names[min(bisect_left(rank_chunks, cut), len(names) - 1)] for cut in cuts]
