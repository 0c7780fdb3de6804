"""What a question reads of the rows that memory holds: attention itself says which segments matter.

Letters: H KV heads, G query heads per KV head, q tokens of the question, T of the tail, N sealed rows of a head,
S segments, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvchat.cache.ragged import SegmentedCache
from kvchat.engine import Engine

SINKS = 4
"""First tokens of the conversation, which gather attention whatever the question is: they count for no segment."""


def attended(
    engine: Engine, cache: SegmentedCache, ids: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[float]:
    """For each span of places [start, end) the part of attention that its sealed rows get; 0 if none is in memory.

    The question runs once on a scratch tail. Of a layer counts the most that any of its tokens and heads gives to the
    span; the result is the mean over the layers.
    """
    if not spans or not ids:
        return [0.0] * len(spans)
    reading = _Reading(cache, spans)
    engine.observe(cache, ids, reading)
    found: list[float] = (reading.total / len(cache.layers)).tolist()
    return found


class _Reading:
    """A tap that adds up, layer by layer, what each span gets."""

    def __init__(self, cache: SegmentedCache, spans: Sequence[tuple[int, int]]) -> None:
        self._cache = cache
        order = sorted(range(len(spans)), key=lambda index: spans[index])
        self._order = torch.tensor(order)
        self._starts = torch.tensor([spans[index][0] for index in order])
        self._ends = torch.tensor([spans[index][1] for index in order])
        self.total = torch.zeros(len(spans), dtype=torch.float64)

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Take in one layer."""
        rows = self._cache.layers[layer].sealed
        owners = self._owners(rows.positions)
        grouped = query.float().reshape(len(keys), -1, query.shape[-1])  # (H, G * q, D)
        most = torch.zeros(len(self._order), device=query.device)
        for head, tail in enumerate(keys.float()):
            mine = slice(rows.bounds[head], rows.bounds[head + 1])
            parts = _parts(grouped[head] * scale, rows.keys[mine].float(), tail, query.shape[1])
            sums = torch.zeros(len(parts), len(self._order) + 1, device=query.device)
            sums.index_add_(1, owners[mine], parts)
            most = torch.maximum(most, sums[:, :-1].amax(0))
        self.total[self._order] += most.double().cpu()

    def _owners(self, positions: Tensor) -> Tensor:
        """The span, in rising order, that each row belongs to; one past the last for those of none."""
        places = positions.cpu().long()
        found = torch.searchsorted(self._starts, places, right=True) - 1
        outside = (found < 0) | (places >= self._ends[found.clamp_min(0)]) | (places < SINKS)
        return found.masked_fill(outside, len(self._starts)).to(positions.device)


def _parts(queries: Tensor, sealed: Tensor, tail: Tensor, tokens: int) -> Tensor:
    """Attention (G * q, N) of scaled queries (G * q, D) to sealed keys; the tail (T, D) gets the rest, causally.

    The last q tokens of the tail are the queries' own.
    """
    others = queries @ tail.T
    ahead = torch.arange(len(tail), device=tail.device) - (len(tail) - tokens)
    row = torch.arange(tokens, device=tail.device).repeat(len(queries) // tokens)
    others = others.masked_fill(ahead[None] > row[:, None], -torch.inf)
    return torch.cat([queries @ sealed.T, others], 1).softmax(1)[:, : len(sealed)]
