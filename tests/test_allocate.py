"""One budget over all segments: exact, nested, and given to the best chunks wherever they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvchat.cache.segment import Ranking
from kvchat.compress.allocate import allocate
from kvchat.compress.compressor import chunks_within, rank

CUTS = [0.1, 0.3, 0.5, 0.7, 1.0]


def sealed(scores: torch.Tensor, protected: int = 0) -> Ranking:
    return rank(scores, [index < protected for index in range(scores.shape[2])], CUTS, 0)


def pairs(rankings: list[Ranking], held: list[int]) -> int:
    return sum(int(ranking.sizes[:count].sum()) for ranking, count in zip(rankings, held, strict=True))


def test_the_better_segment_gets_the_room() -> None:
    torch.manual_seed(0)
    good, poor = sealed(torch.rand(2, 2, 50) + 1), sealed(torch.rand(2, 2, 50))
    assert allocate([good, poor], 0.4) == [4, 1]
    assert allocate([poor, good], 0.4) == [1, 4]
    assert allocate([good, poor], 1.0) == [5, 5]


def test_chunk_scores_are_medians_that_never_rise() -> None:
    scores = torch.arange(100.0).flip(0).view(1, 1, 100)
    assert sealed(scores).scores == (94.0, 79.0, 59.0, 39.0, 14.0)
    low_first = torch.cat([torch.full((1, 1, 8), -1.0), scores], dim=2)
    ranking = sealed(low_first, protected=8)
    assert ranking.scores is not None and list(ranking.scores) == sorted(ranking.scores, reverse=True)
    assert ranking.scores[1] > 70


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.05, 1), st.floats(0.05, 1))
def test_budgets_are_kept_and_nested(seed: int, segments: int, some: float, other: float) -> None:
    torch.manual_seed(seed)
    rankings = [sealed(torch.rand(2, 2, 20 + 7 * index) ** (index + 1), index % 3) for index in range(segments)]
    less, more = sorted([some, other])
    held, wider = allocate(rankings, less), allocate(rankings, more)
    assert all(a <= b for a, b in zip(held, wider, strict=True))
    total = sum(ranking.chunk_of.size for ranking in rankings)
    first = sum(int(ranking.sizes[0]) for ranking in rankings)
    assert pairs(rankings, held) <= max(first, less * total + 1e-3)
    largest = max(int(ranking.sizes.max()) for ranking in rankings)
    assert pairs(rankings, held) > less * total - largest or held == [r.num_chunks for r in rankings]


def test_a_segment_without_scores_holds_its_own_share() -> None:
    old = Ranking(0, sealed(torch.rand(2, 2, 50)).chunk_of)
    new = sealed(torch.rand(2, 2, 50))
    assert allocate([old, new], 0.5)[0] == chunks_within(old.sizes, 0.5) == 3
    assert allocate([], 0.5) == []


def test_equal_scores_are_shared_evenly() -> None:
    rankings = [Ranking(0, sealed(torch.zeros(1, 1, 100)).chunk_of, (0.0,) * 5) for _ in range(3)]
    assert allocate(rankings, 0.3) == [2, 2, 2]
    assert np.array_equal(rankings[0].sizes, [10, 20, 20, 20, 30])


@pytest.mark.parametrize("keep", [0.1, 0.35, 1.0])
def test_one_segment_is_held_as_if_it_were_alone(keep: float) -> None:
    ranking = sealed(torch.rand(2, 2, 50))
    assert allocate([ranking], keep) == [chunks_within(ranking.sizes, keep)]
