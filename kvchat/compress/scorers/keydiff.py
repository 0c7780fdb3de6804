"""KeyDiff (arXiv 2504.15364): a key unlike the others of its head, the mean of its unit keys, matters.

Letters: L layers, H KV heads, T tokens of the segment, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.compress.scorers.base import Alone


class KeyDiff(Alone):
    """Scores in [-1, 1]."""

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        return torch.stack([_unlikeness(keys.float()) for keys in self.subject.keys])


def _unlikeness(keys: Tensor) -> Tensor:
    """Minus the cosine of each key (H, T, D) with the mean direction of its head."""
    unit = torch.nn.functional.normalize(keys, dim=2)
    anchor = torch.nn.functional.normalize(unit.mean(1, keepdim=True), dim=2)
    return -(unit * anchor).sum(2)
