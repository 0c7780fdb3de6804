"""Scores without meaning: what every method must beat."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import torch
from torch import Tensor

from kvchat.compress.scorers.base import Subject


class Random:
    """Uniform in [0, 1), the same every time for the same segment."""

    def __init__(self, subject: Subject, chunk_size: int) -> None:
        self.subject = subject

    def passes(self) -> Iterator[tuple[int, ...]]:
        """None."""
        return iter(())

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """Never called."""

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        ids, keys = self.subject.token_ids, self.subject.prefix_keys
        source = torch.Generator().manual_seed(crc32(repr(ids).encode()))
        return torch.rand(len(keys), len(keys[0]), len(ids), generator=source).to(keys[0].device)
