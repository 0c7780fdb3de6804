"""R-KV (arXiv 2505.24133): attention of the newest tokens, less how much of a key others repeat.

Letters: H KV heads, G query heads per KV head, A observing tokens, T tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.compress.aggregate import Aggregator
from kvchat.compress.scorers.base import Newest, Subject

OBSERVING = 8
POOL = 7
ALIKE = 0.5
"""Cosine of two keys above which the older repeats the newer."""
IMPORTANCE = 0.1
"""Weight of attention; the rest is redundancy's."""
BLOCK = 256
"""Keys that are compared with all others at a time: a prompt may be long."""


class RKV(Newest):
    """Scores per head; the observing tokens come before all others."""

    def __init__(self, subject: Subject, chunk_size: int) -> None:
        super().__init__(subject, min(OBSERVING, len(subject.token_ids) // 2))

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """One layer of the pass."""
        self._add(rkv(query, keys, scale, self.subject.aggregate))


def rkv(query: Tensor, keys: Tensor, scale: float, aggregate: Aggregator | None = None) -> Tensor:
    """Scores (H, T - A) float32 of (H, T, D) keys under (H * G, A, D) queries of the last A tokens.

    Without `aggregate` the group's largest logits count, and the rows' mean.
    """
    logits = query.reshape(len(keys), -1, *query.shape[1:]).float() @ keys[:, None].float().mT * scale
    logits = logits[..., : -query.shape[1]].nan_to_num()
    if aggregate:
        importance = aggregate(logits.softmax(-1), logits.new_ones(len(keys), logits.shape[-1]))
    else:
        importance = logits.amax(1).softmax(-1).mean(1)
    importance = torch.nn.functional.max_pool1d(importance[:, None], POOL, 1, POOL // 2)[:, 0]
    return IMPORTANCE * importance - (1 - IMPORTANCE) * redundancy(keys)[:, : -query.shape[1]]


def redundancy(keys: Tensor) -> Tensor:
    """How much of each key (H, T, D) the others have, (H, T) float32, a share of 1.

    Of the keys that repeat one, the newest is not counted against it.
    """
    return torch.stack([_repeated(head.float()) for head in keys]).softmax(-1)


def _repeated(keys: Tensor) -> Tensor:
    """The mean cosine of each key (T, D) with the others, (T,), but for those of which it is the newest repetition."""
    units = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    index, total = torch.arange(len(keys), device=keys.device), keys.new_zeros(len(keys))
    for start in range(0, len(keys), BLOCK):
        cosine = units[start : start + BLOCK] @ units.T
        own = index[: len(cosine)]
        cosine[own, own + start] = 0
        newest = torch.where(cosine > ALIKE, index, -1).amax(1)
        cosine[own, newest] *= newest < 0
        total += cosine.sum(0)
    return total / len(keys)
