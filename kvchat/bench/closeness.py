"""How far a codec takes the network from the full cache: KL over the conversation's own next tokens.

The network runs in float32, whatever dtype it is loaded in, so that the rounding of bfloat16 does not hide what a codec
does. Every pair is kept; those of the coded segments are replaced by what the codec makes of them.

Letters: L layers, H KV heads, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor
from transformers import DynamicCache

from kvchat.bench.history import Subject
from kvchat.evals.measures import divergence
from kvchat.supported import cache_keyword

NEXT_TOKENS = 256
"""Tokens behind the coded ones over which the KL is taken, at most."""

Dense = tuple[Tensor, Tensor]
"""Keys and values of one segment, (L, H, T, D)."""


class Closeness:
    """What the full cache foretells behind its first `end` tokens, to compare with.

    Args:
        subject: the conversation, whose KV has been computed.
        exact: the segments that make up the first `end` tokens.
    """

    def __init__(self, subject: Subject, exact: Sequence[Dense], end: int) -> None:
        self.start, self.ids = end, subject.ids[end : end + NEXT_TOKENS]
        # The copy keeps its own attention: transformers' own, which needs no cache of ours.
        self.network = deepcopy(subject.engine.model.network).float()
        self.network.set_attn_implementation("sdpa")
        self.full = self._logprobs(exact)

    def kl(self, decoded: Sequence[Dense]) -> float | None:
        """KL(full || decoded) a token over the whole vocabulary, nats; None where no token follows."""
        if not self.ids:
            return None
        return divergence(self.full, self._logprobs(decoded)) / len(self.ids)

    @torch.inference_mode()
    def _logprobs(self, segments: Sequence[Dense]) -> Tensor:
        """(T, V) float64."""
        if not self.ids:
            return torch.zeros(0, 0)
        cache, device = DynamicCache(config=self.network.config), self.network.device
        for layer in range(len(segments[0][0])):
            keys, values = (torch.cat([one[side][layer] for one in segments], 1)[None].float() for side in (0, 1))
            cache.update(keys, values, layer)
        places = torch.arange(self.start, self.start + len(self.ids), device=device)[None]
        ids = torch.tensor([self.ids], device=device)
        logits: Tensor = self.network(ids, position_ids=places, **{cache_keyword(self.network): cache}).logits
        return logits[0].double().log_softmax(-1)
