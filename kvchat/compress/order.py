"""How pairs of different layers and heads compare: scores to one order over all, of which every budget takes the best.

Each way is a function of scores (L, H, T) to numbers (L, H, T) of which higher ones stay longer. So what a budget keeps
is always part of what a larger one keeps, whichever way is chosen.

Letters: L layers, H KV heads, T tokens of the segment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAFEGUARD = 0.2
"""AdaKV: this fraction of an equal share is every head's own."""
STEEPNESS = 20.0
"""PyramidKV's beta: the last layer's share is the mean share divided by it."""


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
    share = torch.linspace(2 - low, low, len(scores), dtype=torch.float64, device=scores.device)
    return -_places(scores) / share[:, None, None]


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
}
"""Name to way, as `compress.allocate` says it."""
