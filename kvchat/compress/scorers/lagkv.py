"""LagKV (arXiv 2504.04704): what varies much over channels, measured by the range of the part behind it, matters.

Parts have LAG tokens; scores are ranks within a part, so that each part gives as many. The last part and what is left
beyond it stay before all others. A segment of fewer than two parts is scored by recency.

Letters: L layers, H KV heads, T tokens of the segment, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.compress.scorers.base import Alone

LAG = 128
"""Tokens of a part."""


class LagKV(Alone):
    """Scores in [0, 2)."""

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        tokens = len(self.subject.token_ids)
        parts = tokens // LAG
        recency = torch.arange(tokens, device=self.subject.keys[0].device) / max(1, tokens)
        layers = []
        for keys, values in zip(self.subject.keys, self.subject.values, strict=True):
            scores = (recency + float(parts > 1)).expand(len(keys), tokens).clone()
            if parts > 1:
                spread = _spread(keys[:, : parts * LAG].double()) + _spread(values[:, : parts * LAG].double())
                ranks = spread.argsort(dim=-1, stable=True).argsort(-1) / LAG
                scores[:, : (parts - 1) * LAG] = ranks.flatten(1)
            layers.append(scores)
        return torch.stack(layers)


def _spread(rows: Tensor) -> Tensor:
    """Of (H, parts * LAG, D) all parts but the last, (H, parts - 1, LAG): shares, by softmax, of the deviation."""
    part = rows.reshape(len(rows), -1, LAG, rows.shape[2])
    low, high = part.amin(2, keepdim=True)[:, 1:], part.amax(2, keepdim=True)[:, 1:]
    # A channel that does not vary in the part behind says nothing.
    scaled = torch.where(high > low, (part[:, :-1] - low) / (high - low), 0.0)
    return scaled.std(3).softmax(2)
