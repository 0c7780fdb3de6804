"""SnapKV (arXiv 2404.14469): a pair matters as much as the segment's last tokens attend to it.

The window's tokens run once more where they stand. Their attention to the tokens before, over the protected prefix and
the segment, is smoothed along the text and joined: by its mean (SnapKV), or as `compress.aggregate` says (`defensive`
is DefensiveKV, arXiv 2510.13334). The window itself comes before all others.

Letters: H KV heads, G query heads per KV head, W window tokens, M tokens before the window, T all, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvchat.compress.aggregate import mean
from kvchat.compress.scorers.base import Newest, Subject
from kvchat.compress.scorers.values import value_share

WINDOW = 32
"""Tokens at most; of a segment shorter than 8 times as many, an eighth, for a window is no help if it fills the budget.
"""
POOL = 5


class SnapKV(Newest):
    """Scores per head; whether those of two heads compare is left to `compress.allocate`."""

    def __init__(self, subject: Subject, chunk_size: int) -> None:
        super().__init__(subject, min(WINDOW, len(subject.token_ids) // 8))

    def observe(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """One layer of the pass."""
        window = query.shape[1]
        seen = torch.cat([self.subject.prefix_keys[layer], keys], dim=1)
        rows = window_attention(query, seen, scale)[..., -keys.shape[1] : -window]
        share = self._share(layer, rows) if self.subject.aggregate else rows.new_empty(0)
        self._add((self.subject.aggregate or mean)(pooled(rows), share))

    def _share(self, layer: int, rows: Tensor) -> Tensor:
        """Of each token, every head's part of what its values can add to the states, (H, M)."""
        assert self.subject.network is not None
        return value_share(self.subject.values[layer][:, : rows.shape[-1]], self.subject.network.output_weight(layer))


def window_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Probabilities (H, G, W, M + W) float32 of (H * G, W, D) queries over keys (H, M + W, D), the last W their own."""
    window = query.shape[1]
    # Of numbers near the dtype's largest a product overflows.
    logits = (query.reshape(len(keys), -1, *query.shape[1:]).float() @ keys[:, None].float().mT * scale).nan_to_num()
    hidden = torch.ones(window, window, dtype=torch.bool, device=query.device).triu(1)
    logits[..., -window:] = logits[..., -window:].masked_fill(hidden, -torch.inf)
    return logits.softmax(-1)


def pooled(rows: Tensor) -> Tensor:
    """(H, G, W, M) probabilities smoothed over POOL neighbours, each row's sum as it was."""
    flat = rows.flatten(0, 2)[:, None]
    smooth = torch.nn.functional.avg_pool1d(flat, POOL, 1, POOL // 2)
    return (smooth * (flat.sum(-1, keepdim=True) / smooth.sum(-1, keepdim=True).clamp_min(1e-12)))[:, 0].view_as(rows)
