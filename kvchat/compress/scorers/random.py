"""Scores without meaning: what every method must beat."""

from __future__ import annotations

from zlib import crc32

import torch
from torch import Tensor

from kvchat.compress.scorers.base import Alone


class Random(Alone):
    """Uniform in [0, 1), the same every time for the same segment."""

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        ids, keys = self.subject.token_ids, self.subject.prefix_keys
        source = torch.Generator().manual_seed(crc32(repr(ids).encode()))
        return torch.rand(len(keys), len(keys[0]), len(ids), generator=source).to(keys[0].device)
