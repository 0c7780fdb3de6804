"""The norm of keys (arXiv 2406.11430): those of small norm attract attention, so the less, the more a pair matters.

Letters: L layers, H KV heads, T tokens of the segment, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.compress.scorers.base import Alone


class KNorm(Alone):
    """Scores in (-inf, 0]."""

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        most = torch.finfo(torch.float32).max
        return torch.stack([-keys.double().norm(dim=2).clamp(max=most).float() for keys in self.subject.keys])
