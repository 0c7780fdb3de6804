"""Expected Attention (arXiv 2510.00636): what queries like the segment's own will pay to a pair from positions ahead.

The segment's queries, without their RoPE, are taken as normal: a mean and a covariance for each query head. Turned by
the mean rotation of the next AHEAD positions after the segment (not after zero), they give the expected exponential of
a key's logit in closed form; normalised over the segment, times the value's norm.

Letters: L layers, H KV heads, G query heads per KV head, T tokens, D head_dim, q tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvchat.compress.scorers.base import Network, Pass, Subject

AHEAD = 512
"""Positions over which future queries are spread."""


class ExpectedAttention:
    """Scores per head, in float32; the segment's tokens run once more where they stand, in passes of `chunk_size`."""

    def __init__(self, subject: Subject, chunk_size: int) -> None:
        self.subject = subject
        self.chunk_size = chunk_size
        self._positions = torch.empty(0, dtype=torch.int64)
        self._turn: Tensor | None = None
        self._count = 0
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._scale = 1.0

    def passes(self) -> Iterator[Pass]:
        """All tokens, once."""
        tokens = len(self.subject.token_ids)
        for first in range(0, tokens, self.chunk_size):
            last = min(first + self.chunk_size, tokens)
            self._positions = torch.arange(self.subject.start + first, self.subject.start + last)
            self._count += last - first
            yield range(first, last)

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Add one layer's queries to its sums."""
        plain = self._network.rotate(query, -self._positions.to(query.device))
        first, second = plain.sum(1), plain.mT @ plain
        known = self._sums.get(layer)
        self._sums[layer] = (first, second) if known is None else (known[0] + first, known[1] + second)
        self._scale = scale

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        return torch.stack([self._layer(layer) for layer in range(len(self.subject.keys))])

    @property
    def _network(self) -> Network:
        assert self.subject.network is not None
        return self.subject.network

    def _layer(self, layer: int) -> Tensor:
        total, products = self._sums[layer]
        mean = total / self._count
        spread = products / self._count - mean[:, :, None] * mean[:, None]
        turn = self._mean_turn(mean.shape[-1], mean.device)
        mean, spread = mean @ turn.mT, turn @ spread @ turn.mT
        keys = self.subject.keys[layer].float()
        groups = keys.repeat_interleave(len(mean) // len(keys), 0)
        logits = (groups @ mean[:, :, None])[..., 0] * self._scale
        logits = logits + ((groups @ spread) * groups).sum(-1) * (self._scale**2 / 2)
        expected: Tensor = logits.nan_to_num().softmax(-1).view(len(keys), -1, logits.shape[-1]).mean(1)
        norms: Tensor = self.subject.values[layer].float().norm(dim=-1).clamp_max(1e30)
        return expected * norms

    def _mean_turn(self, dim: int, device: torch.device) -> Tensor:
        """The mean rotation (D, D) of the positions ahead."""
        if self._turn is None:
            end = self.subject.start + len(self.subject.token_ids)
            positions = torch.arange(end, end + AHEAD, device=device)
            units = torch.eye(dim, device=device)[:, None].expand(-1, AHEAD, -1)
            self._turn = self._network.rotate(units, positions).mean(1).mT.contiguous()
        return self._turn
