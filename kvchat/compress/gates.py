"""A gate foretells KVzip's scores from the states that enter attention, a token at a time and with no pass.

Two forms, told apart by the names of their tensors, both comparable over layers and heads:

    Ridge       KVzap (arXiv 2601.07891): log score, linear in the states
    SmallGate   Fast KVzip (arXiv 2601.17668): the token's softmax weight against learned sinks

Letters: L layers, H KV heads, G query heads per KV head, n width of the states, q tokens, R rank, S sinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from kvchat.errors import InputError

Weights = Mapping[str, Tensor]

LEAST = -20.0
"""Log scores are cut off here: KVzip's can underflow to 0."""
EPSILON = 1e-6


class Form(Protocol):
    """One kind of gate."""

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """As `Gate`."""


class Ridge:
    """One matmul a layer, whose exponential is the score.

    Args:
        weights: `weight` (L, H, n) and `bias` (L, H).
    """

    NAMES = frozenset({"weight", "bias"})

    def __init__(self, weights: Weights) -> None:
        self._weight, self._bias = weights["weight"].float(), weights["bias"].float()

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """As `Gate`."""
        return self.log_scores(layer, states).clamp(LEAST, -LEAST).exp()

    def log_scores(self, layer: int, states: Tensor) -> Tensor:
        """(H, q) float32 of states (q, n): what is fitted."""
        return torch.addmm(self._bias[layer][:, None], self._weight[layer], states.float().T)


class SmallGate:
    """Queries and keys of R numbers, both normed; scores are in (0, 1).

    Args:
        weights: `query` (L, H, G, R, n), `query_bias` (L, H, G, R), `key` (L, H, R, n), `query_norm` and `key_norm`
            (L, R), `sinks` (L, H, S, R), `sink_bias` (L, H, G).
    """

    NAMES = frozenset({"query", "query_bias", "key", "query_norm", "key_norm", "sinks", "sink_bias"})

    def __init__(self, weights: Weights) -> None:
        self._layers = [
            {name: weights[name][layer].float() for name in self.NAMES} for layer in range(len(weights["query"]))
        ]

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """As `Gate`."""
        return small_scores(self._layers[layer], states)


def small_scores(weights: Weights, states: Tensor) -> Tensor:
    """Scores (H, q) of states (q, n) by one layer's weights of a `SmallGate`.

    The bias is added once, as the released gates are used (the released trainer adds it twice).
    """
    heads, groups, rank, _ = weights["query"].shape
    wide = states.float()
    query = (wide @ weights["query"].flatten(0, 2).T).view(-1, heads, groups, rank) + weights["query_bias"]
    key = (wide @ weights["key"].flatten(0, 1).T).view(-1, heads, 1, rank)
    query, key = _normed(query, weights["query_norm"]), _normed(key, weights["key_norm"])
    own = (query * key).sum(3) * rank**-0.5 + weights["sink_bias"]
    sinks = torch.einsum("qhgr,hsr->qhgs", query, weights["sinks"]) * rank**-0.5
    # 1 / (1 + sum of exp(sink - own)), without overflow.
    scores: Tensor = (own - sinks.logsumexp(3)).sigmoid().mean(2).T
    return scores


def _normed(states: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension."""
    return states * (states.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


class Gate:
    """Either form, by the names of its tensors. Raises InputError if they are neither's."""

    def __init__(self, weights: Weights) -> None:
        form = next((form for form in (Ridge, SmallGate) if weights.keys() == form.NAMES), None)
        if form is None:
            raise InputError("the file of the gate holds other tensors than a gate has; run `kvchat fit gate` again")
        self._form: Form = form(weights)

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """Scores (H, q) float32, higher = keep, of the states (q, n) that enter a layer's attention."""
        return self._form(layer, states)
