"""The newest tokens of every segment (StreamingLLM, arXiv 2309.17453); the first of all are protected anyhow.

Letters: L layers, H KV heads, T tokens of the segment, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.compress.scorers.base import Alone


class Streaming(Alone):
    """The later, the higher."""

    def scores(self) -> Tensor:
        """(L, H, T) float32."""
        newest = torch.arange(len(self.subject.token_ids), dtype=torch.float32, device=self.subject.keys[0].device)
        return newest.expand(len(self.subject.keys), len(self.subject.keys[0]), -1)
