"""The gate by ridge regression (KVzap, arXiv 2601.07891): log KVzip scores, linear in what enters attention.

A layer at a time, in closed form, from sums over the segments in float64: a segment is read and forgotten. How much the
weights are held back is chosen on the last segments, and all segments decide the weights.

Letters: L layers, H KV heads, n width of the states, N tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvchat.compress.gates import LEAST
from kvchat.events import Progress
from kvchat.fitting.collecting import Segment

PENALTIES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Multiples of the identity that are added to the states' correlations."""
CHECKED = 6
"""One segment in so many chooses the penalty."""


@dataclass
class Sums:
    """Products of the states, with a 1 behind them, and targets, over tokens: (n + 1, n + 1), (n + 1, H), (H,)."""

    states: Tensor
    both: Tensor
    targets: Tensor

    @classmethod
    def of(cls, segments: Sequence[Segment], layer: int, device: torch.device) -> Sums:
        """Of all tokens that can be evicted."""
        found: Sums | None = None
        for segment in segments:
            own = cls._of(segment, layer, device)
            found = own if found is None else found + own
        assert found is not None
        return found

    @classmethod
    def _of(cls, segment: Segment, layer: int, device: torch.device) -> Sums:
        free = segment.candidates
        states = segment.tensor("states", layer)[free].to(device, torch.float64)
        states = torch.cat([states, torch.ones_like(states[:, :1])], dim=1)
        targets = log_scores(segment, layer)[:, free].T.to(device, torch.float64)
        return cls(states.T @ states, states.T @ targets, targets.square().sum(0))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.states + other.states, self.both + other.both, self.targets + other.targets)

    def solved(self, penalties: Sequence[float]) -> list[Tensor]:
        """Weights (n + 1, H), the last row the bias, by each penalty of standardised states."""
        count, mean = self.states[-1, -1], self.states[-1, :-1] / self.states[-1, -1]
        covariance = self.states[:-1, :-1] / count - mean[:, None] * mean
        scale = covariance.diagonal().clamp_min(1e-12).sqrt()
        aim = self.both[-1] / count
        together = (self.both[:-1] / count - mean[:, None] * aim) / scale[:, None]
        values, vectors = torch.linalg.eigh(covariance / scale / scale[:, None])
        turned, found = vectors.T @ together, []
        for penalty in penalties:
            weight = vectors @ (turned / (values.clamp_min(0) + penalty)[:, None]) / scale[:, None]
            found.append(torch.cat([weight, (aim - mean @ weight)[None]]))
        return found

    def error(self, weights: Tensor) -> float:
        """Sum of squares that weights (n + 1, H) leave."""
        explained = (weights * (2 * self.both - self.states @ weights)).sum(0)
        return float((self.targets - explained).sum())


def log_scores(segment: Segment, layer: int) -> Tensor:
    """What a ridge gate is to say of each token of a segment, (H, T)."""
    return segment.tensor("kvzip", layer).log().clamp_min(LEAST)


def fitted(
    segments: Sequence[Segment], num_layers: int, device: torch.device
) -> Generator[Progress, None, dict[str, Tensor]]:
    """The weights of a `Ridge` gate; progress is counted in layers."""
    checked = max(1, len(segments) // CHECKED) if len(segments) > 1 else 0
    found = []
    for layer in range(num_layers):
        rest = Sums.of(segments[: len(segments) - checked], layer, device)
        penalty = PENALTIES[2]
        if checked:
            check = Sums.of(segments[-checked:], layer, device)
            errors = [check.error(weights) for weights in rest.solved(PENALTIES)]
            penalty, rest = PENALTIES[errors.index(min(errors))], rest + check
        found.append(rest.solved([penalty])[0].T.float())
        yield Progress("fit", layer + 1, num_layers)
    both = torch.stack(found)
    return {"weight": both[:, :, :-1].contiguous(), "bias": both[:, :, -1].contiguous()}
