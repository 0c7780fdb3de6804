"""Attention over sealed rows and an open tail, one head after the other: the definition of correct.

Every other backend is tested against this file, which is never optimised.

Letters: H KV heads, G query heads per KV head, q new tokens, T tail tokens (the new ones last), N sealed rows, D
head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.cache.segment import LayerKV


def attend(query: Tensor, sealed: LayerKV | None, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Softmax attention of the new tokens over sealed rows (all visible) and tail (causal).

    Args:
        query: (H * G, q, D); query head h reads KV head h // G.
        sealed: ragged rows, or None.
        keys, values: the tail, (H, T, D), whose last q tokens are the queries' own.
        scale: factor on the logits.

    Returns:
        (H * G, q, D) in the query's dtype; float32 inside (float64 for float64).
    """
    num_heads, q, _ = query.shape
    groups = num_heads // keys.shape[0]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.stack(
        [_head(query[h].to(wide), *_rows(sealed, keys, values, h // groups), q, scale) for h in range(num_heads)]
    ).to(query.dtype)


def _rows(sealed: LayerKV | None, keys: Tensor, values: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """All rows that a KV head holds: sealed ones, then the tail."""
    if sealed is None:
        return keys[head], values[head]
    low, high = sealed.cu_seqlens[head : head + 2].tolist()
    return torch.cat([sealed.keys[low:high], keys[head]]), torch.cat([sealed.values[low:high], values[head]])


def _head(query: Tensor, keys: Tensor, values: Tensor, q: int, scale: float) -> Tensor:
    logits = query @ keys.to(query.dtype).T * scale
    # Query i is the tail's token T - q + i, so it sees all rows but the last q - 1 - i.
    hidden = torch.ones(q, q, dtype=torch.bool, device=query.device).triu(1)
    logits[:, -q:] = logits[:, -q:].masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ values.to(query.dtype)


def log_normaliser(query: Tensor, past: Tensor, own: Tensor, scale: float) -> Tensor:
    """Log-sum-exp (H * G, R) float32 of the logits of (H * G, R, D) queries over past keys and, causally, their own.

    Args:
        query: (H * G, R, D). past: (H, M, D). own: (H, R, D).
        scale: factor on the logits.
    """
    rows, groups = query.shape[1], query.shape[0] // own.shape[0]
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
    result = []
    for h in range(query.shape[0]):
        wide = query[h].float()
        causal = (wide @ own[h // groups].float().T * scale).masked_fill(hidden, -torch.inf)
        seen = wide @ past[h // groups].float().T * scale
        result.append(torch.logaddexp(seen.logsumexp(-1), causal.logsumexp(-1)))
    return torch.stack(result)
