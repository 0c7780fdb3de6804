"""How the attention that many rows pay to a pair is joined to one number: what an observation says of the future.

Letters: H KV heads, G query heads per KV head, R rows (queries), M candidate tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

COVERAGE = 0.9
"""DefensiveKV: pairs that bring a head to this much of its attention, with what is kept anyway, come before others."""

Aggregator = Callable[[Tensor, Tensor], Tensor]
"""Probabilities (H, G, R, M), whose rows sum to at most 1, and a weight (H, M) of each value, to scores (H, M).

Heads do not look at each other, so they may be given one by one."""


def mean(weights: Tensor, share: Tensor) -> Tensor:
    """Expected attention, as SnapKV takes it (arXiv 2404.14469)."""
    return weights.mean((1, 2))


def largest(weights: Tensor, share: Tensor) -> Tensor:
    """The most that any row pays, as KVzip takes it (arXiv 2505.23416)."""
    return weights.amax((1, 2))


def lifted(weights: Tensor, share: Tensor) -> Tensor:
    """DefensiveKV's two steps (arXiv 2510.13334): the worst case, and no risk below the head's mean; times `share`."""
    worst = weights.amax((1, 2))
    return worst.maximum(worst.mean(1, keepdim=True)) * share


def defensive(weights: Tensor, share: Tensor) -> Tensor:
    """`lifted`, after the pairs that COVERAGE asks for, which stand by their mean attention.

    What rows pay to keys that are no candidates counts as covered. The paper's bound on the number of such pairs
    depends on the budget; here the best of every head come first, so that budgets stay nested.
    """
    average = weights.mean((1, 2))
    ordered, order = average.sort(dim=1, descending=True, stable=True)
    before = (1 - average.sum(1, keepdim=True)) + ordered.cumsum(1) - ordered
    places = average.new_zeros(average.shape)
    places.scatter_(1, order, (before < COVERAGE).to(average.dtype))
    scores = lifted(weights, share)
    ahead = 1 + _fractions(order)
    return ahead.to(scores.dtype).where(places.bool(), scores / (1 + scores))


def _fractions(order: Tensor) -> Tensor:
    """1 for what `order` (H, M) names first, falling evenly to above 0 for the last."""
    rank = order.argsort(1)
    return 1 - rank / order.shape[1]


AGGREGATORS: dict[str, Aggregator] = {"mean": mean, "max": largest, "lifted": lifted, "defensive": defensive}
"""Name to way, as `compress.aggregate` says it."""
