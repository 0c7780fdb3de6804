"""How pairs of different layers and heads compare: scores to one order over all, of which every budget takes the best.

Each way is a function of scores (L, H, T) to numbers (L, H, T) of which higher ones stay longer. So what a budget keeps
is always part of what a larger one keeps, whichever way is chosen. What is kept in any case has an infinite score.

Letters: L layers, H KV heads, T tokens of the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SAFEGUARD = 0.2
"""AdaKV: this fraction of an equal share is every head's own."""
STEEPNESS = 20.0
"""PyramidKV's beta: the last layer's share is the mean share divided by it."""
SINK = 0.2
"""A pair with more than this part of its head's mass is a sink."""
NESTED_SINKS = 4
"""Sinks of a head that are looked for, each among what those before leave; a short segment is not all sinks."""


def ordered(scores: Tensor, protected: Sequence[bool], way: Callable[[Tensor], Tensor]) -> Tensor:
    """What `compressor.rank` takes, of (L, H, T) scores and T flags of tokens that are kept in any case."""
    order = way(scores.masked_fill(torch.tensor(protected, device=scores.device), torch.inf))
    first = order.masked_fill(order.isinf(), -torch.inf).amax().nan_to_num() + 1
    # What is protected comes first whatever its number is, so that may as well say what it is worth.
    known = torch.where(scores.isinf(), first, scores.to(order.dtype))
    return known.where(order.isinf(), order)


def over_all(scores: Tensor) -> Tensor:
    """Scores as they are: one threshold over all layers and heads (KVzip, arXiv 2505.23416)."""
    return scores


def over_layers(scores: Tensor) -> Tensor:
    """Every layer keeps as many; its heads compete, each with SAFEGUARD of an equal share (AdaKV, arXiv 2407.11550).

    With a share f of all pairs a head's best SAFEGUARD * f stay for certain: each pair stands at the least budget that
    keeps it.
    """
    return -torch.minimum(_places(scores.flatten(1)).view_as(scores), _places(scores) / SAFEGUARD)


def over_heads(scores: Tensor) -> Tensor:
    """Every head keeps as many."""
    return -_places(scores)


def pyramid(scores: Tensor) -> Tensor:
    """Every head of a layer keeps as many, a layer the fewer the later it comes (PyramidKV, arXiv 2406.02069).

    Shares fall in equal steps from 2 - 1 / STEEPNESS times the mean to 1 / STEEPNESS.
    """
    low = 1 / STEEPNESS
    return by_shares(scores, torch.linspace(2 - low, low, len(scores), dtype=torch.float64).tolist())


def by_shares(scores: Tensor, shares: Sequence[float]) -> Tensor:
    """Every head of a layer keeps as many, a layer its share of the mean (EvolKV, arXiv 2509.08315: searched for).

    A layer that has all it has gives what is left of its share to the others.
    """
    share = torch.tensor(shares, dtype=torch.float64, device=scores.device)
    return -_places(scores) / share[:, None, None]


def by_mass(scores: Tensor) -> Tensor:
    """As `over_all`, each pair at the part of all score mass that it and what comes after it hold.

    So the pairs above 1 - c are the fewest that hold a mass of c (in the spirit of DBudgetKV, arXiv 2502.16886). Sinks,
    which alone have SINK of their head, are kept and not counted, or nothing else would be worth keeping.
    """
    mass = scores.double()
    mass = mass - mass.amin(-1, keepdim=True).clamp_max(0)  # of scores that may be negative
    always = mass.isinf()
    for _ in range(NESTED_SINKS):
        head = mass.masked_fill(always, 0)
        always = always | (head > SINK * head.sum(-1, keepdim=True).clamp_min(1e-300))
    mass = mass.masked_fill(always, 0)
    ordered, order = mass.flatten().sort(descending=True, stable=True)
    left = ordered.flip(0).cumsum(0).flip(0)
    left = left / left[0].clamp_min(1e-300)
    return torch.empty_like(left).scatter_(0, order, left).view_as(scores).masked_fill(always, 2.0)


def coverage_cut(order: Tensor, coverage: float) -> float:
    """The fraction of pairs of `by_mass` numbers that hold so much of the mass; above 0."""
    return max(1, int((order > 1 - coverage).sum())) / order.numel()


def _places(scores: Tensor) -> Tensor:
    """The place of each score in its row, as a fraction: 0 for the highest; equal ones in their order. float64."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device).expand(scores.shape)
    return torch.empty_like(places.contiguous()).scatter_(-1, order, places) / scores.shape[-1]


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "global": over_all,
    "layer": over_layers,
    "uniform": over_heads,
    "pyramid": pyramid,
    "coverage": by_mass,
}
"""Name to way, as `compress.allocate` says it; "evolved" and "sensitivity" are `by_shares` with
what `kvchat tune` found or measured."""
